"""Nets that know ImageNet: photos in [0, 1] in, scores out, with the preprocessing that each was trained with.

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
from cvlab.ops.resample import EvalTransform

DEFAULT_MODEL = "efficientnet_lite0"
PREFIXES = ("timm", "torchvision")
FILTERS = ("bilinear", "bicubic")
FOLDED_TOLERANCE = 1e-3  # of the largest score; rounding gives 1e-5, another order of the parts much more


class NormalizedModel(nn.Module):
    """A net with its normalization inside: takes photos (N, 3, H, W) in [0, 1]."""

    def __init__(self, model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.model = model
        self.scale: Tensor
        self.shift: Tensor
        self.register_buffer("scale", 1 / torch.tensor(std).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("shift", (-torch.tensor(mean) / torch.tensor(std)).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the scores (N, classes) of photos (N, 3, H, W) in [0, 1]."""
        logits: Tensor = self.model(self.normalize(images))
        return logits

    def normalize(self, images: Tensor) -> Tensor:
        """Return images (N, 3, H, W) in [0, 1] as the model was trained with them."""
        return images * self.scale + self.shift


@dataclass(frozen=True)
class PretrainedClassifier:
    """A net that is only used: frozen, in evaluation mode, batch normalization folded into the convolutions."""

    name: str
    module: NormalizedModel
    transform: EvalTransform
    classes: tuple[str, ...]

    def probabilities(self, images: Tensor) -> Tensor:
        """Return the softmax over the classes (N, classes) of photos (N, 3, S, S) in [0, 1], in float32."""
        scores: Tensor = self.module(images.contiguous(memory_format=torch.channels_last))
        return scores.float().softmax(1)

    def class_score(self, index: int, probability: float) -> dict[str, Any]:
        """Return what a result says of a class."""
        return {"label": self.classes[index], "class_index": index, "score": probability}

    def class_index(self, name: str) -> int:
        """Return a class by its name or number; ConfigError where there is none such."""
        if self.classes == imagenet.labels():
            return imagenet.resolve(name)
        if name.isdecimal() and int(name) < len(self.classes):
            return int(name)
        raise ConfigError(f"no class {name!r}", f"{self.name} has classes 0 to {len(self.classes) - 1}, by number")


def check_name(name: str) -> None:
    """Raise ConfigError unless a name has one of the forms that `build` takes."""
    prefix, colon, rest = name.partition(":")
    if name != DEFAULT_MODEL and not (colon and prefix in PREFIXES and rest):
        raise registry.unknown_name_error("model", name, [DEFAULT_MODEL, *(f"{prefix}:NAME" for prefix in PREFIXES)])


@functools.lru_cache(maxsize=1)
def build(
    name: str = DEFAULT_MODEL, weights_file: str | None = None, device: torch.device | str = "cpu"
) -> PretrainedClassifier:
    """Build a net with its weights. ConfigError for a name that is not known, DataError for weights that are not there.

    It is laid out channels_last, which convolutions compute fastest. The global generator is left as it was: what is
    drawn after it must not depend on whether this net had been built before.
    """
    check_name(name)
    prefix, _, rest = name.partition(":")
    with torch.random.fork_rng(devices=[]):
        if name == DEFAULT_MODEL:
            net, about = build_lite0(weights_file)
        elif prefix == "timm":
            net, about = _timm(rest, weights_file)
        else:
            net, about = _torchvision(rest, weights_file)
    frame: EvalTransform = about["frame"]
    net = fold_batchnorm(net.eval().requires_grad_(False), frame.size_px)
    wrapped = NormalizedModel(net, about["mean"], about["std"]).eval()
    wrapped = wrapped.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return PretrainedClassifier(name, wrapped, frame, _classes(net, frame.size_px))


def _classes(net: nn.Module, size_px: int) -> tuple[str, ...]:
    count = getattr(net, "num_classes", None)
    if count is None:
        with torch.inference_mode():
            count = net(torch.zeros(1, 3, size_px, size_px)).shape[1]
    return imagenet.labels() if count == imagenet.NUM_CLASSES else tuple(f"class {k}" for k in range(count))


