"""Configurations of captioning: training a captioner, captioning photos."""

from typing import Annotated, Literal

from annotated_types import Ge, Le, MinLen
from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from cvlab.config import schema
from cvlab.config.schema import Registry
from cvlab.data import datasets
from cvlab.experiments.common import backbone_config, weights
from cvlab.experiments.common.photo_config import ImagesConfig
from cvlab.models import names

WEIGHTS_FILE = "captioner.safetensors"  # in the run directory of a training run
Layers = Literal["torch", "manual"]  # whose kernels: torch's, or the hand-written ones
Projection = Literal["linear", "mlp"]
SCENE_CAPTIONS = "scene_captions"  # the generated data set, whose scenes are known
CAPTIONERS = {
    "captioner": "cvlab.experiments.captioning.model:Captioner",
    "transformer": "cvlab.experiments.captioning.transformer:TransformerCaptioner",
}
CAPTIONER_REGISTRY = Registry("captioner", CAPTIONERS, frozenset({"in_channels", "vocab_size"}))


class CaptionConfig(ImagesConfig):
    """Which photos, which captioner, and how captions are decoded."""

    weights: str | None = Field(
        None, description="a training run of a captioner, or its weights file; null: the bundled weights"
    )
    beam: Annotated[int, Ge(1), Le(100)] = Field(5, description="beam width; 1 is greedy decoding")
    alpha: schema.Fraction = Field(
        0.7, description="length normalization of beam search: scores are divided by length ** alpha"
    )
    guide: bool | None = Field(
        None,
        description="name what the bundled detector and the backbone's classifier are sure of, and no animal or "
        "vehicle that they rule out; null: with the bundled weights",
    )
    attention: bool = Field(False, description="also draw the attention map of each word")
    explain_word: str | None = Field(
        None, description="draw which pixels are evidence for this word, where a caption has it"
    )
    window: Annotated[schema.PositiveFloat, Le(1)] = Field(
        0.15, description="explain_word: side of a covered square, as a fraction of the photo's longer side"
    )

    @field_validator("weights")
    @classmethod
    def _absolute_weights(cls, name: str | None) -> str | None:
        return weights.absolute_weights_path(name, WEIGHTS_FILE, "a captioner")


class CaptionDataConfig(backbone_config.PhotoDatasetConfig):
    """Which captioned photos."""

    kind = "captions"
    extra: tuple[str, ...] = Field(
        (), description="further data sets, whose training photos are added and whose final metrics are reported too"
    )
    val_fraction: schema.FractionBelowOne = Field(0.1, description="share of your own photos used for validation")
    sentences: schema.PositiveInt | None = Field(
        None, description="train on this number of captions per photo; null: all"
    )

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all data sets that are read."""
        return (self.name, *self.extra)

    def on_fallback(self) -> Self:
        """Return the block with its fallback instead of all of its data sets."""
        return super().on_fallback().model_copy(update={"extra": ()})

    @field_validator("extra")
    @classmethod
    def _known_extra(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            datasets.check_kind(name, cls.kind)
        return names

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if len(set(self.names)) < len(self.names) or self.kind in self.extra:
            raise ValueError(f"extra: names each data set once, and not {self.kind}, which is {{name: {self.kind}}}")
        if self.extra and self.num_train is not None:
            raise ValueError("num_train and extra exclude each other")
        return self


Strides = Annotated[tuple[Literal[4, 8, 16, 32], ...], MinLen(1)]
SizePx = Annotated[int, Ge(64), Le(2048)]


class ExtraFeaturesConfig(schema.FrozenModel):
    """The feature maps of a further backbone."""

    backbone: str = Field(description="pretrained model, as `backbone`")
    backbone_weights: str | None = Field(None, description="file with its weights")
    strides: Strides = Field((32,), description="strides of its feature maps")
    size: SizePx = Field(224, description="photos are resized to squares of this many pixels for it")

    @field_validator("backbone")
    @classmethod
    def _known_backbone(cls, name: str) -> str:
        names.check_name(name)
        return name


class CaptionerConfig(backbone_config.BackboneTrainConfig):
    """A captioner, its data and its training. `batch_size` counts photos, each with all of its captions."""

    data: CaptionDataConfig
    model: Annotated[schema.ComponentConfig, CAPTIONER_REGISTRY]
    compile: Literal[False] = Field(False, description="captioners are not compiled: the length of a batch varies")
    size: SizePx = Field(
        224, description="photos are resized to squares of this many pixels, without keeping the aspect ratio"
    )
    strides: Strides = Field(
        (32,), description="strides of the backbone's feature maps; the first one defines the spatial positions"
    )
    extra_features: tuple[ExtraFeaturesConfig, ...] = Field(
        (), description="feature maps of further backbones, averaged or repeated to the same spatial positions"
    )
    mirror: bool = Field(False, description="flip half of the photos horizontally; takes twice the space on the disk")
    min_word_count: schema.PositiveInt = Field(
        5, description="words that occur less often in the training captions are unknown"
    )
    length: Annotated[int, Ge(3), Le(200)] = Field(
        17, description="maximum number of tokens of a caption, start and end included"
    )
    reward_epochs: Annotated[int, Ge(0)] = Field(
        0, description="number of last epochs of self-critical training, which maximizes CIDEr-D of sampled captions"
    )
    reward_samples: Annotated[int, Ge(2), Le(100)] = Field(
        5, description="captions sampled for each photo in self-critical training"
    )
    beam: Annotated[int, Ge(1), Le(100)] = Field(5, description="beam width of the final evaluation; 1 is greedy")
    alpha: schema.Fraction = Field(
        0.7, description="length normalization of beam search: scores are divided by length ** alpha"
    )

    @property
    def final_phase(self) -> tuple[str, int]:
        """The last epochs, of self-critical training."""
        return "reward", self.reward_epochs

    @model_validator(mode="after")
    def _rewards_within(self) -> "CaptionerConfig":
        self.check_final_epochs("reward_epochs", self.reward_epochs)
        if self.sam is not None and self.reward_epochs:
            raise ValueError("sam: reward_epochs samples other captions in the second backward pass; use one of them")
        return self
