"""`cvlab eval`: a finished or stopped run's weights, evaluated again, or on the test split for the first time."""

from pathlib import Path
from typing import Any

from cvlab import console, registry
from cvlab.config import loading
from cvlab.errors import CheckpointError, ConfigError, RunDirError
from cvlab.experiments.base import Evaluable
from cvlab.runs import checkpoint
from cvlab.runs.find import config_path
from cvlab.runs.records import read_json
from cvlab.runs.run_dir import RunDir

CHOICES = ("last", "best")


def evaluate(path: Path, splits: tuple[str, ...], which: str, device: str | None) -> dict[str, Any]:
    """Evaluate a run on `splits` with its last or best weights, keep the result in eval.json, and return it.

    Without any splits it is evaluated on validation, where there is one, and test.
    """
    chosen = loading.load(str(config_path(path)), [f"device={device}"] if device else []).config
    experiment = registry.get_experiment(chosen.experiment)
    if not isinstance(experiment, Evaluable):
        raise ConfigError(f"{path.name}: a run of {chosen.experiment} has no weights to evaluate")
    state = state_of(path, which)
    found = {
        "ok": True,
        "run": str(path),
        "experiment": chosen.experiment,
        "checkpoint": which,
        "step": state.get("step"),
        "data": read_json(path / "summary.json").get("data"),
        "metrics": experiment.evaluate(chosen, path, state, splits),
    }
    try:
        RunDir(path).write_json("eval.json", {key: value for key, value in found.items() if key != "ok"})
    except RunDirError as error:
        console.info(f"warning: not kept: {error.message}")
    return found


def state_of(path: Path, which: str) -> dict[str, Any]:
    """Return the state in a run's last or best checkpoint. ConfigError for another word, CheckpointError without."""
    if which not in CHOICES:
        raise ConfigError(f"--checkpoint {which}: unknown", f"known: {', '.join(CHOICES)}")
    folder = path / "checkpoints"
    if which == "last":
        return checkpoint.load_latest(folder, console.info)[1]
    best = folder / checkpoint.BEST
    if not best.is_file():
        raise CheckpointError(f"{best}: not there", "use --checkpoint last, or resume the run")
    return checkpoint.load(best)
