"""Configurations of classification: training a classifier, classifying photos."""

from typing import Annotated, Literal

from annotated_types import Le
from pydantic import Field, field_validator, model_validator

from cvlab import layers, registry
from cvlab.config import schema
from cvlab.data import datasets
from cvlab.engine.config import TrainConfig
from cvlab.experiments.classification.models import registry as model_registry
from cvlab.experiments.classification.profiles import AUTO, Profile
from cvlab.experiments.common.photo_config import PhotoConfig


class ImageDataConfig(schema.DataConfig):
    """The data set, its splits and its normalization."""

    num_train: schema.PositiveInt | None = Field(None, description="train on the first N images; null: on all")
    val_fraction: schema.FractionBelowOne = Field(
        0.2, description="fraction of the training images, the last ones, used for validation; 0: no validation split"
    )
    normalize: Literal["mean", "mean_std"] = Field(
        "mean", description="subtract the mean of each channel; mean_std: also divide by its standard deviation"
    )

    @field_validator("name", "fallback")
    @classmethod
    def _check_name(cls, name: str | None) -> str | None:
        if name is not None and not registry.is_user_file(name):
            datasets.check_kind(name, "images")
        return name


class AugmentConfig(schema.FrozenModel):
    """Augmentation of the training images."""

    flip: bool | Literal["alternating"] = Field(
        False, description="mirror images at random; alternating: at random in the first epoch, then in turn"
    )
    translate_px: Annotated[schema.NonNegativeInt, Le(16)] = Field(0, description="translate by up to N pixels")
    cutout_px: schema.NonNegativeInt = Field(0, description="set a random square with sides of N pixels to the mean")


class ClassifyConfig(TrainConfig):
    """Training of one classifier on one data set."""

    profile: str = Field(
        AUTO, description="one of `profiles`; auto: measure, and use the largest that completes its epochs"
    )
    profiles: dict[str, Profile] = Field({}, description="sizes of the experiment by name, the smallest first")

    data: ImageDataConfig
    model: Annotated[schema.ComponentConfig, model_registry.TABLE]
    layers: str = Field("torch", description="implementation of the layers: torch, or hand-written ones by name")
    reg: schema.NonNegativeFloat = Field(
        0.0, description="L2 regularization: loss + reg * sum(W^2), over weights, not biases, gamma, beta"
    )
    label_smoothing: schema.FractionBelowOne = Field(
        0.0, description="probability mass of the target that is spread over all classes"
    )
    augment: AugmentConfig = Field(AugmentConfig())
    skip_easy: schema.FractionBelowOne = Field(
        0.0, description="after the first epoch skip this fraction of the images, those with the smallest loss"
    )
    evaluate_test: bool = Field(False, description="report test_accuracy at the end; choose on validation")
    tta: Literal["none", "flip", "flip_shift"] = Field(
        "none", description="test-time augmentation: also report *_accuracy_tta, from logits averaged over views"
    )

    @model_validator(mode="after")
    def _check_profile(self) -> "ClassifyConfig":
        if self.profiles and self.profile == AUTO and self.duration.seconds is None:
            raise ValueError(f"auto needs a budget in duration.seconds; else name one of {', '.join(self.profiles)}")
        return self

    @field_validator("layers")
    @classmethod
    def _check_layers(cls, name: str) -> str:
        if name not in layers.LAYERS:
            raise ValueError(str(registry.unknown_name_error("layers", name, layers.LAYERS)))
        return name

    @property
    def has_validation(self) -> bool:
        """Whether part of the training images is a validation split."""
        return self.data.val_fraction > 0

    @property
    def monitor(self) -> str:
        """The metric by which the best weights are chosen."""
        return "val_accuracy" if self.has_validation else "train_accuracy"


class ClassifyPhotosConfig(PhotoConfig):
    """Which photos, and which model."""

    top: Annotated[schema.PositiveInt, Le(1000)] = Field(5, description="number of classes to report for each photo")
    batch_size: schema.PositiveInt = Field(32, description="photos per forward pass")
