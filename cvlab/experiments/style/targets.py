"""What a painted picture is to come near to: a photo's features, the styles' Gram matrices, for regions and scales."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cvlab.data import photos
from cvlab.engine.device import ComputeContext
from cvlab.errors import ConfigError, DataError
from cvlab.experiments.style.config import STYLE_WEIGHT, StyleConfig
from cvlab.experiments.style.sample_painting import sample_painting
from cvlab.models import features
from cvlab.models.features import FeatureExtractor, StyleLayers
from cvlab.models.pretrained import PretrainedClassifier
from cvlab.ops import style

LEAST_SHARE = 0.01  # of the style's own Gram matrices, that the photo's differ from it where weights are relative
Maps = dict[str, Tensor]  # features (C, H, W) by layer


@dataclass(frozen=True)
class Region:
    """A part of the picture with a style of its own: Gram matrices and masks (h, w) or None, by layer; its weight."""

    grams: Maps
    masks: dict[str, Tensor | None]
    weight: float


@dataclass(frozen=True)
class Target:
    """What a picture of one size is to come near to, and what each of the losses is multiplied by."""

    content: Tensor | None
    content_factor: float
    regions: tuple[Region, ...]
    style_factors: dict[str, float]
    tv_factor: float

    def style_loss(self, maps: Maps, name: str) -> Tensor:
        """Return the distance of a layer's Gram matrices from those of all regions."""
        return region_loss(self.regions, maps, name)


def region_loss(regions: tuple[Region, ...], maps: Maps, name: str) -> Tensor:
    """Return the weighted sum over regions of a layer's squared distance from the style."""
    parts = [region.weight * style.style_loss(maps[name], region.grams[name], region.masks[name]) for region in regions]
    return torch.stack(parts).sum()


def open_picture(name: str) -> Image.Image:
    """Read a picture by its name: a file, `sample`, or the painting that comes along. DataError says what is wrong."""
    return sample_painting() if name == photos.SAMPLE_PAINTING else photos.load(photos.find_images([name])[0])


def resized(image: Image.Image, size: tuple[int, int], device: torch.device) -> Tensor:
    """Return a photo of a size (width, height) as (3, H, W) in [0, 1]."""
    return photos.to_tensor(image.resize(size, Image.Resampling.BICUBIC)).to(device)


def fitted(image: Image.Image, size_px: int, side: str) -> tuple[int, int]:
    """Return the width and height of a picture whose longer (or shorter) side is `size_px`."""
    factor = size_px / (max(image.size) if side == "longer" else min(image.size))
    return max(1, round(image.width * factor)), max(1, round(image.height * factor))


