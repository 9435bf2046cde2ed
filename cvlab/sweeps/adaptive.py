"""The trials of a search as run directories: each new one is proposed from those that are there, and nothing else.

What a trial changes is in `trial.json` of its directory: config.yaml says it too, but resolved, with the names of
copied files and the steps that a budget in seconds became.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from cvlab.config import strict_yaml
from cvlab.errors import RunDirError
from cvlab.runs.records import to_json_value, pruning_reason, read_metrics, request_pruning
from cvlab.runs.run_dir import RunDir
from cvlab.storage import atomic
from cvlab.sweeps import grid, results, search
from cvlab.sweeps.search import Changes, Curve, SearchConfig, TrialRecord

FILE = "trial.json"


def trial_dirs(run: Path) -> list[Path]:
    """Return the run directories of the trials, in order; RunDirError where one of them is gone."""
    found = sorted(path.parent for path in (run / "arms").glob(f"*/{FILE}"))
    numbers = [path.name.partition("-")[0] for path in found]
    missing = [number for number in range(len(found)) if f"{number:03d}" != numbers[number]]
    if missing:
        raise RunDirError(f"{run}: the arm {missing[0]:03d} is gone", "start the sweep again with --fresh")
    return found


def write_changes(folder: Path, changes: Changes) -> None:
    """Write what a trial changes into its directory."""
    atomic.write_text(folder / FILE, json.dumps(to_json_value(changes)) + "\n")


def read_changes(folder: Path) -> Changes:
    """Return what a trial changes; ConfigError where the file is damaged."""
    value = strict_yaml.read(
        folder / FILE
    ).value  # JSON is YAML, and this reader gives tuples as configurations have them
    if not isinstance(value, dict):
        raise RunDirError(f"{folder / FILE}: not the changes of a trial", "the file was changed")
    return value


def read_trial(folder: Path, wanted: SearchConfig, diverged_counts_as: Mapping[str, float]) -> TrialRecord:
    """Return what an arm has tried and how it went; one that has diverged is pruned without having learned anything."""
    row = results.read_trial(folder)
    changes = read_changes(folder)
    value = results.trial_metrics(row, diverged_counts_as).get(wanted.metric)
    if value is not None and math.isfinite(value):
        return TrialRecord(changes, "done", value, read_curve(folder, wanted.metric))
    if row["diverged"]:
        return TrialRecord(changes, "pruned")
    if row["status"] == results.PRUNED:
        return TrialRecord(changes, "pruned", curve=read_curve(folder, wanted.metric))
    return TrialRecord(
        changes, "failed" if row["status"] in ("failed", "done", "expectations_failed", "damaged") else "running"
    )


def read_curve(folder: Path, metric: str) -> Curve:
    """Return a metric after each step at which a run has measured it."""
    found: Curve = {}
    for row in read_metrics(folder):
        step, value = row.get("step"), row.get(metric)
        if isinstance(step, int) and isinstance(value, (int, float)):
            found[step] = value
    return found


class AdaptiveSearch:
    """The search on its way: `more` makes arms one by one, `prune` ends those that are hopeless."""

    def __init__(
        self,
        out: RunDir,
        wanted: SearchConfig,
        diverged_counts_as: Mapping[str, float],
        make: Callable[[int, Changes], Path],
    ) -> None:
        self.out, self.wanted, self.make = out, wanted, make
        self.diverged_counts_as = diverged_counts_as
        self._known: dict[Path, TrialRecord] = {}  # of what will not change any more: nothing is read twice

    def all(self) -> dict[Path, TrialRecord]:
        """Return the trials by their run directories, in order."""
        found = {}
        for folder in trial_dirs(self.out.path):
            trial = self._known.get(folder) or read_trial(folder, self.wanted, self.diverged_counts_as)
            if trial.state in ("done", "pruned"):
                self._known[folder] = trial
            found[folder] = trial
        return found

    def more(self) -> Path | None:
        """Make the next arm, unless there are enough."""
        made = self.all()
        if len(made) >= self.wanted.trials:
            return None
        changes = search.propose(self.wanted, list(made.values()))
        folder = self.make(len(made), changes)
        told = ", ".join(f"{key} {grid.format_value(value)}" for key, value in changes.items())
        self.out.log(f"trial {len(made) + 1} of {self.wanted.trials}: {told}")
        return folder

    def prune(self, running: Iterable[Path]) -> None:
        """Ask arms to end that are worse than the median of those that are done."""
        if self.wanted.prune == "none":
            return
        ended = [trial.curve for trial in self.all().values() if trial.state == "done"]
        for folder in running:
            if pruning_reason(folder) is None:
                reason = search.should_prune(self.wanted, read_curve(folder, self.wanted.metric), ended)
                if reason is not None:
                    request_pruning(folder, reason)

    def best(self) -> dict[str, Any] | None:
        """Return the best arm's name, value and changes; None where none is done."""
        best: tuple[Path, TrialRecord] | None = None
        for folder, trial in self.all().items():
            if trial.value is not None and (best is None or self.wanted.better(trial.value, best[1].value or 0.0)):
                best = folder, trial
        if best is None:
            return None
        return {"arm": best[0].name, self.wanted.metric: best[1].value, "changes": best[1].changes}
