"""Configurations of classification: training a classifier, classifying photos."""

import os
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le
from pydantic import Field, field_validator, model_validator

from cvlab import layers, registry
from cvlab.config import schema
from cvlab.data import datasets
from cvlab.engine.config import TrainConfig
from cvlab.experiments.classification import losses
from cvlab.experiments.classification.models import registry as model_registry
from cvlab.experiments.classification.profiles import AUTO, Profile
from cvlab.experiments.common.photo_config import PhotoConfig
from cvlab.models.names import BY_PIP, PREFIXES

FOLDER = "folder"
PHOTO_DATASETS = (FOLDER, "imagenette")  # photos of any size, which `image_px` brings to one
PRETRAINED = "pretrained"


class ImageDataConfig(schema.DataConfig):
    """The data set, its splits and its normalization."""

    path: str | None = Field(None, description="folder: where the photos are, a folder or a CSV file")
    num_train: schema.PositiveInt | None = Field(None, description="train on the first N images; null: on all")
    val_fraction: schema.FractionBelowOne = Field(
        0.2,
        description="fraction of the training images used for validation, the last ones, of a folder some of each "
        "class; 0: no validation split; without effect if the data set has one",
    )
    test_fraction: schema.FractionBelowOne = Field(
        0.0, description="folder: fraction of each class used as test split, if the folder has no splits"
    )
    split_seed: schema.NonNegativeInt = Field(0, description="folder: which photos are used for validation and test")
    image_px: Annotated[schema.PositiveInt, Ge(8), Le(1024)] | None = Field(
        None, description="photos: height and width of the images; null: those of the pretrained model, else 64"
    )
    sampling: Literal["shuffle", "balanced"] = Field(
        "shuffle",
        description="each epoch has every training image once; balanced: as many images, each class equally often",
    )
    normalize: Literal["mean", "mean_std"] = Field(
        "mean", description="subtract the mean of each channel; mean_std: also divide by its standard deviation"
    )

    @property
    def has_photos(self) -> bool:
        """Whether the data set consists of photos of any size."""
        return self.name in PHOTO_DATASETS

    @field_validator("name", "fallback")
    @classmethod
    def _check_name(cls, name: str | None) -> str | None:
        if name is not None and not registry.is_user_file(name):
            datasets.check_kind(name, "images")
        return name

    @field_validator("path")
    @classmethod
    def _absolute_path(cls, path: str | None) -> str | None:
        return os.path.abspath(Path(path).expanduser()) if path else path

    @model_validator(mode="after")
    def _check_folder(self) -> "ImageDataConfig":
        datasets.check_path(self.name, self.path, FOLDER)
        if not self.has_photos and (self.image_px is not None or self.test_fraction):
            raise ValueError(f"image_px and test_fraction are of name: {' or '.join(PHOTO_DATASETS)}")
        if self.val_fraction + self.test_fraction >= 1:
            raise ValueError("val_fraction + test_fraction leave nothing to train on")
        return self


class AugmentConfig(schema.FrozenModel):
    """Augmentation of the training images."""

    crop: tuple[Annotated[float, Gt(0), Le(1)], Annotated[float, Gt(0), Le(1)]] | None = Field(
        None, description="zoom into a random square whose area is this fraction of the image, from least to most"
    )
    flip: bool | Literal["alternating"] = Field(
        False, description="mirror images at random; alternating: at random in the first epoch, then in turn"
    )
    translate_px: Annotated[schema.NonNegativeInt, Le(16)] = Field(0, description="translate by up to N pixels")
    cutout_px: schema.NonNegativeInt = Field(0, description="set a random square with sides of N pixels to the mean")

    rotate: Annotated[float, Ge(0), Le(180)] = Field(0.0, description="rotate by up to N degrees")
    color: schema.Fraction = Field(
        0.0,
        description="strength of random changes of brightness, contrast and saturation; the hue's is a quarter of it",
    )
    policy: Literal["trivial", "rand"] | None = Field(
        None, description="random operations of TrivialAugment or RandAugment; null: none"
    )
    erase: schema.Fraction = Field(0.0, description="probability that a random rectangle is set to the mean")
    mixup: Annotated[float, Ge(0), Le(10)] = Field(
        0.0, description="mix pairs of images and of targets, with weights from Beta(mixup, mixup); 0: none"
    )
    cutmix: Annotated[float, Ge(0), Le(10)] = Field(
        0.0, description="replace a rectangle by another image's, its area from Beta(cutmix, cutmix); 0: none"
    )

    @field_validator("crop")
    @classmethod
    def _check_crop(cls, crop: tuple[float, float] | None) -> tuple[float, float] | None:
        if crop is not None and crop[0] > crop[1]:
            raise ValueError("give the smaller fraction first")
        return crop


