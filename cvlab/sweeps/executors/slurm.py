"""Arms as Slurm jobs, by submitit. A job that is preempted or out of time saves, is queued again and goes on.

`address: local` runs the same jobs on this machine, one process each, for trying things where there is no Slurm.
"""

import contextlib
import logging
import os
import signal
import time
from types import FrameType
from typing import Any

from cvlab.errors import ConfigError
from cvlab.runs.interrupt import StopRequest
from cvlab.sweeps.executors import EXIT_LOST, POLL_SECONDS, Events, Limits, Take, Task, node

FOLDER = "slurm"  # of the sweep's directory: what submitit writes about each job
ROOM = 64  # jobs in the queue at a time, unless told otherwise
REQUEUES = 1000  # each goes on from a checkpoint, so that many are no fault
SAVE_SECONDS = 90  # between the signal that time is up and the end of a job


class TrialJob:
    """What a job calls. submitit asks `checkpoint` for what is to be queued again when the job has to go."""

    def __init__(self, errand: node.RemoteTask) -> None:
        self.errand = errand
        self.child: node.TrialProcess | None = None

    def __call__(self) -> node.RemoteResult:
        """Run the arm."""
        before = signal.signal(signal.SIGTERM, self._interrupt)  # submitit would let it pass; `scancel` sends it
        try:
            return node.run(self.errand, self._keep)
        finally:
            signal.signal(signal.SIGTERM, before)

    def _keep(self, child: node.TrialProcess) -> None:
        self.child = child

    def _interrupt(self, _number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    def checkpoint(self) -> Any:
        """Let the arm save and end; the next job resumes it."""
        from submitit.helpers import DelayedSubmission

        if self.child is not None:
            self.child.stop()
        return DelayedSubmission(TrialJob(self.errand))


def run(take: Take, limits: Limits, stop: StopRequest) -> Events:
    """Run each arm as a job of its own."""
    executor = _executor(limits)
    running: dict[Task, Any] = {}
    try:
        while stop.received is None:
            while len(running) < (limits.workers or ROOM) and (task := take()) is not None:
                running[task] = _submit(executor, task)
            if not running:
                return
            for task in [task for task, job in running.items() if job.done()]:
                yield node.task_result(task, _remote_result(running.pop(task)))
            time.sleep(POLL_SECONDS)
            yield None
    finally:
        for job in running.values():  # what they leave behind is in the run directories, and nobody asks for more
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
    """Submit a job; ConfigError where Slurm refuses it.

    Ctrl-C is not for it: on this machine it would be in the group that a terminal sends it to.
    """
    import submitit

    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        return executor.submit(TrialJob(node.remote_task(task)))
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        hint = "change submit.partition, submit.cpus, submit.gpus or submit.minutes"
        raise ConfigError(f"Slurm refuses the job: {str(error).strip().splitlines()[-1]}", hint) from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _cancel(job: Any) -> None:
    """Let a job save and end. submitit would give one on this machine a second for that."""
    import submitit

    if isinstance(job, submitit.LocalJob):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(job.job_id), signal.SIGTERM)  # its controller, which passes it on
    else:
        job.cancel(check=False)


def _remote_result(job: Any) -> node.RemoteResult:
    """Return what a job has answered; one that has ended without a word has died."""
    import submitit

    try:
        answer: node.RemoteResult = job.result()
        return answer
    except submitit.core.utils.FailedJobError as error:  # nothing of ours: for example a node without cvlab
        lines = [line for line in str(error).splitlines() if line.strip(" -")]
        return 1, next((line for line in reversed(lines) if not line.startswith((" ", "You can"))), lines[0])
    except submitit.core.utils.UncompletedJobError:
        return EXIT_LOST, f"job {job.job_id} ended without a result ({job.state})"
