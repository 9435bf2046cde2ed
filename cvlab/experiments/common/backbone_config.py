"""Base configurations of training on the features of a frozen backbone: the photos and the backbone."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import Field, field_validator, model_validator

from cvlab.config.schema import DataConfig, FractionBelowOne, PositiveInt
from cvlab.data import datasets
from cvlab.engine.config import TrainConfig
from cvlab.errors import ConfigError
from cvlab.models import names

Item = TypeVar("Item")


class PhotoDatasetConfig(DataConfig):
    """A data set of the task's kind; a custom one is called like its kind and needs a path."""

    kind: ClassVar[str]  # of `datasets.BY_KIND`
    path: str | None = Field(None, description="folder or file of a custom data set")
    val_fraction: FractionBelowOne = Field(
        0.2, description="fraction of the training photos for validation, if the data set has no validation split"
    )
    num_train: PositiveInt | None = Field(None, description="train on the first N photos; null: all")

    @field_validator("name", "fallback")
    @classmethod
    def _known(cls, name: str | None) -> str | None:
        if name is not None:
            datasets.check_kind(name, cls.kind)
        return name

    @field_validator("path")
    @classmethod
    def _absolute_path(cls, name: str | None) -> str | None:
        return os.path.abspath(Path(name).expanduser()) if name else name

    @model_validator(mode="after")
    def _check_path(self) -> "PhotoDatasetConfig":
        datasets.check_path(self.name, self.path, self.kind)
        return self

    def items(self, name: str, splits: dict[str, tuple[Item, ...]], split: str) -> Sequence[Item]:
        """Return the photos of a split of the data set `name`, for training the first `num_train`.

        Raises ConfigError if the split is empty or has fewer photos than `num_train`, which a fallback may have.
        """
        photos = splits.get(split, ())
        limit = self.num_train if split == "train" else None
        if limit is not None and self.fallback_for is not None:
            limit = min(limit, len(photos))  # it was chosen for the data set that the fallback replaces
        if not photos or (limit is not None and limit > len(photos)):
            raise ConfigError(f"{name} has {len(photos)} photos in {split!r}", "name another split, or lower num_train")
        return photos[:limit]


class BackboneTrainConfig(TrainConfig):
    """The keys of every training run on the features of a backbone."""

    backbone: str = Field(names.DEFAULT_MODEL, description="ImageNet-pretrained model, as in `cvlab classify --model`")
    backbone_weights: str | None = Field(None, description="file with its weights")
    evaluate_test: bool = Field(False, description="evaluate on the test split at the end; choose on validation")

    def final_split(self, splits: Mapping[str, Sequence[Any]]) -> str:
        """Return the split that is evaluated at the end: `test` if asked for and present, else `val`."""
        return "test" if self.evaluate_test and splits.get("test") else "val"

    def check_final_epochs(self, name: str, epochs: int) -> None:
        """Raise ValueError if key `name` asks for more final epochs than the duration has, or if it is in seconds."""
        if epochs and self.duration.seconds is not None:
            raise ValueError(f"{name} are counted from the end, which is unknown for a duration in seconds")
        if self.duration.epochs is not None and epochs > self.duration.epochs:
            raise ValueError(f"{name}: {epochs} is more than duration.epochs: {self.duration.epochs}")

    def final_epochs_start(self, epochs: int, steps_per_epoch: int) -> int:
        """Return the first step of the last `epochs` epochs."""
        steps = self.duration.num_steps(steps_per_epoch)
        return max(0, steps - epochs * steps_per_epoch)

    @field_validator("backbone")
    @classmethod
    def _known_backbone(cls, name: str) -> str:
        names.check_name(name)
        return name
