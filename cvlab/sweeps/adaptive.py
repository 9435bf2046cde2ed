"""Adaptive search over run directories: each new trial is proposed from the existing ones, and nothing else is stored.

The changes of a trial are in `trial.json` of its directory. config.yaml has them too, but resolved, with the names of
copied files and the steps that a budget in seconds became.
"""

import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from cvlab.config import strict_yaml
from cvlab.errors import RunDirError
from cvlab.runs.records import pruning_reason, read_metrics, request_pruning, require_folder, to_json_value
from cvlab.runs.run_dir import RunDir
from cvlab.storage import atomic
from cvlab.sweeps import grid, results, search
from cvlab.sweeps.config import SweepConfig
from cvlab.sweeps.rungs import Rungs
from cvlab.sweeps.search import Changes, Curve, SearchConfig, TrialRecord

FILE = "trial.json"


def trial_dirs(run: Path) -> list[Path]:
    """Return the run directories of the trials, in order.

    Raises:
        RunDirError: if one of them is missing.
    """
    dirs = sorted(path.parent for path in require_folder(run / "trials").glob(f"*/{FILE}"))
    dirs = [require_folder(path) for path in dirs]
    numbers = [path.name.partition("-")[0] for path in dirs]
    missing = [number for number in range(len(dirs)) if f"{number:03d}" != numbers[number]]
    if missing:
        raise RunDirError(f"{run}: the trial {missing[0]:03d} is missing", "start the sweep again with --fresh")
    return dirs


def write_changes(folder: Path, changes: Changes) -> None:
    """Write the changes of a trial into its directory."""
    atomic.write_text(folder / FILE, json.dumps(to_json_value(changes)) + "\n")


def read_changes(folder: Path) -> Changes:
    """Return the changes of a trial.

    Raises:
        ConfigError: if the file is damaged.
    """
    value = strict_yaml.read(
        folder / FILE
    ).value  # JSON is YAML, and this reader gives tuples as configurations have them
    if not isinstance(value, dict):
        raise RunDirError(f"{folder / FILE}: not the changes of a trial", "the file was changed")
    return value


def read_trial(folder: Path, config: SearchConfig, diverged_values: Mapping[str, float]) -> TrialRecord:
    """Return the record of a trial; a trial that diverged counts as pruned, without a curve."""
    row = results.read_trial(folder)
    changes = read_changes(folder)
    value = results.trial_metrics(row, diverged_values).get(config.metric)
    if value is not None and math.isfinite(value):
        return TrialRecord(changes, "done", value, read_curve(folder, config.metric))
    if row["diverged"]:
        return TrialRecord(changes, "pruned")
    if row["status"] == results.PRUNED:
        return TrialRecord(changes, "pruned", curve=read_curve(folder, config.metric))
    return TrialRecord(
        changes, "failed" if row["status"] in ("failed", "done", "expectations_failed", "damaged") else "running"
    )


def read_curve(folder: Path, metric: str) -> Curve:
    """Return the value of a metric by the step at which it was measured."""
    curve: Curve = {}
    for row in read_metrics(folder):
        step, value = row.get("step"), row.get(metric)
        if isinstance(step, int) and isinstance(value, (int, float)):
            curve[step] = value
    return curve


def rungs_of(sweep: SweepConfig) -> Rungs | None:
    """Return the rungs of a search with successive halving; None of any other sweep."""
    chosen = sweep.search
    if chosen is None or chosen.asha is None:
        return None
    total = sweep.base["duration"][f"{chosen.asha.unit}s"]
    return Rungs(chosen.asha, total, chosen.metric, chosen.goal == "maximize", sweep.diverged_values)


class AdaptiveSearch:
    """A search in progress: `next_trial` creates trials one by one, `prune` ends those that are not promising.

    Args:
        out: The run directory of the sweep.
        config: The search.
        diverged_values: Metrics of a trial that diverged.
        make: Creates the run directory of a trial, given its number and its changes.
        rungs: Rungs of successive halving; None: trials train to their ends.
    """

    def __init__(
        self,
        out: RunDir,
        config: SearchConfig,
        diverged_values: Mapping[str, float],
        make: Callable[[int, Changes], Path],
        rungs: Rungs | None = None,
    ) -> None:
        self.out, self.config, self.make = out, config, make
        self.diverged_values, self.rungs = diverged_values, rungs
        self._known: dict[Path, TrialRecord] = {}  # trials that have ended, so that nothing is read twice

    def all(self) -> dict[Path, TrialRecord]:
        """Return the trials by their run directories, in order."""
        records = {}
        for folder in trial_dirs(self.out.path):
            trial = self._known.get(folder) or read_trial(folder, self.config, self.diverged_values)
            if trial.state in ("done", "pruned"):
                self._known[folder] = trial
            records[folder] = trial
        return records

    def next_trial(self, running: Collection[Path] = ()) -> Path | None:
        """Return a trial that is to continue, or create the next one; None if there are enough.

        Args:
            running: The trials whose processes have not ended.
        """
        promoted = self._promote({folder.name for folder in running})
        if promoted is not None:
            return promoted
        records = self.all()
        if len(records) >= self.config.trials:
            return None
        changes = search.propose(self.config, list(records.values()))
        folder = self.make(len(records), changes)
        description = ", ".join(f"{key} {grid.format_value(value)}" for key, value in changes.items())
        self.out.log(f"trial {len(records) + 1} of {self.config.trials}: {description}")
        return folder

    def _promote(self, running: Collection[str]) -> Path | None:
        """Grant one trial its next rung and return it; None if no trial is to continue."""
        promoted = self.rungs.promote(trial_dirs(self.out.path), running) if self.rungs is not None else None
        if promoted is None:
            return None
        folder, rung = promoted
        self._known.pop(folder, None)
        until = "the end" if rung.limit is None else f"{rung.unit} {rung.limit}"
        self.out.log(f"{folder.name} continues to {until}: {rung.metric} {rung.values[-1]:.4g}")
        return folder

    def prune(self, running: Iterable[Path]) -> None:
        """Ask trials to end that are worse than the median of the finished ones."""
        if self.config.prune == "none":
            return
        finished = [trial.curve for trial in self.all().values() if trial.state == "done"]
        for folder in running:
            if pruning_reason(folder) is None:
                reason = search.should_prune(self.config, read_curve(folder, self.config.metric), finished)
                if reason is not None:
                    request_pruning(folder, reason)

    def best(self) -> dict[str, Any] | None:
        """Return the name, value and changes of the best trial; None if none has finished."""
        best: tuple[Path, TrialRecord] | None = None
        for folder, trial in self.all().items():
            if trial.value is not None and (best is None or self.config.is_better(trial.value, best[1].value or 0.0)):
                best = folder, trial
        if best is None:
            return None
        return {"trial": best[0].name, self.config.metric: best[1].value, "changes": best[1].changes}
