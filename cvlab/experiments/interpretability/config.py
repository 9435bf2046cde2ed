"""Configurations of saliency maps, class visualization, feature inversion, DeepDream and looking into networks."""

import importlib.util
import os
import re
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Gt, Le
from pydantic import Field, field_validator, model_validator

from cvlab.config import schema
from cvlab.data import photo_paths
from cvlab.experiments.common import photo_config
from cvlab.experiments.common.photo_config import ClassName, ModelName, PhotoConfig, PretrainedConfig
from cvlab.experiments.common.run_classifier import is_run_of_classifier

if TYPE_CHECKING:
    from cvlab.engine.device import ComputeContext
    from cvlab.models.pretrained import PretrainedClassifier

SaliencyMethod = Literal[
    "gradient",
    "smoothgrad",
    "integrated_gradients",
    "gradcam",
    "layercam",
    "scorecam",
    "occlusion",
    "guided_backprop",
    "shapley",
    "deeplift",
    "lime",
    "rollout",
]
MAX_PICTURES = 64  # of a class visualization; all of them are one batch
CAPTUM_METHODS = ("occlusion", "guided_backprop", "shapley", "deeplift", "lime")


def has_captum() -> bool:
    """Whether the package that computes `CAPTUM_METHODS` is installed."""
    return importlib.util.find_spec("captum") is not None


def split_layer(text: str) -> tuple[str, int | None]:
    """Return the name of a layer and the channel, None for the whole layer, of LAYER or LAYER:CHANNEL."""
    match = re.fullmatch(r"([^:]+)(?::([0-9]{1,6}))?", text)
    if match is None:
        raise ValueError(f"{text!r} is neither a layer, such as blocks.4, nor a channel, such as blocks.4:17")
    return match[1], int(match[2]) if match[2] else None


def split_channels(text: str) -> tuple[str, tuple[int, ...]]:
    """Return the name of a layer and the channels, each once, of LAYER:CHANNELS, such as `blocks.4:0-3,17`."""
    layer, _, numbers = text.rpartition(":")
    parts = [re.fullmatch(r"([0-9]{1,6})(?:-([0-9]{1,6}))?", part.strip()) for part in numbers.split(",")]
    matches = [match for match in parts if match is not None]
    if not layer or len(matches) < len(parts):
        raise ValueError(f"{text!r} names no channels: blocks.4:17 is one of a layer, blocks.4:0-15 are 16 of them")
    limits = [(int(match[1]), int(match[2] or match[1])) for match in matches]
    if any(first > last or last - first >= MAX_PICTURES for first, last in limits):
        raise ValueError(f"{text!r}: a range of channels goes up, and has at most {MAX_PICTURES}")
    return layer, tuple(dict.fromkeys(channel for first, last in limits for channel in range(first, last + 1)))


