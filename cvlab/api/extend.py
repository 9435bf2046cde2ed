"""`cvlab resume RUN key=value ...`: continue a run in a new run directory, for longer or with other settings.

The new run begins with a checkpoint, the last one of the run that it continues, with the new number of steps in it.
From there on it is a run that was interrupted: it can be stopped, killed and resumed. The run that it continues is only
read.
"""

import contextlib
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cvlab import console, registry
from cvlab.api import run as api_run
from cvlab.config import loading
from cvlab.config.overrides import flatten
from cvlab.config.schema import Duration
from cvlab.engine.config import TrainConfig
from cvlab.errors import CheckpointError, ConfigError, RunDirError
from cvlab.runs import checkpoint
from cvlab.runs.checkpoint import State
from cvlab.runs.find import config_path
from cvlab.runs.records import MAX_JSON_BYTES, MAX_METRICS_BYTES, read_json, read_metrics, read_status
from cvlab.runs.run_dir import RunDir
from cvlab.storage import regular_files
from cvlab.storage.lock import is_held

MAY_CHANGE = re.compile(
    r"(duration|schedule)\..+|optimizer\.(\w+_)?lr|warmup|clip_norm|patience|eval_every|log_every|save_seconds|"
    r"anomaly|log_gradients|trackers|device|threads|name|expect|expect_fallback|evaluate_test|eval_batch_size|tta|"
    r"(model\.)?finetune_epochs|reward_epochs"
)
FINAL_EPOCHS = ("finetune_epochs", "model.finetune_epochs", "reward_epochs")  # counted from the end of a run
FINETUNING = FINAL_EPOCHS[:2]  # these also decide which parameters a model has


@dataclass(frozen=True)
class Extension:
    """A run that continues another one, before it exists.

    Attributes:
        source: The run directory that is continued.
        loaded: The new configuration, and where it comes from.
        changed: The new values by dotted key.
        config: The new configuration.
        step: Number of steps done.
        total_steps: Number of steps of the whole new run.
        state: The checkpoint that the new run begins with.
    """

    source: Path
    loaded: loading.Loaded
    changed: Mapping[str, Any]
    config: TrainConfig
    step: int
    total_steps: int
    state: State

    def describe(self) -> dict[str, Any]:
        """Return what env.json and summary.json record as `continues`."""
        return {"run": self.source.name, "step": self.step, "changed": dict(self.changed)}


def prepare(path: Path, overrides: Sequence[str]) -> Extension:
    """Check that a run can be continued with other settings; nothing is written.

    Args:
        path: The run directory, of a run that is not running.
        overrides: `key=value` texts.

    Raises:
        ConfigError: A key cannot be changed, has no new value, or leaves no step to take.
        CheckpointError: The run has no valid checkpoint.
        RunDirError: The run is running, or damaged.
    """
    if is_held(path):
        raise RunDirError(f"{path.name}: running", "interrupt it first, or wait for its end")
    source = str(config_path(path))
    before, loaded = loading.load(source).config, loading.load(source, overrides)
    after = loaded.config
    if not isinstance(before, TrainConfig) or not isinstance(after, TrainConfig):
        raise ConfigError(
            f"{path.name}: a run of {before.experiment} cannot be continued with other settings",
            "resume it without key=value, or start a new run",
        )
    old_values, new_values = flatten(before.model_dump()), flatten(after.model_dump())
    changed = {key: value for key, value in new_values.items() if old_values.get(key, Ellipsis) != value}
    for key in (*changed, *(old_values.keys() - new_values.keys())):
        if not MAY_CHANGE.fullmatch(key):
            raise ConfigError(
                f"{key} cannot change when a run is continued: its weights were trained with the value before",
                f"`cvlab train {console.relative_path(path)} {key}=...` starts a new run",
            )
    if not changed:
        raise ConfigError(f"{path.name} has these values already", "give another value, or resume it without key=value")
    file, state = checkpoint.load_latest(path / "checkpoints", console.info)
    try:
        step, progress = int(state["step"]), state["progress"]
        steps_per_epoch = functools.partial(_steps_per_epoch, before, progress, path)
        total = _total_steps(before, after, progress, steps_per_epoch)
        if total <= step:
            raise ConfigError(f"{path.name} has taken {step} steps, the duration is {total}", "give a longer duration")
        _require_same_phases(old_values, new_values, step, (int(progress["total_steps"]), total), steps_per_epoch)
        _continue(state, after, total, changed)
        _use_ema_again(state)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: not the checkpoint of a training run", "the file was changed") from error
    return Extension(path, loaded, changed, after, step, total, state)


