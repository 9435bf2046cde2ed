"""ImageNet-pretrained classifiers: from images in [0, 1] to logits, with each model's own preprocessing.

The weights of `efficientnet_lite0` and `efficientnet_lite2` (Tan and Le, 2019) come by pip. `timm:NAME` and
`torchvision:NAME` take theirs from a file, from where they were fetched to, or from where timm or torchvision has put
them; nothing is downloaded here.
"""

import contextlib
import copy
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cvlab import registry
from cvlab.data import imagenet, photos
from cvlab.errors import ConfigError, DataError
from cvlab.models import nanodet, weights, zoo
from cvlab.models.efficientnet import VARIANTS, EfficientNetLite
from cvlab.models.names import AUTO, BY_PIP, DEFAULT_MODEL, NANODET, check_name
from cvlab.ops.resample import FILTERS, EvalTransform

MAX_SHOWN_CLASSES = 12  # in an error message
FOLDED_TOLERANCE = 1e-3  # of the largest logit; rounding gives 1e-5, a wrong order of the modules much more


class NormalizedModel(nn.Module):
    """A model with its normalization: takes images (N, C, H, W) in [0, 1]."""

    def __init__(self, model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.model = model
        self.scale: Tensor
        self.shift: Tensor
        self.register_buffer("scale", 1 / torch.tensor(std).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("shift", (-torch.tensor(mean) / torch.tensor(std)).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (N, num_classes) of images (N, C, H, W) in [0, 1]."""
        logits: Tensor = self.model(self.normalize(images))
        return logits

    def normalize(self, images: Tensor) -> Tensor:
        """Return images (N, C, H, W) in [0, 1], normalized as in the model's training."""
        return images * self.scale + self.shift


@dataclass(frozen=True)
class PretrainedClassifier:
    """A pretrained classifier: frozen, in evaluation mode, batch normalization folded into the convolutions.

    Attributes:
        name: As in `build`.
        module: Maps images (N, 3, S, S) in [0, 1] to logits (N, num_classes).
        transform: Resizes and crops an image to the model's input.
        classes: Their names.
    """

    name: str
    module: NormalizedModel
    transform: EvalTransform
    classes: tuple[str, ...]

    def probabilities(self, images: Tensor) -> Tensor:
        """Return the softmax (N, num_classes), float32, of images (N, 3, S, S) in [0, 1].

        Raises:
            ConfigError: the model has no classifier.
        """
        self.require_classes()
        logits: Tensor = self.module(images.contiguous(memory_format=torch.channels_last))
        return logits.float().softmax(1)

    @torch.inference_mode()
    def top_classes(self, images: Sequence[Image.Image], count: int) -> list[dict[str, Any]]:
        """Return for each RGB photo its most likely class, and the `count` most likely ones as `top`."""
        batch = torch.stack([photos.to_tensor(self.transform(image)) for image in images])
        probabilities = self.probabilities(batch.to(self.module.scale.device))
        values, indices = probabilities.topk(min(count, probabilities.shape[1]))
        rows = []
        for scores, classes in zip(values.tolist(), indices.tolist(), strict=True):
            top = [self.class_score(k, score) for k, score in zip(classes, scores, strict=True)]
            rows.append({**top[0], "top": top})
        return rows

    def mean_and_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return the mean and standard deviation per channel by which images in [0, 1] are normalized."""
        std = 1 / self.module.scale.double()
        mean = -self.module.shift.double() * std
        return tuple(mean.flatten().tolist()), tuple(std.flatten().tolist())

    def require_classes(self) -> None:
        """Raise ConfigError if the model has no classifier, as a backbone that is trained without labels."""
        if not self.classes:
            raise ConfigError(
                f"model {self.name}: has no classifier, its outputs are features",
                "name a model that classifies; as a backbone of detectors and captioners it needs none",
            )

    def class_score(self, index: int, probability: float) -> dict[str, Any]:
        """Return the fields of a result that describe a class and its probability in [0, 1]."""
        return {"label": self.classes[index], "class_index": index, "score": probability}

    def class_index(self, name: str) -> int:
        """Return the index of a class, given by name or number. Raise ConfigError if there is no such class."""
        self.require_classes()
        if self.classes == imagenet.labels():
            return imagenet.resolve(name)
        by_name = {label.casefold(): index for index, label in enumerate(self.classes)}
        if name.casefold() in by_name:
            return by_name[name.casefold()]
        if name.isdecimal() and int(name) < len(self.classes):
            return int(name)
        close = registry.closest_match(name, self.classes)
        known = f"{self.name} has {len(self.classes)} classes: {', '.join(self.classes[:MAX_SHOWN_CLASSES])}"
        raise ConfigError(f"no class {name!r}", f"did you mean {close!r}?" if close else known)


class _WithoutInit(TorchFunctionMode):
    """Skips the random initialization of layers whose weights are loaded afterwards."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function of torch; those of `torch.nn.init` return their tensor as it is."""
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


@functools.lru_cache(maxsize=1)
def build(
    name: str = DEFAULT_MODEL, weights_file: str | None = None, device: torch.device | str = "cpu"
) -> PretrainedClassifier:
    """Build a pretrained classifier; the last one is cached.

    The global random generator is left as it was: what is drawn afterwards must not depend on the cache.

    Args:
        name: efficientnet_lite0, efficientnet_lite2, nanodet_g, timm:NAME or torchvision:NAME.
        weights_file: A .pth or .safetensors file; None or `auto`: the weights that were fetched or cached.
        device: Where to put it.

    Returns:
        The classifier, laid out channels_last, which convolutions compute fastest.

    Raises:
        ConfigError: unknown name.
        DataError: the weights are missing, damaged or not of this model.
    """
    check_name(name)
    prefix, _, rest = name.partition(":")
    with torch.random.fork_rng(devices=[]), _WithoutInit():
        if name in BY_PIP:
            model: nn.Module = EfficientNetLite(name)
        elif name == NANODET:
            model = nanodet.CspBackbone()
        elif prefix == "timm":
            model = zoo.build_timm(rest, num_classes=None)
        else:
            extra = {"init_weights": False} if rest in ("googlenet", "inception_v3") else {}
            model = zoo.build_torchvision(rest, num_classes=imagenet.NUM_CLASSES, **extra)
    about = preprocessing(name)
    load_weights(model, name, weights_file)
    transform = about.transform
    model.eval().requires_grad_(False)
    if name in BY_PIP or name == NANODET:  # whose modules are registered in the order in which they are called
        _fold_in_place(model)
    else:
        model = fold_batchnorm(model, transform.size_px)
    wrapped = NormalizedModel(model, about.mean, about.std).eval()
    wrapped = wrapped.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return PretrainedClassifier(name, wrapped, transform, _classes(model, transform.size_px))


def _classes(model: nn.Module, size_px: int) -> tuple[str, ...]:
    count = getattr(model, "num_classes", None)
    if count is None:
        with torch.inference_mode():
            count = model(torch.zeros(1, 3, size_px, size_px)).shape[1]
    return imagenet.labels() if count == imagenet.NUM_CLASSES else tuple(f"class {k}" for k in range(count))


@dataclass(frozen=True)
class Preprocessing:
    """How a pretrained model takes images: the transform, then `(x - mean) / std` per channel of images in [0, 1]."""

    transform: EvalTransform
    mean: tuple[float, ...]
    std: tuple[float, ...]


def preprocessing(name: str) -> Preprocessing:
    """Return how a pretrained model takes images.

    Args:
        name: As in `build`.

    Raises:
        ConfigError: Unknown name, or a model of torchvision that is no classifier of ImageNet's classes.
    """
    prefix, _, rest = name.partition(":")
    if name in BY_PIP:
        variant = VARIANTS[name]
        transform = EvalTransform(variant.size_px, math.floor(variant.size_px / variant.crop_fraction), "bicubic")
        return Preprocessing(transform, (0.5,) * 3, (0.5,) * 3)
    if name == NANODET:
        transform = EvalTransform(nanodet.SIZE_PX, nanodet.SIZE_PX, "bilinear", squash=True)
        return Preprocessing(transform, nanodet.MEAN, nanodet.STD)
    if prefix == "timm":
        about = weights.timm_config(rest)
        size = about["input_size"][-1]
        filter_name = about["interpolation"] if about["interpolation"] in FILTERS else "bicubic"
        resize_px, squash = math.floor(size / about["crop_pct"]), about.get("crop_mode") == "squash"
        transform = EvalTransform(size, resize_px, filter_name, squash)
        return Preprocessing(transform, tuple(about["mean"]), tuple(about["std"]))
    published = weights.torchvision_weights(rest)
    if "categories" not in published.meta or len(published.meta["categories"]) != imagenet.NUM_CLASSES:
        raise ConfigError(f"{name}: not a classifier of ImageNet's classes", "name another model")
    preset = published.transforms()
    transform = EvalTransform(preset.crop_size[0], preset.resize_size[0], preset.interpolation.value)
    return Preprocessing(transform, tuple(preset.mean), tuple(preset.std))


def load_weights(model: nn.Module, name: str, file: str | None = None, skip: Sequence[str] = ()) -> None:
    """Load pretrained weights by name; those of parts that only training has, such as auxiliary heads, are left out.

    Args:
        model: The model.
        name: Its name, as in `build`.
        file: A .pth or .safetensors file; None or `auto`: the weights that were fetched or cached.
        skip: Layers that keep their weights, such as a classifier of other classes.

    Raises:
        DataError: The weights are missing, damaged or not of this model.
    """
    prefix, _, rest = name.partition(":")
    if name in BY_PIP:
        path = Path(file) if file and file != AUTO else weights.path_by_pip(name)
    elif name == NANODET:
        path = Path(file) if file and file != AUTO else nanodet.BUNDLED_WEIGHTS
    elif prefix == "timm":
        path = weights.find_timm(rest, weights.timm_config(rest), file)
    else:
        path = weights.find_torchvision(rest, weights.torchvision_weights(rest).url, file)
    expected = model.state_dict()
    state_dict = weights.match_names(weights.read_state_dict(path), expected)
    if name in BY_PIP and len(state_dict) == len(expected):  # in the order of timm's, under other names
        state_dict = dict(zip(expected, state_dict.values(), strict=True))
    needed = [key for key in expected if not key.startswith(tuple(f"{layer}." for layer in skip))]
    missing = [key for key in needed if key not in state_dict and not key.endswith("num_batches_tracked")]
    wrong = [key for key in needed if key in state_dict and state_dict[key].shape != expected[key].shape]
    if missing or wrong:
        what = f"lacks {missing[0]}" if missing else f"{wrong[0]} is {tuple(state_dict[wrong[0]].shape)}"
        more = f" and {len(missing) + len(wrong) - 1} more" if len(missing) + len(wrong) > 1 else ""
        raise DataError(f"{path}: not the weights of {name}: {what}{more}", "check the name of the model and the file")
    with contextlib.suppress(AttributeError):
        model.aux_logits = model.AuxLogits = model.aux1 = model.aux2 = None  # type: ignore[assignment]
    model.load_state_dict({key: state_dict[key] for key in needed if key in state_dict}, strict=False)


@torch.no_grad()
def fold_batchnorm(model: nn.Module, size_px: int) -> nn.Module:
    """Fold the batch normalizations of a model into the convolutions before them.

    Both are linear, so the logits stay the same up to rounding, while forward and backward save a pass over the feature
    maps. Which module precedes which is taken from the order of registration, and checked with a random image.

    Args:
        model: In evaluation mode.
        size_px: Height and width of its images.

    Returns:
        A folded copy, or the model itself if the logits of the copy differ.
    """
    folded = copy.deepcopy(model)
    _fold_in_place(folded)
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 3, size_px, size_px, generator=generator)
    logits, folded_logits = model(image), folded(image)
    is_same = bool((logits - folded_logits).abs().max() <= FOLDED_TOLERANCE * logits.abs().max())
    return folded if is_same else model


@torch.no_grad()
def _fold_in_place(model: nn.Module) -> None:
    """Fold each batch normalization that is registered right after a convolution."""
    for module in list(model.modules()):
        previous: nn.Module | None = None
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d) and isinstance(previous, nn.Conv2d) and _is_foldable(previous, child):
                _fold(previous, child)
                setattr(module, name, getattr(child, "act", nn.Identity()))  # timm's has its activation inside
            previous = child


def _is_foldable(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> bool:
    return conv.out_channels == norm.num_features and norm.running_var is not None


def _fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    """Put `norm(conv(x))` into the weights of `conv`."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = torch.rsqrt(norm.running_var + norm.eps)
    scale = scale if norm.weight is None else scale * norm.weight
    shift = -norm.running_mean if conv.bias is None else conv.bias - norm.running_mean
    bias = shift * scale if norm.bias is None else shift * scale + norm.bias
    conv.weight.mul_(scale.view(-1, 1, 1, 1))
    conv.bias = nn.Parameter(bias, requires_grad=False)
