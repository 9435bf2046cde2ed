"""Base configurations of experiments on photos: the photos, the ImageNet-pretrained model."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from cvlab.config.schema import PositiveInt, RunConfig
from cvlab.config.validation import Problems
from cvlab.data import imagenet, photo_paths
from cvlab.errors import ConfigError
from cvlab.experiments.common import run_classifier
from cvlab.models import names
from cvlab.runs.find import runs_root

if TYPE_CHECKING:
    import torch

    from cvlab.engine.device import ComputeContext
    from cvlab.models.pretrained import PretrainedClassifier


def as_text(name: object) -> object:
    """Return a number as text: YAML reads an index as a number."""
    return str(name) if isinstance(name, int) and not isinstance(name, bool) else name


def _resolve(name: str) -> str:
    return run_classifier.resolve_model(name, runs_root())


ClassName = Annotated[str, BeforeValidator(as_text)]  # by name, WordNet id or index
ModelName = Annotated[str, AfterValidator(_resolve)]  # of a pretrained model, or the path of a training run


class PretrainedConfig(RunConfig):
    """The keys of every experiment that uses an ImageNet-pretrained model."""

    model: ModelName = Field(
        names.DEFAULT_MODEL,
        description=f"{', '.join(names.BY_PIP)}, timm:NAME, torchvision:NAME, or a training run of a classifier",
    )
    weights: str | None = Field(None, description="file with the model's weights; null: those found on this machine")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "float32", description="of the optimization; results are always evaluated in float32"
    )

    @model_validator(mode="after")
    def _check_weights(self) -> "PretrainedConfig":
        if self.weights is not None and run_classifier.is_run_of_classifier(self.model):
            raise ValueError("model: a run has its own weights, so weights cannot be given too")
        return self

    @field_validator("weights")
    @classmethod
    def _absolute(cls, name: str | None) -> str | None:
        return os.path.abspath(name) if name else name

    def class_problems(self, key: str, class_names: Sequence[str | None]) -> Problems:
        """Return the names in `key` that are no class of ImageNet, if the model certainly has those classes."""
        is_run = run_classifier.is_run_of_classifier(self.model)
        if self.weights is not None or is_run or self.model.startswith("timm:"):
            return []  # they may be of another data set
        problems: Problems = []
        for name in class_names:
            try:
                if name is not None:
                    imagenet.resolve(name)
            except ConfigError as error:
                problems.append(((key,), str(error)))
        return problems

    def build(self) -> "tuple[ComputeContext, PretrainedClassifier]":
        """Select the device, seed the random number generators and build the model."""
        from cvlab.engine.device import seed_everything, select_device

        ctx = select_device(self.device, self.precision, self.threads)
        seed_everything(self.seed)
        return ctx, build_model(self.model, self.weights, ctx.device)


def build_model(name: str, weights: str | None, device: "torch.device") -> "PretrainedClassifier":
    """Return a pretrained model, or that of a training run, by its resolved name."""
    from cvlab.models import pretrained

    if run_classifier.is_run_of_classifier(name):
        return run_classifier.load(Path(name), str(device))
    return pretrained.build(name, weights, device)


class ImagesConfig(RunConfig):
    """The keys of every experiment that processes photos."""

    images: tuple[str, ...] = Field(
        (photo_paths.SAMPLE,), description="files, folders or patterns; `sample` is a bundled photo"
    )
    batch_size: PositiveInt = Field(8, description="photos per batch")

    @field_validator("images")
    @classmethod
    def _absolute_images(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return absolute_image_paths(names)


class PhotoConfig(PretrainedConfig, ImagesConfig):
    """The keys of every experiment that applies an ImageNet-pretrained model to photos.

    Of a key in both bases the first base has the default: photos are processed in float32.
    """

    def build(self) -> "tuple[ComputeContext, PretrainedClassifier]":
        """Select the device, seed the random number generators and build the model, which must have a classifier."""
        ctx, model = super().build()
        model.require_classes()
        return ctx, model


def absolute_image_paths(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the absolute paths of photos, so that a configuration means the same in any working directory."""
    if not names:
        raise ValueError("give at least one photo")
    bundled = (photo_paths.SAMPLE, photo_paths.SAMPLE_PAINTING)
    return tuple(name if name in bundled or "://" in name else os.path.abspath(name) for name in names)
