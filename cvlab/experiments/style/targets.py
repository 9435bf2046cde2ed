"""Targets of style transfer: the features of the content photo and the Gram matrices of the style images."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cvlab.data import photo_paths, photos
from cvlab.engine.device import ComputeContext
from cvlab.errors import ConfigError, DataError
from cvlab.experiments.style.config import STYLE_WEIGHT, StyleConfig
from cvlab.experiments.style.inputs import load_image, scaled_size
from cvlab.models import features
from cvlab.models.features import FeatureExtractor, StyleLayers
from cvlab.models.pretrained import PretrainedClassifier
from cvlab.ops import style

MIN_INITIAL_DISTANCE = 0.01  # of a layer, relative to the Gram matrices of the style; limits relative weights
MAX_ASPECT_DIFFERENCE = 0.02  # between a mask and its image, as the logarithm of the ratio of their aspect ratios
FeatureMaps = dict[str, Tensor]  # (C, H, W) by layer


@dataclass(frozen=True)
class StyleRegion:
    """A region of the image and its style.

    Attributes:
        gram_matrices: Target Gram matrices (C, C) by layer.
        masks: Masks (h, w) in [0, 1] of the region by layer; None: the whole image.
        weight: Weight of the region in the style loss.
    """

    gram_matrices: FeatureMaps
    masks: dict[str, Tensor | None]
    weight: float


@dataclass(frozen=True)
class LossTargets:
    """Targets and weights of the losses for an image of one size.

    Attributes:
        content_features: Features of the content photo (C, H, W) at the content layer; None without a photo.
        content_weight: Factor of the content loss.
        regions: Target Gram matrices; a single region if there are no masks.
        style_weights: Factors of the style loss by layer.
        tv_weight: Factor of the total variation.
    """

    content_features: Tensor | None
    content_weight: float
    regions: tuple[StyleRegion, ...]
    style_weights: dict[str, float]
    tv_weight: float

    def style_loss(self, feature_maps: FeatureMaps, layer: str) -> Tensor:
        """Return the unweighted style loss of a layer, summed over all regions."""
        return regional_style_loss(self.regions, feature_maps, layer)


def regional_style_loss(regions: tuple[StyleRegion, ...], feature_maps: FeatureMaps, layer: str) -> Tensor:
    """Return the weighted sum over regions of the squared distance of a layer's Gram matrix from the target."""
    losses = [
        region.weight * style.style_loss(feature_maps[layer], region.gram_matrices[layer], region.masks[layer])
        for region in regions
    ]
    return torch.stack(losses).sum()


def resize_to_tensor(image: Image.Image, size: tuple[int, int], device: torch.device) -> Tensor:
    """Return an image resized to (width, height) as a tensor (3, H, W) in [0, 1]."""
    return photos.to_tensor(image.resize(size, Image.Resampling.BICUBIC)).to(device)


