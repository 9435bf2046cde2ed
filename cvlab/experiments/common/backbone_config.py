"""Base configurations of training on the features of a frozen backbone: the photos and the backbone."""

import os
from collections.abc import Sequence
from typing import ClassVar, TypeVar

from pydantic import Field, field_validator, model_validator

from cvlab.config.schema import DataConfig, FractionBelowOne, PositiveInt
from cvlab.data import datasets
from cvlab.engine.config import TrainConfig
from cvlab.errors import ConfigError
from cvlab.models import pretrained

Item = TypeVar("Item")


class PhotoDatasetConfig(DataConfig):
    """A data set of the task's kind; a custom one is called like its kind and needs a path."""

    source_type: ClassVar[type[datasets.AnySource]]
    path: str | None = Field(None, description="folder or file of a custom data set")
    val_fraction: FractionBelowOne = Field(
        0.2, description="fraction of the training photos for validation, if the data set has no validation split"
    )
    num_train: PositiveInt | None = Field(None, description="train on the first N photos; null: all")

    @field_validator("name", "fallback")
    @classmethod
    def _known(cls, name: str | None) -> str | None:
        if name is not None:
            datasets.check_kind(name, cls.source_type)
        return name

    @field_validator("path")
    @classmethod
    def _absolute_path(cls, name: str | None) -> str | None:
        return os.path.abspath(name) if name else name

    @model_validator(mode="after")
    def _own_path(self) -> "PhotoDatasetConfig":
        custom = self.source_type.kind
        if (self.name == custom) != (self.path is not None):
            raise ValueError(f"name: {custom} goes with a path, and no other set does")
        return self

    def items(self, name: str, splits: dict[str, tuple[Item, ...]], split: str) -> Sequence[Item]:
        """Return the photos of a split of the set `name`. ConfigError where it has none, or fewer than are wanted."""
        found = splits.get(split, ())
        wanted = self.num_train if split == "train" else None
        if not found or (wanted is not None and wanted > len(found)):
            raise ConfigError(f"{name} has {len(found)} photos in {split!r}", "name another split, or lower num_train")
        return found[:wanted]


class BackboneTrainConfig(TrainConfig):
    """The keys of every training run on the features of a backbone."""

    backbone: str = Field(
        pretrained.DEFAULT_MODEL, description="ImageNet-pretrained model, as in `cvlab classify --model`"
    )
    backbone_weights: str | None = Field(None, description="file with its weights")
    evaluate_test: bool = Field(False, description="evaluate on the test split at the end; choose on validation")

    def require_last(self, name: str, epochs: int) -> None:
        """Require that so many epochs at the end are known and there. ValueError says which key is wrong."""
        if epochs and self.duration.seconds is not None:
            raise ValueError(f"{name} are counted from the end, which a duration in seconds does not know")
        if self.duration.epochs is not None and epochs > self.duration.epochs:
            raise ValueError(f"{name} {epochs} are the last of duration.epochs, which has fewer")

    def last_from(self, epochs: int, steps_per_epoch: int) -> int:
        """Return the step that the last `epochs` begin with."""
        steps = self.duration.steps or (self.duration.epochs or 0) * steps_per_epoch
        return max(0, steps - epochs * steps_per_epoch)

    @field_validator("backbone")
    @classmethod
    def _known_backbone(cls, name: str) -> str:
        pretrained.check_name(name)
        return name
