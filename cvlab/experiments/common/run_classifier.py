"""A training run of a classifier as a model for photos: `--model RUN`."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from cvlab import registry
from cvlab.config import loading
from cvlab.errors import CheckpointError, ConfigError, RunDirError
from cvlab.experiments.base import ClassifiesPhotos, has_capability
from cvlab.models import names
from cvlab.runs.find import LATEST, config_path, find_run
from cvlab.runs.records import is_run

if TYPE_CHECKING:
    from cvlab.models.pretrained import PretrainedClassifier

HINTS = {
    "detector": "`cvlab detect --weights {name}` uses it, `cvlab saliency --model {name} --box 1` explains a box",
    "captioner": "`cvlab caption --weights {name}` uses it, `cvlab saliency --model {name} --word WORD` a word",
}


def is_run_of_classifier(name: str) -> bool:
    """Whether a resolved `model` is a run directory."""
    return Path(name).is_absolute()


def resolve_model(name: str, root: Path) -> str:
    """Return the name of a pretrained model, or the absolute path of the run that is meant.

    Args:
        name: A model, a run directory, `latest` (the newest run of a classifier), or a part of a run's name.
        root: The folder of all runs.

    Raises:
        ConfigError: There is neither such a model nor such a run, or the run is of another kind.
    """
    try:
        names.check_name(name)
    except ConfigError as error:
        if registry.is_user_file(name):
            hint = "train it first: `model: {name: ./file.py:Name}` in a configuration; then name the run"
            raise ConfigError(f"{name} is a file, and a pretrained model or a run is needed", hint) from error
        if not name.strip() or ":" in name:
            raise
        try:
            path = find_run(name, root, has_capability(ClassifiesPhotos), "a training run of a classifier")
        except RunDirError as run_error:
            is_path = os.sep in name or name == LATEST or "matches" in run_error.message
            message = run_error.message if is_path else f"{error.message}, and no run has that name"
            raise ConfigError(message, run_error.hint if is_path else error.hint) from error
        _require_classifier(path)
        return str(path)
    return name


def _require_classifier(path: Path) -> None:
    """Raise ConfigError unless a folder is a run of a classifier that has begun to train."""
    if not is_run(path):
        raise ConfigError(f"{path}: not a run directory", "name a training run of a classifier")
    try:
        experiment = loading.load(str(config_path(path)), []).config.experiment
    except RunDirError as error:
        raise ConfigError(error.message, error.hint) from error
    if not isinstance(registry.get_experiment(experiment), ClassifiesPhotos):
        hint = HINTS.get(experiment, "name a run of `cvlab train`").format(name=path.name)
        raise ConfigError(f"{path.name} is a run of {experiment}, which is no classifier", hint)


def load(path: Path, device: str) -> "PretrainedClassifier":
    """Return the model of a run with its last weights.

    Args:
        path: The run directory.
        device: Where to put the model.

    Raises:
        CheckpointError: The run has no checkpoint, or it is damaged.
        RunDirError: The run directory was changed.
    """
    from cvlab import console
    from cvlab.runs import checkpoint
    from cvlab.runs.records import require_folder

    config = loading.load(str(config_path(path)), []).config
    experiment = registry.get_experiment(config.experiment)
    if not isinstance(experiment, ClassifiesPhotos):
        raise CheckpointError(f"{path.name}: a run of {config.experiment} is no classifier")
    state = checkpoint.load_latest(require_folder(path / "checkpoints"), console.info)[1]
    return experiment.photo_classifier(config, path, state, device)