class TargetBuilder:
    """The images of a configuration, and the targets built from them."""

    def __init__(self, config: StyleConfig, model: PretrainedClassifier, ctx: ComputeContext) -> None:
        self.config, self.ctx = config, ctx
        self.layers = _resolve_layers(config, model)
        self.content = load_image(config.content) if config.content is not None else None
        self.styles = [load_image(name) for name in config.styles]
        masked_styles = [self.styles[min(k, len(self.styles) - 1)] for k in range(len(config.style_masks))]
        self.masks = [_load_mask(name, self.content) for name in config.masks]
        self.style_masks = [
            _load_mask(name, image) for name, image in zip(config.style_masks, masked_styles, strict=True)
        ]
        self.features = FeatureExtractor(
            model, [*self.layers.style, *([self.layers.content] if self.content is not None else [])]
        )

    def content_image(self, width: int, height: int) -> Tensor | None:
        """Return the content photo (3, H, W) at a size, or None if there is none."""
        return resize_to_tensor(self.content, (width, height), self.ctx.device) if self.content is not None else None

    def _model_input(self, image: Tensor) -> Tensor:
        """Return the image itself, or its luminance in three channels if `keep_colors` is set."""
        if not self.config.keep_colors:
            return image
        return (image if len(image) == 1 else style.luminance(image)).expand(3, -1, -1)

    def extract_features(self, image: Tensor) -> FeatureMaps:
        """Return the features of an image (3, H, W) or, with `keep_colors`, of a luminance (1, H, W)."""
        with self.ctx.autocast():
            feature_maps = self.features(self._model_input(image))
        return {name: values.float() for name, values in feature_maps.items()}

    @torch.no_grad()
    def build(self, width: int, height: int, scale: float) -> LossTargets:
        """Return the targets for an image of a size; `scale` is that size relative to the final one."""
        config, names = self.config, self.layers.style
        content_image = self.content_image(width, height)
        content_maps = self.extract_features(content_image) if content_image is not None else {}
        regions = self._build_regions(width, height, scale, content_image)
        content_features = content_maps[self.layers.content] if content_maps else None
        style_weights = dict(zip(names, config.style_weights or (STYLE_WEIGHT,) * len(names), strict=True))
        content_weight, tv_weight = config.content_weight, config.tv_weight
        if config.scaling == "relative":
            for name in names:
                norm = sum(region.weight * float(region.gram_matrices[name].square().sum()) for region in regions)
                distance = float(regional_style_loss(regions, content_maps, name)) if content_maps else norm
                style_weights[name] /= max(distance, MIN_INITIAL_DISTANCE * norm, 1e-30)
            if content_features is not None:
                variation = (content_features - content_features.mean((1, 2), keepdim=True)).square().sum()
                content_weight /= max(float(variation), 1e-30)
            tv_weight /= width * height
        style_weights = {name: config.strength * weight for name, weight in style_weights.items()}
        return LossTargets(content_features, content_weight, regions, style_weights, tv_weight)

    def _build_regions(
        self, width: int, height: int, scale: float, content_image: Tensor | None
    ) -> tuple[StyleRegion, ...]:
        """Return the regions; without masks a single one, with the weighted mean of the styles' Gram matrices."""
        config, names = self.config, self.layers.style
        style_maps = self._style_features(scale, content_image)
        if not self.masks:
            mean = {}
            for name in names:
                gram_matrices = [
                    share * style.gram_matrix(maps[name]) for share, maps in zip(config.shares, style_maps, strict=True)
                ]
                mean[name] = torch.stack(gram_matrices).sum(0)
            return (StyleRegion(mean, dict.fromkeys(names), 1.0),)
        weights = config.mix or (1.0,) * len(self.masks)
        image_maps = self.features(torch.zeros(3, height, width, device=self.ctx.device))  # for their sizes
        regions = []
        for k, (mask, weight) in enumerate(zip(self.masks, weights, strict=True)):
            maps = style_maps[min(k, len(style_maps) - 1)]
            style_mask = self.style_masks[k] if self.style_masks else None
            targets = {name: style.gram_matrix(maps[name], _resize_mask(style_mask, maps[name])) for name in names}
            masks = {name: _resize_mask(mask, image_maps[name]) for name in names}
            regions.append(StyleRegion(targets, masks, weight))
        return tuple(regions)

    def _style_features(self, scale: float, content_image: Tensor | None) -> list[FeatureMaps]:
        """Return the features of each style image; with `keep_colors` its luminance is matched to the content's."""
        config = self.config
        size_px = max(1, round((config.style_size or config.size) * scale))
        style_maps = []
        for image in self.styles:
            pixels = resize_to_tensor(image, scaled_size(image, size_px, config.side), self.ctx.device)
            if config.keep_colors and content_image is not None:
                pixels = style.match_mean_std(style.luminance(pixels), style.luminance(content_image))
            style_maps.append(self.extract_features(pixels))
        return style_maps


def _resolve_layers(config: StyleConfig, model: PretrainedClassifier) -> StyleLayers:
    """Return the configured layers, else the defaults of the model; check the number of their weights."""
    if config.style_layers is not None and config.content_layer is not None:
        layers = StyleLayers(config.style_layers, config.content_layer)
    else:
        defaults = features.default_style_layers(model)
        layers = StyleLayers(config.style_layers or defaults.style, config.content_layer or defaults.content)
    if config.style_weights is not None and len(config.style_weights) != len(layers.style):
        raise ConfigError(
            f"{len(config.style_weights)} style_weights for {len(layers.style)} style layers",
            f"the layers are {', '.join(layers.style)}",
        )
    return layers


def _load_mask(name: str, image: Image.Image | None) -> Tensor:
    """Read the mask (1, 1, H, W) in [0, 1] of an image: 1 is inside the region."""
    mask_image = photos.load(photo_paths.find_images([name])[0])
    mask = style.luminance(photos.to_tensor(mask_image))[None]
    if float(mask.max()) == 0:
        raise DataError(f"{name}: the mask is empty", "draw its region in white")
    if image is not None:
        ratio = image.width * mask_image.height / (image.height * mask_image.width)
        if abs(math.log(ratio)) > MAX_ASPECT_DIFFERENCE:
            raise DataError(
                f"{name}: a mask of {mask_image.width} x {mask_image.height} for an image of "
                f"{image.width} x {image.height}",
                "give it the shape of its image",
            )
    return mask


def _resize_mask(mask: Tensor | None, feature_map: Tensor) -> Tensor | None:
    """Return a mask at the resolution of a feature map, by averaging."""
    if mask is None:
        return None
    return F.adaptive_avg_pool2d(mask.to(feature_map.device), (feature_map.shape[1], feature_map.shape[2]))[0, 0]