def require_run_first(argument: str | None) -> None:
    """Raise ConfigError if the first argument of `cvlab resume` is an override: a run that continues names another."""
    if argument is not None and "=" in argument and not Path(argument).exists():
        raise ConfigError(f"{argument}: no run is named before it", f"for example cvlab resume latest {argument}")


def plan(path: Path, overrides: Sequence[str], root: Path) -> dict[str, Any]:
    """Return what `cvlab resume` would do; nothing is written.

    Args:
        path: The run directory.
        overrides: `key=value` texts; empty to resume the run itself.
        root: The folder of the runs.

    Raises:
        CvlabError: The run could not be continued.
    """
    if not overrides:
        status = read_status(path)
        is_ended = api_run.has_ended(path)
        action = "nothing, it has finished" if is_ended else "resume it from its newest checkpoint"
        return {"ok": True, "run": str(path), "status": status.get("status"), "action": action}
    extension = prepare(path, overrides)
    config = extension.config
    registry.get_experiment(config.experiment).plan(config, extension.loaded.base)
    return {
        "ok": True,
        "continues": path.name,
        "step": extension.step,
        "total_steps": extension.total_steps,
        **extension.changed,
        "run": str(root / f"<time>-{config.name}-<id>"),
    }


def _total_steps(before: TrainConfig, after: TrainConfig, progress: State, steps_per_epoch: Callable[[], int]) -> int:
    """Return the number of steps of the continued run, those done included."""
    if after.duration == before.duration:
        return int(progress["total_steps"])
    if after.duration.seconds is not None:
        raise ConfigError("duration.seconds: a run is continued up to a number of steps", "give steps or epochs")
    return after.duration.steps or after.duration.num_steps(steps_per_epoch())


def _steps_per_epoch(config: TrainConfig, progress: State, path: Path) -> int:
    """Return the number of steps of an epoch of a run, from its plan or its metrics."""
    if config.duration.epochs is not None:
        return int(progress["total_steps"]) // config.duration.epochs
    for row in read_metrics(path):
        step, epoch = row.get("step"), row.get("epoch")
        if isinstance(step, int) and isinstance(epoch, float) and step > 0 and epoch > 0:
            return max(1, round(step / epoch))
    raise ConfigError(f"{path / 'metrics.jsonl'}: has no row with an epoch", "give duration.steps")


def _require_same_phases(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    step: int,
    totals: tuple[int, int],
    steps_per_epoch: Callable[[], int],
) -> None:
    """Raise ConfigError if a key that counts epochs from the end of a run asks for other steps than those done.

    Args:
        before: The configuration of the run that is continued, by dotted key.
        after: The new one.
        step: Number of steps done.
        totals: Number of all steps before and now.
        steps_per_epoch: Returns the number of steps of an epoch.
    """
    for key in FINAL_EPOCHS:
        old, new = before.get(key) or 0, after.get(key) or 0
        if not old and not new:
            continue
        per_epoch = steps_per_epoch()
        old_start, new_start = (
            max(0, total - epochs * per_epoch) if epochs else total
            for epochs, total in zip((old, new), totals, strict=True)
        )
        if key in FINETUNING and bool(old) != bool(new):
            raise ConfigError(f"{key} cannot change from {old} to {new} when a run is continued", "start a new run")
        if min(old_start, step) != min(new_start, step):
            same = math.ceil((totals[1] - min(old_start, step)) / per_epoch)
            raise ConfigError(
                f"{key}: {new} is counted from the end, and step {new_start} would have been the first of these epochs,"
                f" not step {old_start}",
                f"{key}={same} continues as the run began",
            )


