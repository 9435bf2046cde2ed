"""Run trials as Slurm jobs with submitit. A job that is preempted or out of time saves, and is queued again.

`address: local` runs the same jobs on this machine, one process each, for testing without Slurm.
"""

import contextlib
import logging
import os
import signal
import time
from types import FrameType
from typing import Any

from cvlab import portability
from cvlab.errors import ConfigError
from cvlab.runs.interrupt import StopRequest
from cvlab.sweeps.executors import EXIT_LOST, POLL_SECONDS, Events, Limits, NextTask, Task, node

FOLDER = "slurm"  # in the sweep's directory, for the files of submitit
ROOM = 64  # jobs in the queue at a time, unless `workers` is set
REQUEUES = 1000  # each resumes from a checkpoint, even this many are fine
SAVE_SECONDS = 90  # between the signal that time is up and the end of a job


class TrialJob:
    """The callable of a job; submitit calls `checkpoint` when the job is preempted or out of time."""

    def __init__(self, remote: node.RemoteTask) -> None:
        self.remote = remote
        self.process: node.TrialProcess | None = None

    def __call__(self) -> node.RemoteResult:
        """Run the trial."""
        before = signal.signal(signal.SIGTERM, self._interrupt)  # sent by `scancel`; submitit ignores it
        try:
            return node.run(self.remote, self._keep)
        finally:
            signal.signal(signal.SIGTERM, before)

    def _keep(self, process: node.TrialProcess) -> None:
        self.process = process

    def _interrupt(self, _number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    def checkpoint(self) -> Any:
        """Let the trial save and exit; return the job that resumes it."""
        from submitit.helpers import DelayedSubmission

        if self.process is not None:
            self.process.stop()
        return DelayedSubmission(TrialJob(self.remote))


def run(next_task: NextTask, limits: Limits, stop: StopRequest) -> Events:
    """Run each trial as a job."""
    executor = _executor(limits)
    running: dict[Task, Any] = {}
    try:
        while stop.received is None:
            while len(running) < (limits.workers or ROOM) and (task := next_task()) is not None:
                running[task] = _submit(executor, task)
            if not running:
                return
            for task in [task for task, job in running.items() if job.done()]:
                yield node.task_result(task, _remote_result(running.pop(task)))
            time.sleep(POLL_SECONDS)
            yield None
    finally:
        for job in running.values():  # their results so far are in the run directories
            _cancel(job)


def _executor(limits: Limits) -> Any:
    """Return submitit's executor."""
    import submitit

    submit = limits.submit
    logging.getLogger("submitit").setLevel(logging.ERROR)
    executor = submitit.AutoExecutor(
        limits.folder / FOLDER, cluster=submit.address or "slurm", slurm_max_num_timeout=REQUEUES
    )
    executor.update_parameters(
        name=f"cvlab-{limits.folder.name}",
        timeout_min=submit.minutes,
        cpus_per_task=submit.cpus,
        slurm_signal_delay_s=SAVE_SECONDS,
        **({"gpus_per_node": submit.gpus} if submit.gpus else {}),
        **({"slurm_partition": submit.partition} if submit.partition else {}),
    )
    return executor


def _submit(executor: Any, task: Task) -> Any:
    """Submit a job; a local one must not receive the terminal's Ctrl-C.

    Raises:
        ConfigError: if Slurm rejects the job.
    """
    import submitit

    try:
        with portability.block_signals([signal.SIGINT]):
            return executor.submit(TrialJob(node.remote_task(task)))
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        hint = "change submit.partition, submit.cpus, submit.gpus or submit.minutes"
        raise ConfigError(f"Slurm rejected the job: {str(error).strip().splitlines()[-1]}", hint) from error


def _cancel(job: Any) -> None:
    """Let a job save and exit; submitit would give a local one only a second."""
    import submitit

    if isinstance(job, submitit.LocalJob):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(job.job_id), signal.SIGTERM)  # of its controller, which forwards the signal
    else:
        job.cancel(check=False)


def _remote_result(job: Any) -> node.RemoteResult:
    """Return the result of a job, EXIT_LOST if it ended without one."""
    import submitit

    try:
        result: node.RemoteResult = job.result()
        return result
    except submitit.core.utils.FailedJobError as error:  # for example a node without cvlab
        lines = [line for line in str(error).splitlines() if line.strip(" -")]
        return 1, next((line for line in reversed(lines) if not line.startswith((" ", "You can"))), lines[0])
    except submitit.core.utils.UncompletedJobError:
        return EXIT_LOST, f"job {job.job_id} ended without a result ({job.state})"
