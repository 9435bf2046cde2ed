"""Save and restore a job that runs step by step: the trainer and the image optimizer share this."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn, Protocol

from cvlab import __version__, console
from cvlab.distributed import collectives, process_group
from cvlab.engine.device import ComputeContext
from cvlab.errors import CheckpointError, CvlabError
from cvlab.runs import checkpoint
from cvlab.runs.checkpoint import State
from cvlab.runs.interrupt import StopRequest
from cvlab.runs.run_dir import RunDir

FORMAT = 1
MAX_CHECKPOINT_OVERHEAD = 1 / 50  # the largest share of the running time that goes into writing checkpoints
CHECKED_WHEN_LOADED = ("model", "optimizer", "scaler", "fingerprint", "rng", "other_ranks", "ema_model")
BLOCKS = ("rng", "progress", "fingerprint", "extra_state")  # parts of a state whose own keys never vary


class CheckpointSchedule:
    """Decide when a checkpoint is due.

    Checkpoints are at least `save_seconds` apart, and further if writing one takes long: at most
    `MAX_CHECKPOINT_OVERHEAD` of the time is spent on writing.
    """

    def __init__(self, save_seconds: float) -> None:
        self.save_seconds = save_seconds
        self.saved_step: int | None = None
        self._saved_at = time.monotonic()
        self._write_seconds = 0.0

    @property
    def period(self) -> float:
        """Seconds between two checkpoints."""
        return max(self.save_seconds, self._write_seconds / MAX_CHECKPOINT_OVERHEAD)

    def is_due(self) -> bool:
        """Return whether the period has passed since the last checkpoint."""
        return time.monotonic() - self._saved_at >= self.period

    @contextlib.contextmanager
    def writing(self, step: int) -> Iterator[None]:
        """Measure how long the checkpoint of a step takes to write; the period starts again afterwards."""
        start = time.monotonic()
        yield
        self._saved_at = time.monotonic()
        self._write_seconds = self._saved_at - start
        self.saved_step = step


class Resumable(Protocol):
    """A job whose state a `Checkpointer` saves and restores."""

    @property
    def step(self) -> int:
        """Number of steps done."""

    @property
    def total_steps(self) -> int:
        """Number of steps of the whole job."""

    @property
    def best_step(self) -> int | None:
        """Step of the best result so far, None if there is none."""

    def state_dict(self) -> State:
        """Return everything that the remaining steps depend on."""

    def load_state_dict(self, state: State, path: Path) -> None:
        """Restore what `state_dict` returned; `path` is where it was read from."""

    def config_digest(self, state: State) -> str:
        """Return the digest of the configuration that the state belongs to."""


class Checkpointer:
    """Write the checkpoints of a job into its run directory, and restore the job from them.

    In a distributed run every rank has one; rank 0 writes.
    """

    def __init__(self, job: Resumable, run_dir: RunDir, ctx: ComputeContext, save_seconds: float) -> None:
        self.job, self.run_dir, self.ctx = job, run_dir, ctx
        self.schedule = CheckpointSchedule(save_seconds)

    def begin(self, start: Callable[[], None]) -> None:
        """Restore the latest checkpoint; if the run has none, call `start` and save before the first step.

        Raises:
            CheckpointError: The run had begun, but no checkpoint is valid or fits the configuration.
        """
        if not self._restore():
            start()
            self.save()
        self.run_dir.log(f"{self.job.total_steps} steps")
        console.debug(f"a crash loses at most {self.schedule.period:.0f} s of work")

    def save(self, is_best: bool = False) -> None:
        """Write a checkpoint of the current step, unless it exists."""
        step = self.job.step
        if step == self.schedule.saved_step and not is_best:
            return
        with self.schedule.writing(step):
            state = self._state()
            self.run_dir.write("checkpoints", lambda folder: checkpoint.save(folder, step, state, is_best))
        self.run_dir.set_status("running", step=step, total_steps=self.job.total_steps)

    def save_and_stop(self, stop: StopRequest) -> NoReturn:
        """Write a checkpoint and raise the StoppedError of a request."""
        self.save()
        raise stop.error(self.job.step, self.run_dir.path.name)

    def fingerprint(self) -> State:
        """Return what must be equal for two runs to be bit-for-bit identical."""
        return self.ctx.fingerprint() | {"cvlab": __version__, "processes": process_group.world().size}

    def _state(self) -> State:
        state = self.job.state_dict()
        return state | {
            "format": FORMAT,
            "metrics_bytes": self.run_dir.sync_metrics(),
            "config_sha256": self.job.config_digest(state),
            "fingerprint": self.fingerprint(),
        }

    def _restore(self) -> bool:
        """Restore the latest checkpoint and return True, or return False if the run has not begun."""
        latest = self._load_latest() if process_group.is_main() else None
        path = collectives.broadcast_from_rank0(lambda: latest[0] if latest else None)
        if path is None:
            return False
        state = latest[1] if latest else checkpoint.load(path)
        try:
            self._load(state, path)
        except CvlabError:
            raise
        except Exception as error:  # whatever a changed file makes of torch and of the job
            reason = f"{type(error).__name__}: {error}"
            raise CheckpointError(f"{path}: cannot be restored: {reason}", "the file was changed") from error
        self.run_dir.truncate_metrics(state["metrics_bytes"])
        self.schedule.saved_step = self.job.step
        step_path = checkpoint.path_of(self.run_dir.checkpoints, self.job.step)
        if self.job.best_step == self.job.step and step_path.is_file():
            # the run may have been killed between writing the checkpoint and linking it
            self.run_dir.write(checkpoint.BEST, lambda _: checkpoint.link_best(step_path))
        self.run_dir.log(f"resumed {path.name}: {self.job.step} of {self.job.total_steps} steps are done")
        return True

    def _load(self, state: State, path: Path) -> None:
        """Load a state into the job if it is complete, has the right types, and belongs to the configuration."""
        expected = self._state()
        checkpoint.check_complete(missing_keys(expected, state), path)
        checkpoint.check_types({**expected, **dict.fromkeys(CHECKED_WHEN_LOADED)}, state, path)
        checkpoint.check_weights(state["model"], path)
        digest = self.job.config_digest(state)
        checkpoint.check_same_config(state, digest, self.fingerprint(), path, self.run_dir.log)
        self.job.load_state_dict(state, path)
        if self.job.step > self.job.total_steps:
            raise CheckpointError(f"{path}: step {self.job.step} of {self.job.total_steps}", "the file was changed")

    def _load_latest(self) -> tuple[Path, State] | None:
        """Return the latest valid checkpoint, None if the run has not begun."""
        if any(self.run_dir.checkpoints.glob("*.pt")) or self.run_dir.sync_metrics():
            return checkpoint.load_latest(self.run_dir.checkpoints, self.run_dir.log)
        return None


def missing_keys(expected: State, state: State) -> list[str]:
    """Return the keys that a state lacks; those of a block are dotted."""
    missing = [key for key in expected if key not in state]
    for block in BLOCKS:
        if block in expected and isinstance(state.get(block), dict):
            missing += [f"{block}.{key}" for key in expected[block] if key not in state[block]]
    return missing