def _continue(state: State, config: TrainConfig, total_steps: int, changed: Mapping[str, Any]) -> None:
    """Change a checkpoint into one of the run that continues, as if that had taken the steps up to here."""
    progress = state["progress"]
    if any(key.startswith("duration.") for key in changed):
        progress |= {"total_steps": total_steps, "plan_history": config.duration.plan_history, "budget_seconds": None}
    if progress["stop_reason"]:
        progress |= {"stop_reason": "", "stale_evaluations": 0}
    if any(key.startswith(("schedule.", "optimizer.")) for key in changed):
        progress |= {"lr_reductions": 0, "stale_evaluations_at_lr": 0}  # the given rate is the one it continues with
    budget_seconds = progress["budget_seconds"]
    if budget_seconds is not None:
        config = config.model_copy(update={"duration": Duration(seconds=budget_seconds)})
    state["config_sha256"] = config.digest()


def _use_ema_again(state: State) -> None:
    """Undo the choice, after the last step, of the last weights over their average: it is made anew at the new end."""
    if not state["uses_ema"]:
        state["uses_ema"] = True
        if state["progress"]["best_step"] == state["step"]:  # the best were the last weights, which are not evaluated
            state["progress"] |= {"best_value": None, "best_step": 0}


def create(extension: Extension, root: Path, processes: int | None = None) -> Path:
    """Create the run directory of a run that continues another one, which is then resumed; return it.

    config.yaml, without which a directory cannot be resumed, is written after the checkpoint: a kill leaves no run that
    would begin at step 0.

    Args:
        extension: What `prepare` returned.
        root: The folder of the runs.
        processes: Number of processes; None for that of the run that is continued.

    Raises:
        CvlabError: The data is missing, or its folder cannot be written.
    """
    source, state = extension.source, extension.state
    env = read_json(source / "env.json")
    processes = processes or api_run.processes_of(source)
    threads = api_run.threads_of(source)
    best = _load_best(extension)
    metrics = regular_files.read_bytes(source / "metrics.jsonl", MAX_METRICS_BYTES)[: state["metrics_bytes"]]
    out = api_run.create_directory(extension.loaded.config, extension.loaded, root)
    with out.locked():
        out.write_bytes("metrics.jsonl", metrics)
        out.folder("checkpoints")
        if best is not None:
            _write_checkpoint(out, checkpoint.BEST, best)
        _write_checkpoint(out, checkpoint.path_of(out.checkpoints, extension.step).name, state)
        _copy_photo_list(source, out)
        record = {"continues": extension.describe()}
        out.write_json("env.json", record)
        api_run.pin_threads(threads)
        provenance = env.get("provenance")
        changed = dict.fromkeys(extension.changed, "command line")
        loaded = replace(extension.loaded, provenance=(provenance if isinstance(provenance, dict) else {}) | changed)
        api_run.write_inputs(loaded.config, loaded, out, processes, record)
    return out.path


def _write_checkpoint(out: RunDir, name: str, state: State) -> None:
    out.write(f"checkpoints/{name}", lambda path: checkpoint.write(path, state))


def _copy_photo_list(source: Path, out: RunDir) -> None:
    """Copy the list of the user's photos of a classifier, with which the new run compares those that it reads."""
    from cvlab.experiments.classification.data import manifest

    with contextlib.suppress(FileNotFoundError):
        out.write_bytes(manifest.FILE, regular_files.read_bytes(source / manifest.FILE, MAX_JSON_BYTES))


def _load_best(extension: Extension) -> State | None:
    """Return the best checkpoint as one of the new run; None if it is the last one, or there is none that is valid."""
    path = extension.source / "checkpoints" / checkpoint.BEST
    best_step = extension.state["progress"]["best_step"]
    if best_step in (0, extension.step) or not path.is_file():
        return None
    try:
        state = checkpoint.load(path)
        _continue(state, extension.config, extension.total_steps, extension.changed)
    except (CheckpointError, KeyError, TypeError) as error:
        console.info(f"warning: {path} cannot be used, the best weights are those of the new run: {error}")
        return None
    return state