class AdversarialConfig(schema.FrozenModel):
    """Training on adversarial examples against the weights of each step, within an L-infinity bound."""

    eps: Annotated[float, Gt(0), Le(255)] = Field(8.0, description="largest change of a pixel, in 1/255")
    method: Literal["pgd", "fast"] = Field(
        "pgd", description="pgd: `steps` from a random point; fast: one step from there, of 1.25 eps"
    )
    steps: Annotated[schema.PositiveInt, Le(1000)] | None = Field(None, description="pgd: number of steps; null: 7")
    alpha: Annotated[float, Gt(0), Le(255)] | None = Field(
        None, description="step size, in 1/255; null: 2.5 eps / steps, of fast 1.25 eps"
    )
    eval_eps: Annotated[float, Ge(0), Le(255)] | None = Field(
        None,
        description="bound of val_robust_accuracy, in 1/255, by which the best weights are chosen; null: eps; "
        "0: it is not measured",
    )
    eval_steps: Annotated[schema.PositiveInt, Le(1000)] = Field(10, description="steps of val_robust_accuracy's PGD")
    eval_images: schema.PositiveInt = Field(1000, description="number of its images, the first ones of validation")

    @model_validator(mode="after")
    def _check_steps(self) -> "AdversarialConfig":
        if self.method == "fast" and self.steps not in (None, 1):
            raise ValueError("steps: method fast takes one; use method pgd for more")
        return self

    @property
    def num_steps(self) -> int:
        """Number of steps of the attack on a training batch."""
        return 1 if self.method == "fast" else self.steps or 7

    @property
    def step_size(self) -> float:
        """Length of these steps, in 1/255."""
        return self.alpha or (1.25 * self.eps if self.method == "fast" else 2.5 * self.eps / self.num_steps)

    @property
    def evaluation_eps(self) -> float:
        """Bound of the attack on validation images, in 1/255; 0 for no attack."""
        return self.eps if self.eval_eps is None else self.eval_eps


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
        0.0,
        description="L2 regularization: adds reg * sum(W^2) to the loss, over weights, not biases, gamma, beta; "
        "logged as reg, not in train_loss",
    )
    loss: Annotated[schema.ComponentConfig, losses.LOSSES] = Field(
        schema.ComponentConfig(name=losses.CROSS_ENTROPY),
        description="the training loss; val_loss and test_loss are cross-entropies whatever it is",
    )
    label_smoothing: schema.FractionBelowOne = Field(
        0.0, description="probability mass of the target that is spread over all classes"
    )
    class_weights: Literal["none", "balanced"] = Field(
        "none",
        description="balanced: weight the loss of each image by N / (C * images of its class), for uneven classes",
    )
    augment: AugmentConfig = Field(AugmentConfig())
    adversarial: AdversarialConfig | None = Field(
        None, description="train on adversarial examples instead of the images; null: on the images"
    )
    skip_easy: schema.FractionBelowOne = Field(
        0.0, description="after the first epoch skip this fraction of the images, those with the smallest loss"
    )
    evaluate_test: bool = Field(False, description="report test_accuracy at the end; choose on validation")
    eval_batch_size: schema.PositiveInt | None = Field(
        None, description="images per batch of an evaluation; null: 500 of up to 32x32 px, fewer if they are larger"
    )
    tta: Literal["none", "flip", "flip_shift"] = Field(
        "none", description="test-time augmentation: also report *_accuracy_tta, from logits averaged over views"
    )

    @model_validator(mode="after")
    def _check_profile(self) -> "ClassifyConfig":
        if self.profiles and self.profile == AUTO and self.duration.seconds is None:
            raise ValueError(f"auto needs a budget in duration.seconds; else name one of {', '.join(self.profiles)}")
        return self

    @model_validator(mode="after")
    def _check_finetuning(self) -> "ClassifyConfig":
        epochs = self.finetune_epochs
        if epochs and self.duration.seconds is not None:
            raise ValueError(
                "model.finetune_epochs are counted from the end, which is unknown for a duration in seconds"
            )
        if self.duration.epochs is not None and epochs > self.duration.epochs:
            raise ValueError(f"model.finetune_epochs: {epochs} is more than duration.epochs: {self.duration.epochs}")
        if self.is_transfer and self.data.image_px is not None:
            raise ValueError("data.image_px: the images of model: pretrained have the size that its backbone takes")
        if self.is_transfer and (self.augment.cutout_px or self.skip_easy or self.tta != "none"):
            raise ValueError("augment.cutout_px, skip_easy and tta are not for features of a pretrained model")
        if self.is_transfer and (self.augment.erase or self.augment.mixup or self.augment.cutmix):
            raise ValueError("augment.erase, mixup and cutmix are not for features of a pretrained model")
        if self.is_transfer and self.adversarial is not None:
            raise ValueError("adversarial: model: pretrained is trained on stored features, which cannot be attacked")
        if self.skip_easy and (self.augment.mixup or self.augment.cutmix):
            raise ValueError("skip_easy compares the losses of single images: it cannot be used with mixup or cutmix")
        return self

    @model_validator(mode="after")
    def _check_parts(self) -> "ClassifyConfig":
        if self.accumulate > 1 and self.skip_easy:
            raise ValueError("accumulate: skip_easy needs the losses of the whole batch at once")
        if self.adversarial is not None and self.skip_easy:
            raise ValueError("adversarial: skip_easy compares the losses of images, not of examples that change")
        if self.sam is not None and self.skip_easy:
            raise ValueError("sam: skip_easy would compare the losses of the moved weights; use one of them")
        return self

    @model_validator(mode="after")
    def _check_loss(self) -> "ClassifyConfig":
        if self.loss.name == losses.SVM and (self.label_smoothing or self.augment.mixup or self.augment.cutmix):
            raise ValueError("loss: svm takes one class per image: no label_smoothing, augment.mixup or cutmix")
        if self.skip_easy and self.loss.name != losses.CROSS_ENTROPY:
            raise ValueError(f"skip_easy compares cross-entropies: use loss: {losses.CROSS_ENTROPY}")
        if self.data.sampling == "balanced" and self.class_weights == "balanced":
            raise ValueError("data.sampling and class_weights: balanced by one of them, both would count twice")
        if self.data.sampling == "balanced" and self.skip_easy:
            raise ValueError("data.sampling: balanced and skip_easy both choose the images of an epoch: use one")
        return self

    @field_validator("layers")
    @classmethod
    def _check_layers(cls, name: str) -> str:
        if name not in layers.LAYERS:
            raise ValueError(str(registry.unknown_name_error("layers", name, layers.LAYERS)))
        return name

    @property
    def is_transfer(self) -> bool:
        """Whether a pretrained backbone is used, whose features are computed once."""
        return self.model.name == PRETRAINED

    @property
    def is_pretrained(self) -> bool:
        """Whether a network of timm or torchvision starts from pretrained weights and is trained as a whole."""
        arguments = self.model.builder_arguments()
        is_from_zoo = self.model.name in BY_PIP or self.model.name.startswith(tuple(f"{name}:" for name in PREFIXES))
        return is_from_zoo and arguments.get("weights") is not None

    @property
    def finetune_epochs(self) -> int:
        """Number of final epochs in which the last stages of a pretrained backbone are trained."""
        return int(self.model.builder_arguments().get("finetune_epochs", 0))

    @property
    def final_phase(self) -> tuple[str, int]:
        """The last epochs, in which the backbone is trained too."""
        return "finetune", self.finetune_epochs

    @property
    def has_validation(self) -> bool:
        """Whether part of the training images is a validation split."""
        return self.data.val_fraction > 0

    @property
    def monitor(self) -> str:
        """The metric by which the best weights are chosen."""
        if not self.has_validation:
            return "train_accuracy"
        return "val_robust_accuracy" if self.evaluates_robustness else "val_accuracy"

    @property
    def evaluates_robustness(self) -> bool:
        """Whether the accuracy on validation images under attack is measured, if there are any."""
        return self.adversarial is not None and self.adversarial.evaluation_eps > 0


class ClassifyPhotosConfig(PhotoConfig):
    """Which photos, and which model."""

    top: Annotated[schema.PositiveInt, Le(1000)] = Field(5, description="number of classes to report for each photo")
    batch_size: schema.PositiveInt = Field(32, description="photos per forward pass")