def build_lite0(weights_file: str | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """Build the net that comes along, as it comes, and what its photos are prepared by.

    Its weights lie in the order of timm's, under other names.
    """
    net = _compat.timm().create_model("tf_efficientnet_lite0")
    path = Path(weights_file) if weights_file else weights.lite0_path()
    given = weights.read_state_dict(path)
    own = net.state_dict()
    if given.keys() != own.keys():
        shapes = [tensor.shape for tensor in own.values()]
        if [tensor.shape for tensor in given.values()] != shapes:
            raise DataError(f"{path}: not the weights of {DEFAULT_MODEL}", "leave --weights out, or name --model")
        given = dict(zip(own, given.values(), strict=True))
    net.load_state_dict(given)
    return net, _about_timm({**net.default_cfg, "mean": (0.5,) * 3, "std": (0.5,) * 3})


def _timm(name: str, weights_file: str | None) -> tuple[nn.Module, dict[str, Any]]:
    net = zoo.build_timm(name, num_classes=None)
    about: Mapping[str, Any] = getattr(net, "pretrained_cfg", {})
    _load(net, weights.find_timm(name, about, weights_file))
    return net, _about_timm(about)


def _about_timm(about: Mapping[str, Any]) -> dict[str, Any]:
    size = about["input_size"][-1]
    filter_name = about["interpolation"] if about["interpolation"] in FILTERS else "bicubic"
    frame = EvalTransform(size, math.floor(size / about["crop_pct"]), filter_name, about.get("crop_mode") == "squash")
    return {"mean": tuple(about["mean"]), "std": tuple(about["std"]), "frame": frame}


def _torchvision(name: str, weights_file: str | None) -> tuple[nn.Module, dict[str, Any]]:
    extra = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    net = zoo.build_torchvision(name, num_classes=imagenet.NUM_CLASSES, **extra)
    published = _compat.torchvision().models.get_model_weights(name).DEFAULT
    if "categories" not in published.meta or len(published.meta["categories"]) != imagenet.NUM_CLASSES:
        raise ConfigError(f"torchvision:{name}: not a classifier of ImageNet's classes", "name another model")
    _load(net, weights.find_torchvision(name, published.url, weights_file))
    transform = published.transforms()
    frame = EvalTransform(transform.crop_size[0], transform.resize_size[0], transform.interpolation.value)
    return net, {"mean": tuple(transform.mean), "std": tuple(transform.std), "frame": frame}


def _load(net: nn.Module, path: Path) -> None:
    """Load weights by name; those of parts that only training has, such as auxiliary heads, are left out."""
    given = weights.read_state_dict(path)
    own = net.state_dict()
    missing = [key for key in own if key not in given and not key.endswith("num_batches_tracked")]
    wrong = [key for key in own if key in given and given[key].shape != own[key].shape]
    if missing or wrong:
        what = f"lacks {missing[0]}" if missing else f"{wrong[0]} is {tuple(given[wrong[0]].shape)}"
        more = f" and {len(missing) + len(wrong) - 1} more" if len(missing) + len(wrong) > 1 else ""
        raise DataError(f"{path}: not the weights of this model: {what}{more}", "check --model and --weights")
    with contextlib.suppress(AttributeError):
        net.aux_logits = net.AuxLogits = net.aux1 = net.aux2 = None  # type: ignore[assignment]
    net.load_state_dict({key: value for key, value in given.items() if key in own}, strict=False)


@torch.no_grad()
def fold_batchnorm(net: nn.Module, size_px: int) -> nn.Module:
    """Return a net in evaluation mode with its batch normalizations folded into the convolutions before them.

    Both are linear, so the scores stay what they were up to rounding, while neither pass has to go over the feature
    maps once more. What comes before what is taken from the order in which the parts were registered, and checked by
    the scores of a random photo: where they differ, the net is returned as it was.
    """
    made = copy.deepcopy(net)
    for module in list(made.modules()):
        before: nn.Module | None = None
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d) and isinstance(before, nn.Conv2d) and _fits(before, child):
                _fold(before, child)
                setattr(module, name, getattr(child, "act", nn.Identity()))  # timm's has its activation inside
            before = child
    generator = torch.Generator().manual_seed(0)
    photo = torch.rand(1, 3, size_px, size_px, generator=generator)
    scores, other = net(photo), made(photo)
    is_same = bool((scores - other).abs().max() <= FOLDED_TOLERANCE * scores.abs().max())
    return made if is_same else net


def _fits(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> bool:
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