class ClassVisualizationConfig(PretrainedConfig):
    """Configuration of class visualization: the classes or channels, the parametrization, the regularization."""

    targets: tuple[ClassName, ...] = Field(("gorilla",), description="classes to visualize, one image each")
    channel: str | None = Field(
        None,
        description="instead of `targets`, channels of a layer to visualize: `blocks.4:17`, `blocks.4:0-15`",
    )
    diversity: Annotated[schema.PositiveInt, Le(16)] = Field(
        1, description="number of images of each target, which are made to differ"
    )
    diversity_weight: schema.NonNegativeFloat = Field(
        40.0, description="diversity: weight of the similarity of an image to the others of its target"
    )
    init: Literal["noise", "image"] = Field("noise", description="start from noise or from the photo in `images`")
    images: tuple[str, ...] = Field((), description="with init: image, the photo to start from")
    parametrization: Literal["fourier", "pixels"] = Field(
        "fourier", description="what is optimized: decorrelated Fourier coefficients, or the pixels"
    )
    steps: Annotated[schema.PositiveInt, Le(100_000)] = Field(384, description="optimization steps")
    lr: schema.PositiveFloat = Field(0.02, description="fourier: learning rate of Adam; pixels: L2 norm of a step")
    octaves: Annotated[schema.PositiveInt, Le(8)] = Field(
        1, description="fourier: number of frequency bands, added from coarse to fine"
    )
    l2_weight: schema.NonNegativeFloat = Field(1e-4, description="weight of the squared distance from mid-gray")
    tv_weight: schema.NonNegativeFloat = Field(
        0.3, description="weight of the total variation (squared differences of neighboring pixels)"
    )
    saturation_weight: schema.NonNegativeFloat = Field(
        0.0, description="weight of the loss of gray regions: 1 for an image without color"
    )
    saturation: Annotated[schema.PositiveFloat, Le(0.5)] = Field(
        0.12, description="distance from gray, as the length of (Cb, Cr), below which a region counts as gray"
    )
    jitter_px: schema.NonNegativeInt = Field(0, description="roll by up to N pixels before each step")
    rotate_degrees: Annotated[schema.NonNegativeFloat, Le(180)] = Field(30.0, description="rotate by up to N degrees")
    zoom: schema.FractionBelowOne = Field(0.4, description="scale by a factor of 1 - zoom to 1 + zoom")
    shift: schema.FractionBelowOne = Field(0.2, description="translate by up to this fraction of the side")
    padding: Literal["reflection", "random"] = Field(
        "reflection",
        description="around the moved image: its reflection, or a random color, which keeps objects within the border",
    )
    blur: schema.NonNegativeFloat = Field(
        3.0, description="random Gaussian blur, its standard deviation from 0.3 to 0.3 + this, in pixels"
    )
    gray: schema.Fraction = Field(1.0, description="desaturate by up to this fraction")
    contrast: schema.Fraction = Field(0.6, description="reduce the contrast by up to this fraction")
    blur_every: schema.NonNegativeInt = Field(0, description="pixels: blur the image every N steps; 0: never")
    blur_sigma: schema.PositiveFloat = Field(0.5, description="pixels: standard deviation of that blur, in pixels")
    frames: Annotated[schema.PositiveInt, Le(200)] = Field(12, description="number of intermediate images to save")
    second_model: ModelName | None = Field(
        None, description="a second model with the same classes, or a run, to evaluate the images with"
    )
    second_weights: str | None = Field(None, description="file with its weights")

    @field_validator("channel")
    @classmethod
    def _check_channel(cls, channel: str | None) -> str | None:
        if channel is not None:
            split_channels(channel)
        return channel

    @field_validator("images")
    @classmethod
    def _absolute_images(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return photo_config.absolute_image_paths(names) if names else names

    @model_validator(mode="after")
    def _check(self) -> "ClassVisualizationConfig":
        if self.octaves > 1 and self.parametrization == "pixels":
            raise ValueError("octaves requires parametrization: fourier")
        if self.blur_every and self.parametrization == "fourier":
            raise ValueError("blur_every requires parametrization: pixels")
        if self.init == "image" and len(self.images) != 1:
            raise ValueError(f"init: image starts from exactly one photo, {len(self.images)} are named")
        if self.channel is None and not self.targets:
            raise ValueError("targets: give at least one class")
        if self.channel is not None and self.targets:
            raise ValueError("channel is visualized instead of classes: targets=[]")
        if self.channel is not None and self.second_model is not None:
            raise ValueError("second_model evaluates images of classes, not of a channel")
        if self.num_pictures > MAX_PICTURES:
            raise ValueError(f"{self.num_pictures} images: at most {MAX_PICTURES} are optimized together")
        return self

    @property
    def num_pictures(self) -> int:
        """Number of images."""
        num_targets = len(self.targets) if self.channel is None else len(split_channels(self.channel)[1])
        return num_targets * self.diversity


class FeatureInversionConfig(PretrainedConfig):
    """Configuration of feature inversion."""

    image: str = Field(photo_paths.SAMPLE, description="the photo to reconstruct")
    layers: tuple[str, ...] = Field(
        tuple(f"blocks.{k}" for k in range(7)), description="names of modules, from shallow to deep"
    )
    steps: Annotated[schema.PositiveInt, Le(100_000)] = Field(400, description="optimization steps")
    lr: schema.PositiveFloat = Field(0.05, description="learning rate of Adam")
    content_weight: schema.NonNegativeFloat = Field(
        1000.0, description="loss of an image that matches only the channel means of a layer"
    )
    tv_weight: schema.NonNegativeFloat = Field(
        300.0, description="weight of the total variation (mean squared difference of neighboring pixels)"
    )
    preview_every: schema.PositiveInt = Field(50, description="steps between previews")

    @field_validator("image")
    @classmethod
    def _absolute_image(cls, name: str) -> str:
        return photo_config.absolute_image_paths((name,))[0]

    @field_validator("layers")
    @classmethod
    def _check_layers(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if not names or len(set(names)) != len(names):
            raise ValueError("name at least one layer, and each once")
        return names


class SaliencyConfig(PhotoConfig):
    """Configuration of saliency maps: the photos, the method, the class to explain."""

    method: SaliencyMethod = Field("gradient", description="how the map is computed")
    target: ClassName | None = Field(None, description="class to explain; null: the predicted class")
    objective: Literal["score", "loss"] = Field(
        "score", description="explain the logit of the class or its cross-entropy loss"
    )
    samples: schema.PositiveInt = Field(
        25,
        description="smoothgrad: number of noisy copies; integrated_gradients: number of steps; shapley: number of "
        "random orders; lime: number of random images for each square",
    )
    noise: schema.PositiveFloat = Field(
        0.15, description="smoothgrad: standard deviation of the noise, as a fraction of the photo's value range"
    )
    window: Annotated[schema.PositiveFloat, Le(1)] = Field(
        0.14,
        description="occlusion, shapley, lime: side of a covered square, as a fraction of that of the model's input",
    )
    compare: bool = Field(False, description="also draw the maps of all methods on one sheet, and score them")
    curve_steps: Annotated[schema.PositiveInt, Le(1000)] = Field(
        28, description="compare: number of steps in which the pixels are inserted and deleted"
    )
    randomized: schema.Fraction = Field(
        0.25,
        description="compare: fraction of the layers, the last ones, that are randomized to see whether a map depends "
        "on them; 0: do not, which takes half the time",
    )

    @model_validator(mode="after")
    def _check_objective(self) -> "SaliencyConfig":
        if self.method == "deeplift" and self.objective == "loss":
            raise ValueError("method: deeplift explains the score of the class, not its loss")
        return self


class DreamConfig(PhotoConfig):
    """Configuration of DeepDream: the photos, the layer, the octaves."""

    layer: str | None = Field(
        None,
        description="layer whose response is maximized, such as `blocks.4`, or one channel, `blocks.4:17`; "
        "null: the last layer of stride 16",
    )
    size: Annotated[schema.PositiveInt, Ge(16), Le(2048)] = Field(
        768, description="longer side of the result in pixels, at most; photos are not enlarged"
    )
    octaves: Annotated[schema.PositiveInt, Le(12)] = Field(4, description="number of image sizes, from coarse to fine")
    octave_scale: Annotated[float, Gt(1), Le(4)] = Field(1.4, description="ratio of the sizes of two octaves")
    steps: Annotated[schema.PositiveInt, Le(1000)] = Field(10, description="steps of gradient ascent in each octave")
    lr: schema.PositiveFloat = Field(0.01, description="mean change of a pixel value, in [0, 1], in a step")
    jitter_px: schema.NonNegativeInt = Field(32, description="roll by up to N pixels before each step")
    smoothing: Annotated[schema.NonNegativeFloat, Le(16)] = Field(
        1.5, description="blur the gradient with standard deviations of half, once and twice this, in pixels; 0: do not"
    )
    batch_size: schema.PositiveInt = Field(1, description="photos between two points at which a run can resume")

    @field_validator("layer")
    @classmethod
    def _check_layer(cls, layer: str | None) -> str | None:
        if layer is not None:
            split_layer(layer)
        return layer

    @property
    def is_channel(self) -> bool:
        """Whether the response of one channel is maximized."""
        return self.layer is not None and ":" in self.layer

    def build(self) -> "tuple[ComputeContext, PretrainedClassifier]":
        """Select the device, seed the random number generators and build the model; it needs no classifier."""
        return PretrainedConfig.build(self)


SPLITS = ("train", "val", "test")


class LookConfig(PretrainedConfig):
    """Configuration of looking into a network: the network, the images, what is drawn."""

    images: tuple[str, ...] = Field(
        (),
        description="photos whose feature maps are drawn; none: an image of `on`, or `sample` for a pretrained model",
    )
    layers: tuple[str, ...] = Field(
        (), description="layers whose feature maps are drawn; none: the last one of each resolution"
    )
    on: str | None = Field(
        None,
        description="images for the statistics of the layers, nearest neighbors and t-SNE: train, val or test of a "
        "training run, or a folder of photos, which may have a subfolder for each class; null: the photos in "
        "`images`, of a run without these val, or train if it has none",
    )
    num_images: schema.PositiveInt = Field(1000, description="number of images of `on`, at even intervals")
    channels: Annotated[schema.PositiveInt, Le(1024)] = Field(64, description="channels of a layer that are drawn")
    neighbors: Annotated[schema.PositiveInt, Le(20)] = Field(7, description="nearest images that are drawn")
    perplexity: Annotated[float, Gt(1), Le(1000)] = Field(30.0, description="t-SNE: about the number of near neighbors")
    tsne_steps: Annotated[schema.NonNegativeInt, Le(100_000)] = Field(1000, description="t-SNE: steps; 0: no t-SNE")
    landscape: bool = Field(False, description="also draw the loss of a run around its weights, in two directions")
    resolution: Annotated[schema.PositiveInt, Ge(3), Le(201)] = Field(
        21, description="landscape: points in each direction, an odd number"
    )
    radius: schema.PositiveFloat = Field(
        1.0, description="landscape: largest distance in each direction, relative to the norm of each filter"
    )
    batch_size: schema.PositiveInt = Field(50, description="images in a forward pass")
    precision: Literal["float32"] = Field("float32", description="of the network")

    @field_validator("images")
    @classmethod
    def _absolute_images(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return photo_config.absolute_image_paths(names) if names else names

    @field_validator("on")
    @classmethod
    def _split_or_folder(cls, on: str | None) -> str | None:
        if on is None or on in SPLITS:
            return on
        if not os.path.isdir(on):
            raise ValueError(f"{on!r} is neither train, val or test nor a folder of photos")
        return os.path.abspath(on)

    @field_validator("resolution")
    @classmethod
    def _odd(cls, resolution: int) -> int:
        if resolution % 2 == 0:
            raise ValueError(f"{resolution} points have none at the weights themselves: give an odd number")
        return resolution

    @model_validator(mode="after")
    def _needs_a_run(self) -> "LookConfig":
        if not self.is_run:
            if self.on in SPLITS:
                raise ValueError(f"on: {self.on} is a split of the data of a training run; name a folder of photos")
            if self.landscape:
                raise ValueError("landscape: the loss is that of a training run on its data; name a run")
        elif self.landscape and self.on is not None and self.on not in SPLITS:
            raise ValueError("landscape: the loss is measured on train, val or test, so on cannot be a folder")
        return self

    @property
    def is_run(self) -> bool:
        """Whether the network is that of a training run."""
        return is_run_of_classifier(self.model)