class Targets:
    """The pictures of a configuration of the experiment `style`, and the targets that they give."""

    def __init__(self, config: StyleConfig, model: PretrainedClassifier, ctx: ComputeContext) -> None:
        self.config, self.ctx = config, ctx
        self.layers = _layers(config, model)
        self.content = open_picture(config.content) if config.content is not None else None
        self.styles = [open_picture(name) for name in config.styles]
        of_styles = [self.styles[min(k, len(self.styles) - 1)] for k in range(len(config.style_masks))]
        self.masks = [_mask(name, self.content) for name in config.masks]
        self.style_masks = [_mask(name, image) for name, image in zip(config.style_masks, of_styles, strict=True)]
        self.features = FeatureExtractor(
            model, [*self.layers.style, *([self.layers.content] if self.content is not None else [])]
        )

    def photo(self, width: int, height: int) -> Tensor | None:
        """Return the photo at a size, None where there is none."""
        return resized(self.content, (width, height), self.ctx.device) if self.content is not None else None

    def seen(self, picture: Tensor) -> Tensor:
        """Return a picture as the net sees it: grey where colours are kept."""
        if not self.config.keep_colors:
            return picture
        return (picture if len(picture) == 1 else style.luminance(picture)).expand(3, -1, -1)

    def maps(self, picture: Tensor) -> Maps:
        """Return the features of a picture (3, H, W), or (1, H, W) in grey."""
        with self.ctx.autocast():
            found = self.features(self.seen(picture))
        return {name: values.float() for name, values in found.items()}

    @torch.no_grad()
    def at(self, width: int, height: int, share: float) -> Target:
        """Return the target for a picture of a size, `share` of the largest one."""
        config, names = self.config, self.layers.style
        photo = self.photo(width, height)
        found = self.maps(photo) if photo is not None else {}
        regions = self._regions(width, height, share, photo)
        content = found[self.layers.content] if found else None
        style_factors = dict(zip(names, config.style_weights or (STYLE_WEIGHT,) * len(names), strict=True))
        content_factor, tv_factor = config.content_weight, config.tv_weight
        if config.scaling == "relative":
            for name in names:
                own = sum(region.weight * float(region.grams[name].square().sum()) for region in regions)
                apart = float(region_loss(regions, found, name)) if found else own
                style_factors[name] /= max(apart, LEAST_SHARE * own, 1e-30)
            if content is not None:
                varied = (content - content.mean((1, 2), keepdim=True)).square().sum()
                content_factor /= max(float(varied), 1e-30)
            tv_factor /= width * height
        style_factors = {name: config.strength * factor for name, factor in style_factors.items()}
        return Target(content, content_factor, regions, style_factors, tv_factor)

    def _regions(self, width: int, height: int, share: float, photo: Tensor | None) -> tuple[Region, ...]:
        """Return the regions; without masks one, of the weighted mean of the styles' Gram matrices."""
        config, names = self.config, self.layers.style
        size_px = max(1, round((config.style_size or config.size) * share))
        mix = config.mix or (1.0,) * max(len(self.styles), len(self.masks))
        found = []
        for image in self.styles:
            picture = resized(image, fitted(image, size_px, config.side), self.ctx.device)
            if config.keep_colors and photo is not None:
                picture = style.match_mean_std(style.luminance(picture), style.luminance(photo))
            found.append(self.maps(picture))
        if not self.masks:
            shares = [weight / sum(mix) for weight in mix]
            mean = {}
            for name in names:
                grams = [part * style.gram_matrix(maps[name]) for part, maps in zip(shares, found, strict=True)]
                mean[name] = torch.stack(grams).sum(0)
            return (Region(mean, dict.fromkeys(names), 1.0),)
        blank = torch.zeros(3, height, width, device=self.ctx.device)
        sizes = self.features(blank)
        regions = []
        for k, (mask, weight) in enumerate(zip(self.masks, mix, strict=True)):
            maps = found[min(k, len(found) - 1)]
            theirs = self.style_masks[k] if self.style_masks else None
            wanted = {name: style.gram_matrix(maps[name], _fitted_mask(theirs, maps[name])) for name in names}
            regions.append(Region(wanted, {name: _fitted_mask(mask, sizes[name]) for name in names}, weight))
        return tuple(regions)


def _layers(config: StyleConfig, model: PretrainedClassifier) -> StyleLayers:
    """Return the layers that a configuration names, else those of the net's family; checked against the weights."""
    if config.style_layers is not None and config.content_layer is not None:
        layers = StyleLayers(config.style_layers, config.content_layer)
    else:
        usual = features.default_style_layers(model)
        layers = StyleLayers(config.style_layers or usual.style, config.content_layer or usual.content)
    if config.style_weights is not None and len(config.style_weights) != len(layers.style):
        raise ConfigError(
            f"{len(config.style_weights)} style_weights for {len(layers.style)} style layers",
            f"the layers are {', '.join(layers.style)}",
        )
    return layers


def _mask(name: str, image: Image.Image | None) -> Tensor:
    """Read a mask (1, 1, H, W) in [0, 1] that belongs to a picture: white is inside."""
    drawn = photos.load(photos.find_images([name])[0])
    mask = style.luminance(photos.to_tensor(drawn))[None]
    if float(mask.max()) == 0:
        raise DataError(f"{name}: the mask is empty", "paint its region white")
    if image is not None and abs(math.log(image.width * drawn.height / (image.height * drawn.width))) > 0.02:
        raise DataError(
            f"{name}: a mask of {drawn.width} x {drawn.height} for a picture of {image.width} x {image.height}",
            "give it the shape of its picture",
        )
    return mask


def _fitted_mask(mask: Tensor | None, maps: Tensor) -> Tensor | None:
    if mask is None:
        return None
    return F.adaptive_avg_pool2d(mask.to(maps.device), (maps.shape[1], maps.shape[2]))[0, 0]
