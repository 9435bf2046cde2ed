"""Schedulers of a sweep and of the queue: hand runs to an executor, retry those that were lost, log how each ended."""

import contextlib
import secrets
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from cvlab.console import Progress
from cvlab.errors import CvlabError, DivergedError
from cvlab.runs.interrupt import StopRequest
from cvlab.runs.records import ENDED, read_status
from cvlab.runs.run_dir import RunDir
from cvlab.runs.rung import early_end_reason
from cvlab.storage.lock import is_held
from cvlab.sweeps import executors, results
from cvlab.sweeps.executors import POLL_SECONDS, TOKEN, Limits, Task, TaskResult

RETRIED_CODES = (1, 137, 143)  # exit codes that are retried, besides death by a signal
PRUNE_SECONDS = 1.0
SAVE_SECONDS = 60.0  # for trials to save and exit when the sweep stops


def has_ended(trial: Path) -> bool:
    """Return whether a trial need not be run again: it has its result, was pruned, waits at a rung, or diverged."""
    try:
        status = read_status(trial)
        is_pruned = status.get("status") == "interrupted" and early_end_reason(trial) is not None
    except CvlabError:
        return False
    return status.get("status") in ENDED or is_pruned or status.get("code") == DivergedError.code


class Scheduler:
    """Runs in progress, which are called trials here.

    Args:
        name: What the progress bar shows.
        log: Called with each line about what happens.
        limits: What the executor may use.
        trials: The run directories of the trials.
        total: The number of trials, including those that a search adds.
        next_trial: Called with the running trials when all others have been handed out; returns a new one, or one
            that has ended and is to continue. None if there is none until another trial ends.
        prune: Called regularly with the running trials.

    Attributes:
        failed: Exit code and last message of each trial that failed.
    """

    def __init__(
        self,
        name: str,
        log: Callable[[str], None],
        limits: Limits,
        trials: Sequence[Path],
        total: int,
        next_trial: Callable[[Collection[Path]], Path | None] = lambda _: None,
        prune: Callable[[Iterable[Path]], None] = lambda _: None,
    ) -> None:
        self.log, self.limits, self.total = log, limits, total
        self.next_trial, self.prune = next_trial, prune
        # the process of a trial that has ended may still be writing its page
        self.waiting = deque(trial.resolve() for trial in trials if is_held(trial) or not has_ended(trial))
        self.running: set[Path] = set()
        self.tries: Counter[Path] = Counter()
        self.failed: dict[str, tuple[int, str]] = {}
        self.at_rest = {trial.resolve() for trial in trials} - {*self.waiting}
        self.has_new_results = True  # since `next_trial` had none
        self.progress = Progress(name, total, self.done)
        self.pruned_at = time.monotonic()
        self.token = secrets.token_hex(16)

    @property
    def done(self) -> int:
        """Number of trials that have ended."""
        return len(self.at_rest)

    def run(self, stop: StopRequest) -> None:
        """Run all trials to their end, or until a signal asks to stop and they have saved."""
        executor = executors.get_executor(self.limits.submit)
        self.open()
        try:
            with self.progress:
                has_more = True
                while has_more and stop.received is None:
                    self._await_orphans(stop)
                    with contextlib.closing(executor(self.next_task, self.limits, stop)) as events:
                        for result in events:
                            self._prune() if result is None else self._handle(result, stop)
                    has_more = bool(self.waiting)
        finally:
            self.close()
            self._wait_for_saves()

    def open(self) -> None:
        """Prepare for the first trial."""

    def close(self) -> None:
        """Let no further trial start."""

    def report(self) -> None:
        """Record how many trials have ended."""

    def next_task(self) -> Task | None:
        """Return the next trial that no other process runs, None if there is none at present."""
        task = self._waiting_task()
        while task is None and self.has_new_results and not self.waiting:
            folder = self.next_trial(self.running)
            if folder is None:
                self.has_new_results = False
            elif not has_ended(folder):  # one evaluation may have reached two rungs
                task = self._start(folder.resolve())
        return task

    def _waiting_task(self) -> Task | None:
        for _ in range(len(self.waiting)):
            trial = self.waiting.popleft()
            if is_held(trial):
                self.waiting.append(trial)
            elif has_ended(trial):  # meanwhile, in a process of an earlier scheduler
                self._log_end(trial)
            else:
                return self._start(trial)
        return None

    def _start(self, trial: Path) -> Task:
        self.running.add(trial)
        self.at_rest.discard(trial)
        return Task(trial, self.token)

    def _await_orphans(self, stop: StopRequest) -> None:
        """Wait while all remaining trials are still run by processes of an earlier scheduler."""
        is_logged = False
        while self.waiting and all(map(is_held, self.waiting)) and stop.received is None:
            if not is_logged:
                self.log(f"waiting for {len(self.waiting)} that are still running from an earlier start")
                is_logged = True
            time.sleep(POLL_SECONDS)

    def _prune(self) -> None:
        if time.monotonic() - self.pruned_at >= PRUNE_SECONDS:
            self.prune(sorted(self.running))
            self.pruned_at = time.monotonic()

    def _handle(self, result: TaskResult, stop: StopRequest) -> None:
        """Handle the end of a trial: queue it again if a retry may help."""
        trial, code = result.task.trial, result.code
        self.running.remove(trial)
        message = result.message or (f"killed by signal {-code}" if code < 0 else f"exit code {code}")
        if not has_ended(trial) and stop.received is None:
            if (code < 0 or code in RETRIED_CODES) and self.tries[trial] < self.limits.submit.retries:
                self.tries[trial] += 1
                self.waiting.append(trial)
                self.log(f"{trial.name}: {message}; try {self.tries[trial] + 1} of {1 + self.limits.submit.retries}")
                return
            self.failed[trial.name] = (code, message)
        self._log_end(trial)

    def _log_end(self, trial: Path) -> None:
        """Log how a trial has ended."""
        self.has_new_results = True
        if has_ended(trial) or trial.name in self.failed:
            self.at_rest.add(trial)
        self.log(f"{trial.name}: {results.outcome_text(trial)}")
        self.report()
        self.progress.update(self.done, "")

    def _wait_for_saves(self) -> None:
        """Wait until the trials that were asked to stop have saved, if the executor has not waited."""
        deadline = time.monotonic() + SAVE_SECONDS
        while any(map(is_held, self.running)) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        for trial in self.running:
            executors.read_last_error(trial)


