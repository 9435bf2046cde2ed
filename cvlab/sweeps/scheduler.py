"""The driver of a sweep: hands arms to an engine, tries again what may be tried again, says how each has ended."""

import contextlib
import secrets
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from cvlab.console import Progress
from cvlab.errors import CvlabError, DivergedError
from cvlab.runs.interrupt import StopRequest
from cvlab.runs.records import ENDED, pruning_reason, read_status
from cvlab.runs.run_dir import RunDir
from cvlab.storage.lock import is_held
from cvlab.sweeps import executors, results
from cvlab.sweeps.executors import POLL_SECONDS, TOKEN, Limits, Task, TaskResult

RETRIED_CODES = (1, 137, 143)  # exit codes after which another try may end otherwise, besides death by a signal
PRUNE_SECONDS = 1.0
SAVE_SECONDS = 60.0  # how long arms may take to save and end when the sweep stops


def has_ended(arm: Path) -> bool:
    """Whether an arm need not be run again: it has its result, was pruned, or diverged and would do so again."""
    try:
        status = read_status(arm)
    except CvlabError:
        return False
    pruned = status.get("status") == "interrupted" and pruning_reason(arm) is not None
    return status.get("status") in ENDED or pruned or status.get("code") == DivergedError.code


class SweepScheduler:
    """One sweep on its way; `failed` has the exit code and the last words of each arm that has failed.

    `more` makes the next arm when those that are there have all been taken, None where there are enough; `look` is
    called every now and then with the arms that run.
    """

    def __init__(
        self,
        name: str,
        out: RunDir,
        limits: Limits,
        arms: Sequence[Path],
        total: int,
        more: Callable[[], Path | None] = lambda: None,
        look: Callable[[Iterable[Path]], None] = lambda _: None,
    ) -> None:
        self.out, self.limits, self.total, self.more, self.look = out, limits, total, more, look
        self.waiting = deque(arm.resolve() for arm in arms if not has_ended(arm))
        self.running: set[Path] = set()
        self.tries: Counter[Path] = Counter()
        self.failed: dict[str, tuple[int, str]] = {}
        self.done = len(arms) - len(self.waiting)
        self.progress = Progress(name, total, self.done)
        self.looked = time.monotonic()
        self.token = secrets.token_hex(16)

    def run(self, stop: StopRequest) -> None:
        """Run all arms to their end, or until a signal asks to stop; then they have saved."""
        engine = executors.get_executor(self.limits.submit)
        self.out.write_text(TOKEN, self.token)
        try:
            with self.progress:
                more = True
                while more and stop.received is None:
                    self._await_orphans(stop)
                    with contextlib.closing(engine(self.take, self.limits, stop)) as events:
                        for ended in events:
                            self._look() if ended is None else self._judge(ended, stop)
                    more = bool(self.waiting)
        finally:
            (self.out.path / TOKEN).unlink(missing_ok=True)  # jobs that have not begun yet will not
            self._settle()

    def take(self) -> Task | None:
        """Return the next arm that nobody else runs, None where there is none at present."""
        for _ in range(len(self.waiting)):
            arm = self.waiting.popleft()
            if is_held(arm):
                self.waiting.append(arm)
            elif has_ended(arm):  # meanwhile, in the hands of an earlier driver's process
                self._note(arm)
            else:
                return self._begin(arm)
        made = None if self.waiting else self.more()
        return None if made is None else self._begin(made.resolve())

    def _begin(self, arm: Path) -> Task:
        self.running.add(arm)
        return Task(arm, self.token)

    def _await_orphans(self, stop: StopRequest) -> None:
        """Wait while every arm that is left is still run by the processes of an earlier driver."""
        told = False
        while self.waiting and all(map(is_held, self.waiting)) and stop.received is None:
            if not told:
                self.out.log(f"waiting for {len(self.waiting)} arms that an earlier start of this sweep still runs")
                told = True
            time.sleep(POLL_SECONDS)

    def _look(self) -> None:
        if time.monotonic() - self.looked >= PRUNE_SECONDS:
            self.look(sorted(self.running))
            self.looked = time.monotonic()

    def _judge(self, ended: TaskResult, stop: StopRequest) -> None:
        """Take an arm back from the engine; put it into the queue again where another try may help."""
        arm, code = ended.task.arm, ended.code
        self.running.remove(arm)
        said = ended.said or (f"it was ended by signal {-code}" if code < 0 else f"it ended with exit code {code}")
        if not has_ended(arm) and stop.received is None:
            if (code < 0 or code in RETRIED_CODES) and self.tries[arm] < self.limits.submit.retries:
                self.tries[arm] += 1
                self.waiting.append(arm)
                self.out.log(f"{arm.name}: {said}; try {self.tries[arm] + 1} of {1 + self.limits.submit.retries}")
                return
            self.failed[arm.name] = (code, said)
        self._note(arm)

    def _note(self, arm: Path) -> None:
        """Say how an arm has ended."""
        self.done += has_ended(arm) or arm.name in self.failed
        self.out.log(f"{arm.name}: {results.outcome_text(arm)}")
        self.out.set_status("running", step=self.done, total_steps=self.total)
        self.progress.update(self.done, "")

    def _settle(self) -> None:
        """Wait until the arms have saved that were asked to end, where the engine has not."""
        deadline = time.monotonic() + SAVE_SECONDS
        while any(map(is_held, self.running)) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        for arm in self.running:
            executors.read_last_error(arm)
