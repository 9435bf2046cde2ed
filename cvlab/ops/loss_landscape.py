"""The loss of a network around its weights, along two random directions that are normalized filter by filter.

References:
    Li et al., 2018, "Visualizing the loss landscape of neural nets", section 4.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

TINY = 1e-12  # smallest norm that is divided by


def filter_normalized(direction: Tensor, weight: Tensor) -> Tensor:
    """Return a direction of a weight's shape (F, ...), each of its F filters with the norm of the weight's filter.

    Biases and the weights of normalization layers, which have one axis, are not moved: their direction is 0.
    """
    if weight.ndim < 2:
        return torch.zeros_like(weight)
    axes = tuple(range(1, weight.ndim))
    norms = direction.square().sum(axes, keepdim=True).sqrt()
    return direction * weight.detach().square().sum(axes, keepdim=True).sqrt() / norms.clamp(min=TINY)


def random_direction(network: nn.Module, normal: Callable[[tuple[int, ...]], Tensor]) -> dict[str, Tensor]:
    """Return a filter-normalized random direction by the name of the weight.

    Args:
        network: The network.
        normal: Returns standard normal numbers of a shape; called for each weight in order.
    """
    return {
        name: filter_normalized(normal(tuple(weight.shape)).to(weight), weight.detach())
        for name, weight in network.named_parameters()
    }


@torch.no_grad()
def losses_along(
    network: nn.Module,
    directions: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    points: Iterable[tuple[float, float]],
    loss_fn: Callable[[], float],
) -> Iterator[float]:
    """Yield the loss with the weights at each point: w + a * d1 + b * d2.

    The weights are restored to the last bit when the iterator ends or is closed.

    Args:
        network: The network, whose weights are changed in place.
        directions: d1 and d2, by the name of the weight.
        points: Pairs of a and b.
        loss_fn: Returns the loss of the network as it is.
    """
    weights = dict(network.named_parameters())
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    first, second = directions
    try:
        for a, b in points:
            for name, weight in weights.items():
                weight.copy_(before[name] + a * first[name] + b * second[name])
            yield loss_fn()
    finally:
        for name, weight in weights.items():
            weight.copy_(before[name])
