"""The trials of a search as run directories: each new one is proposed from those that are there, and nothing else.

What a trial changes is in `trial.json` of its directory: config.yaml says it too, but resolved, with the names of
copied files and the steps that a budget in seconds became.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from cvlab import axes, durable, rundir, search, yamlfile
from cvlab.errors import CvlabError, RunDirError
from cvlab.report import sweeps
from cvlab.rundir import RunDir
from cvlab.search import Changes, Curve, Search, Trial

FILE = "trial.json"


def folders(run: Path) -> list[Path]:
    """Return the run directories of the trials, in order; RunDirError where one of them is gone."""
    found = sorted(path.parent for path in (run / "arms").glob(f"*/{FILE}"))
    numbers = [path.name.partition("-")[0] for path in found]
    missing = [number for number in range(len(found)) if f"{number:03d}" != numbers[number]]
    if missing:
        raise RunDirError(f"{run}: the arm {missing[0]:03d} is gone", "start the sweep again with --fresh")
    return found


def write(folder: Path, changes: Changes) -> None:
    """Write what a trial changes into its directory."""
    durable.write_text(folder / FILE, json.dumps(rundir.plain(changes)) + "\n")


def changes_of(folder: Path) -> Changes:
    """Return what a trial changes; ConfigError where the file is damaged."""
    value = yamlfile.read(folder / FILE).value  # JSON is YAML, and this reader gives tuples as configurations have them
    if not isinstance(value, dict):
        raise RunDirError(f"{folder / FILE}: not the changes of a trial", "the file was changed")
    return value


def read(folder: Path, wanted: Search, diverged_counts_as: Mapping[str, float]) -> Trial:
    """Return what an arm has tried and how it went; one that has diverged is pruned without having learned anything."""
    row = sweeps.read_arm(folder)
    changes = changes_of(folder)
    value = sweeps.metrics_of(row, diverged_counts_as).get(wanted.metric)
    if value is not None and math.isfinite(value):
        return Trial(changes, "done", value)
    if row["diverged"]:
        return Trial(changes, "pruned")
    if row["status"] == sweeps.PRUNED:
        return Trial(changes, "pruned", curve=curve_of(folder, wanted.metric))
    return Trial(changes, "failed" if row["status"] in ("failed", "done", "unmet", "damaged") else "running")


def curve_of(folder: Path, metric: str) -> Curve:
    """Return a metric after each step at which a run has measured it."""
    found: Curve = {}
    for row in rundir.read_metrics(folder):
        step, value = row.get("step"), row.get(metric)
        if isinstance(step, int) and isinstance(value, (int, float)):
            found[step] = value
    return found


class Trials:
    """The search on its way: `more` makes arms one by one, `prune` ends those that are hopeless."""

    def __init__(
        self,
        out: RunDir,
        wanted: Search,
        diverged_counts_as: Mapping[str, float],
        make: Callable[[int, Changes], Path],
    ) -> None:
        self.out, self.wanted, self.make = out, wanted, make
        self.diverged_counts_as = diverged_counts_as
        self._curves: dict[Path, Curve] = {}  # of arms that are done

    def more(self) -> Path | None:
        """Make the next arm, unless there are enough."""
        made = folders(self.out.path)
        if len(made) >= self.wanted.trials:
            return None
        known = [read(folder, self.wanted, self.diverged_counts_as) for folder in made]
        changes = search.propose(self.wanted, known)
        folder = self.make(len(made), changes)
        told = ", ".join(f"{key} {axes.text_of(value)}" for key, value in changes.items())
        self.out.log(f"trial {len(made) + 1} of {self.wanted.trials}: {told}")
        return folder

    def prune(self, running: Iterable[Path]) -> None:
        """Ask arms to end that are worse than the median of those that are done."""
        if self.wanted.prune == "none":
            return
        for folder in folders(self.out.path):
            if folder not in self._curves and _is_done(folder):
                self._curves[folder] = curve_of(folder, self.wanted.metric)
        for folder in running:
            if rundir.read_prune(folder) is None:
                curve = curve_of(folder, self.wanted.metric)
                why = search.hopeless(self.wanted, curve, list(self._curves.values()))
                if why is not None:
                    durable.write_text(folder / rundir.PRUNE, why + "\n")

    def best(self) -> dict[str, Any] | None:
        """Return the best arm's name, value and changes; None where none is done."""
        best: tuple[Path, Trial] | None = None
        for folder in folders(self.out.path):
            trial = read(folder, self.wanted, self.diverged_counts_as)
            if trial.value is not None and (best is None or self.wanted.better(trial.value, best[1].value or 0.0)):
                best = folder, trial
        if best is None:
            return None
        return {"arm": best[0].name, self.wanted.metric: best[1].value, "changes": best[1].changes}


def _is_done(folder: Path) -> bool:
    try:
        return rundir.read_json(folder / "status.json").get("status") in ("done", "unmet")
    except CvlabError:
        return False
