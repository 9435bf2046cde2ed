"""ImageNet-pretrained classifiers: from images in [0, 1] to logits, with each model's own preprocessing.

`efficientnet_lite0` (Tan and Le, 2019; 75 % top-1) comes with its weights by pip. `timm:NAME` and `torchvision:NAME`
take theirs from a file, from where they were fetched to, or from where timm or torchvision has put them; nothing is
downloaded here.
"""

import contextlib
import copy
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cvlab import _compat, registry
from cvlab.data import imagenet
from cvlab.errors import ConfigError, DataError
from cvlab.models import weights, zoo
from cvlab.models.names import DEFAULT_MODEL, check_name
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
        name: as in `build`.
        module: from images (N, 3, S, S) in [0, 1] to logits (N, num_classes).
        transform: resizes and crops an image to the model's input.
        classes: their names.
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


@functools.lru_cache(maxsize=1)
def build(
    name: str = DEFAULT_MODEL, weights_file: str | None = None, device: torch.device | str = "cpu"
) -> PretrainedClassifier:
    """Build a pretrained classifier; the last one is cached.

    The global random generator is left as it was: what is drawn afterwards must not depend on the cache.

    Args:
        name: efficientnet_lite0, timm:NAME or torchvision:NAME.
        weights_file: a .pth or .safetensors file; None: the weights that were fetched or cached.
        device: where to put it.

    Returns:
        The classifier, laid out channels_last, which convolutions compute fastest.

    Raises:
        ConfigError: unknown name.
        DataError: the weights are missing, damaged or not of this model.
    """
    check_name(name)
    prefix, _, rest = name.partition(":")
    with torch.random.fork_rng(devices=[]):
        if name == DEFAULT_MODEL:
            model, about = build_lite0(weights_file)
        elif prefix == "timm":
            model, about = _timm(rest, weights_file)
        else:
            model, about = _torchvision(rest, weights_file)
    transform: EvalTransform = about["transform"]
    model = fold_batchnorm(model.eval().requires_grad_(False), transform.size_px)
    wrapped = NormalizedModel(model, about["mean"], about["std"]).eval()
    wrapped = wrapped.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return PretrainedClassifier(name, wrapped, transform, _classes(model, transform.size_px))


def _classes(model: nn.Module, size_px: int) -> tuple[str, ...]:
    count = getattr(model, "num_classes", None)
    if count is None:
        with torch.inference_mode():
            count = model(torch.zeros(1, 3, size_px, size_px)).shape[1]
    return imagenet.labels() if count == imagenet.NUM_CLASSES else tuple(f"class {k}" for k in range(count))


def build_lite0(weights_file: str | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """Build the bundled EfficientNet-Lite0, and return it with its preprocessing.

    Its weights are in the order of timm's, under other names.

    Args:
        weights_file: None: the bundled weights.

    Returns:
        The model, without normalization, and its mean, standard deviation and transform.

    Raises:
        DataError: the weights are damaged or not of this model.
    """
    model = _compat.timm().create_model("tf_efficientnet_lite0")
    path = Path(weights_file) if weights_file else weights.lite0_path()
    expected = model.state_dict()
    state_dict = weights.match_names(weights.read_state_dict(path), expected)
    if state_dict.keys() != expected.keys():
        shapes = [tensor.shape for tensor in expected.values()]
        if [tensor.shape for tensor in state_dict.values()] != shapes:
            raise DataError(f"{path}: not the weights of {DEFAULT_MODEL}", "leave --weights out, or name --model")
        state_dict = dict(zip(expected, state_dict.values(), strict=True))
    model.load_state_dict(state_dict)
    return model, _about_timm({**model.default_cfg, "mean": (0.5,) * 3, "std": (0.5,) * 3})


def _timm(name: str, weights_file: str | None) -> tuple[nn.Module, dict[str, Any]]:
    model = zoo.build_timm(name, num_classes=None)
    about: Mapping[str, Any] = getattr(model, "pretrained_cfg", {})
    _load(model, weights.find_timm(name, about, weights_file))
    return model, _about_timm(about)


def _about_timm(about: Mapping[str, Any]) -> dict[str, Any]:
    size = about["input_size"][-1]
    filter_name = about["interpolation"] if about["interpolation"] in FILTERS else "bicubic"
    resize_px, squash = math.floor(size / about["crop_pct"]), about.get("crop_mode") == "squash"
    transform = EvalTransform(size, resize_px, filter_name, squash)
    return {"mean": tuple(about["mean"]), "std": tuple(about["std"]), "transform": transform}


def _torchvision(name: str, weights_file: str | None) -> tuple[nn.Module, dict[str, Any]]:
    extra = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = zoo.build_torchvision(name, num_classes=imagenet.NUM_CLASSES, **extra)
    published = _compat.torchvision().models.get_model_weights(name).DEFAULT
    if "categories" not in published.meta or len(published.meta["categories"]) != imagenet.NUM_CLASSES:
        raise ConfigError(f"torchvision:{name}: not a classifier of ImageNet's classes", "name another model")
    _load(model, weights.find_torchvision(name, published.url, weights_file))
    preset = published.transforms()
    transform = EvalTransform(preset.crop_size[0], preset.resize_size[0], preset.interpolation.value)
    return model, {"mean": tuple(preset.mean), "std": tuple(preset.std), "transform": transform}


def _load(model: nn.Module, path: Path) -> None:
    """Load weights by name; those of parts that only training has, such as auxiliary heads, are left out."""
    expected = model.state_dict()
    state_dict = weights.match_names(weights.read_state_dict(path), expected)
    missing = [key for key in expected if key not in state_dict and not key.endswith("num_batches_tracked")]
    wrong = [key for key in expected if key in state_dict and state_dict[key].shape != expected[key].shape]
    if missing or wrong:
        what = f"lacks {missing[0]}" if missing else f"{wrong[0]} is {tuple(state_dict[wrong[0]].shape)}"
        more = f" and {len(missing) + len(wrong) - 1} more" if len(missing) + len(wrong) > 1 else ""
        raise DataError(f"{path}: not the weights of this model: {what}{more}", "check --model and --weights")
    with contextlib.suppress(AttributeError):
        model.aux_logits = model.AuxLogits = model.aux1 = model.aux2 = None  # type: ignore[assignment]
    model.load_state_dict({key: value for key, value in state_dict.items() if key in expected}, strict=False)


@torch.no_grad()
def fold_batchnorm(model: nn.Module, size_px: int) -> nn.Module:
    """Fold the batch normalizations of a model into the convolutions before them.

    Both are linear, so the logits stay the same up to rounding, while forward and backward save a pass over the feature
    maps. Which module precedes which is taken from the order of registration, and checked with a random image.

    Args:
        model: in evaluation mode.
        size_px: height and width of its images.

    Returns:
        A folded copy, or the model itself if the logits of the copy differ.
    """
    folded = copy.deepcopy(model)
    for module in list(folded.modules()):
        previous: nn.Module | None = None
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d) and isinstance(previous, nn.Conv2d) and _is_foldable(previous, child):
                _fold(previous, child)
                setattr(module, name, getattr(child, "act", nn.Identity()))  # timm's has its activation inside
            previous = child
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 3, size_px, size_px, generator=generator)
    logits, folded_logits = model(image), folded(image)
    is_same = bool((logits - folded_logits).abs().max() <= FOLDED_TOLERANCE * logits.abs().max())
    return folded if is_same else model


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
