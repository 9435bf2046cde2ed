"""The rungs of a search with successive halving, in the run directories of its trials."""

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from cvlab.runs import rung as runs_rung
from cvlab.runs.rung import Rung
from cvlab.sweeps import results
from cvlab.sweeps.asha import AshaConfig, TrialRungs, promotion


class Rungs:
    """The rungs of a search.

    Args:
        config: Distances of the rungs.
        total: Epochs or steps of a whole trial.
        metric: What trials are compared by.
        maximize: Whether higher values are better.
        diverged_values: Metrics of a trial that diverged.
    """

    def __init__(
        self, config: AshaConfig, total: int, metric: str, maximize: bool, diverged_values: Mapping[str, float]
    ) -> None:
        self.config, self.metric, self.maximize = config, metric, maximize
        self.limits = config.limits(total)
        self.diverged_value = diverged_values.get(metric, -math.inf if maximize else math.inf)
        self._at_rest: dict[tuple[Path, int], TrialRungs] = {}  # so that nothing is read twice

    def rung(self, number: int, values: Sequence[float] = ()) -> Rung:
        """Return what a trial at a rung is granted."""
        limit = self.limits[number] if number < len(self.limits) else None
        return Rung(number, self.metric, self.config.unit, limit, tuple(values))

    def promote(self, trial_dirs: Sequence[Path], running: Collection[str] = ()) -> tuple[Path, Rung] | None:
        """Grant one trial its next rung; return it, or None if no trial is to continue.

        Args:
            trial_dirs: The run directories of all trials, in order.
            running: Names of those whose processes have not ended, also if they have written their results.
        """
        trials = [self._read(folder, folder.name in running) for folder in trial_dirs]
        number = promotion(trials, len(self.limits), self.config.factor, self.maximize)
        if number is None:
            return None
        trial = trials[number]
        rung = self.rung(trial.rung + 1, [trial.values[k] for k in range(trial.rung + 1)])
        runs_rung.write(trial_dirs[number], rung)
        return trial_dirs[number], rung

    def first_value(self, folder: Path) -> float | None:
        """Return the metric of a trial at the first rung, None if it has none there."""
        return self._read(folder, is_running=False).values.get(0)

    def _read(self, folder: Path, is_running: bool) -> TrialRungs:
        rung = runs_rung.read(folder) or self.rung(0)
        if is_running:
            return TrialRungs(rung.number, dict(enumerate(rung.values)), can_continue=False)
        at_rest = self._at_rest.get((folder, rung.number))
        if at_rest is not None:
            return at_rest
        row = results.read_trial(folder)
        values = dict(enumerate(rung.values))
        if row["diverged"]:
            trial = TrialRungs(rung.number, {**values, rung.number: self.diverged_value}, can_continue=False)
        elif row["status"] in ("done", "expectations_failed"):  # perhaps before its last rung, because of `patience`
            for number in range(rung.number, len(self.limits)):
                value = runs_rung.read_value(folder, self.rung(number))
                value = row["metrics"].get(self.metric) if value is None else value
                values |= {number: value} if isinstance(value, (int, float)) else {}
            trial = TrialRungs(rung.number, values, can_continue=False)
        elif row["status"] == results.PRUNED:
            value = runs_rung.read_value(folder, rung)
            trial = TrialRungs(rung.number, values | ({} if value is None else {rung.number: value}), value is not None)
        else:
            return TrialRungs(rung.number, values, can_continue=False)
        self._at_rest[folder, rung.number] = trial
        return trial