class SweepScheduler(Scheduler):
    """A sweep in progress, in the run directory `out`; the other arguments are those of `Scheduler`."""

    def __init__(self, name: str, out: RunDir, *arguments: Any) -> None:
        super().__init__(name, out.log, *arguments)
        self.out = out

    def open(self) -> None:
        """Write the token that nodes must find."""
        self.out.write_text(TOKEN, self.token)

    def close(self) -> None:
        """Remove the token, so that jobs that are still queued will not start."""
        (self.out.path / TOKEN).unlink(missing_ok=True)

    def report(self) -> None:
        """Write how many trials have ended to the status of the sweep."""
        self.out.set_status("running", step=self.done, total_steps=self.total)


class QueueScheduler(Scheduler):
    """A queue in progress: `claim()` returns the next run that is now this process's to run, None if there is none."""

    def __init__(
        self, log: Callable[[str], None], limits: Limits, total: int, claim: Callable[[], Path | None]
    ) -> None:
        super().__init__("queue", log, limits, (), total)
        self.claim = claim

    def next_task(self) -> Task | None:
        """Return the next run that no other process runs, None if there is none at present."""
        task = self._waiting_task()
        while task is None and (folder := self.claim()) is not None:
            if is_held(folder):  # a process of an earlier start, or of the user, which is waited for
                self.waiting.append(folder.resolve())
            else:
                task = self._start(folder.resolve())
        return task
