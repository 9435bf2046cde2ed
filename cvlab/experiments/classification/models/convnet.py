"""The plain convolutional networks of EECS 498, assignment 3.

Differences from the course: max pooling precedes the ReLU. The two commute, so values and gradients are bit-for-bit
identical, and the ReLU has a quarter of the elements.
"""

from torch import nn

from cvlab.config.schema import NonNegativeInt, PositiveInt
from cvlab.errors import ConfigError
from cvlab.experiments.classification.models.layer_namespace import LayerNamespace
from cvlab.layers.init import WeightScale, init_weights


def deep_convnet(
    filters: tuple[PositiveInt, ...],
    pools: tuple[NonNegativeInt, ...] = (),
    batchnorm: bool = False,
    weight_scale: WeightScale = "kaiming",
    *,
    in_channels: int = 3,
    image_size: int = 32,
    num_classes: int = 10,
    layers: LayerNamespace = nn,
) -> nn.Module:
    """Build [conv 3x3 - (BatchNorm) - ReLU - (max pool 2x2)] x L - linear.

    Args:
        filters: Channels of each block.
        pools: Indices of the blocks that pool.
        batchnorm: Whether a BatchNorm follows each convolution.
        weight_scale: Standard deviation of the initial weights, or the name of an initialization.
        in_channels: C of the images.
        image_size: H and W of the images.
        num_classes: Number of classes.
        layers: Namespace of the layers.

    Returns:
        A model that maps images (N, C, H, W) to logits (N, num_classes).
    """
    _check_pools(filters, pools, image_size)
    blocks: list[nn.Module] = []
    channels, size = in_channels, image_size
    for index, width in enumerate(filters):
        blocks.append(init_weights(layers.Conv2d(channels, width, 3, padding=1), weight_scale, before_relu=True))
        if batchnorm:
            blocks.append(layers.BatchNorm2d(width))
        if index in pools:
            blocks.append(layers.MaxPool2d(2))
            size //= 2
        blocks.append(layers.ReLU())
        channels = width
    head = init_weights(layers.Linear(channels * size * size, num_classes), weight_scale, before_relu=False)
    return nn.Sequential(*blocks, nn.Flatten(), head)


def _check_pools(filters: tuple[int, ...], pools: tuple[int, ...], image_size: int) -> None:
    if not filters:
        raise ConfigError("model.filters: give at least one block")
    if len(set(pools)) != len(pools) or any(index >= len(filters) for index in pools):
        raise ConfigError(f"model.pools {list(pools)}: each must be a different block, 0 to {len(filters) - 1}")
    if image_size >> len(pools) < 1:
        raise ConfigError(f"model.pools: {len(pools)} halvings leave no pixel of {image_size} px", "use fewer pools")


def three_layer_convnet(
    num_filters: PositiveInt = 32,
    filter_size: PositiveInt = 7,
    hidden: PositiveInt = 100,
    weight_scale: WeightScale = 1e-3,
    *,
    in_channels: int = 3,
    image_size: int = 32,
    num_classes: int = 10,
    layers: LayerNamespace = nn,
) -> nn.Module:
    """Build conv - ReLU - max pool 2x2 - linear - ReLU - linear; the convolution preserves the spatial size.

    Args:
        num_filters: Channels of the convolution.
        filter_size: Kernel size of the convolution; odd.
        hidden: Width of the hidden linear layer.
        weight_scale: Standard deviation of the initial weights, or the name of an initialization.
        in_channels: C of the images.
        image_size: H and W of the images.
        num_classes: Number of classes.
        layers: Namespace of the layers.

    Returns:
        A model that maps images (N, C, H, W) to logits (N, num_classes).
    """
    if filter_size % 2 == 0:
        raise ConfigError(f"model.filter_size {filter_size}: must be odd, to preserve the spatial size")
    pooled = image_size // 2
    return nn.Sequential(
        init_weights(
            layers.Conv2d(in_channels, num_filters, filter_size, padding=filter_size // 2),
            weight_scale,
            before_relu=True,
        ),
        layers.MaxPool2d(2),
        layers.ReLU(),
        nn.Flatten(),
        init_weights(layers.Linear(num_filters * pooled * pooled, hidden), weight_scale, before_relu=True),
        layers.ReLU(),
        init_weights(layers.Linear(hidden, num_classes), weight_scale, before_relu=False),
    )
