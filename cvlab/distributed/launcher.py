"""A training in several processes on this machine, started by torch's elastic agent, which torchrun is too.

The run directory is made first; each process then resumes it, so that a process that was killed, or the whole
training, can be started again with nothing but its name. Across machines the user calls torchrun, with the same words.
"""

import logging
import os
import signal
import socket
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

from cvlab import console
from cvlab.api import run as api_run
from cvlab.config import loading
from cvlab.data.resolve import Policy
from cvlab.distributed import process_group
from cvlab.errors import ConfigError
from cvlab.runs import run_dir

RETRIED = (1, -signal.SIGKILL, -signal.SIGSEGV, -signal.SIGABRT)  # what may end otherwise the next time
SHUTDOWN_SECONDS = 60  # that the processes have to save when all are asked to stop


def run(path: Path, processes: int, restarts: int, flags: tuple[str, ...]) -> int:
    """Resume a run in so many processes; return the exit code of process 0, or of the one that has failed.

    Where one is killed all are started again, up to `restarts` times.
    """
    command = ("-m", "cvlab", "resume", str(path.resolve()), f"--nproc={processes}", *flags)
    for left in range(restarts, -1, -1):
        code = start(command, processes)
        if code not in RETRIED or left == 0:
            break
        console.say(f"warning: a process ended with {code}; all are started again ({left} times left)")
    return code if code >= 0 else 128 - code


def start(command: tuple[str, ...], processes: int) -> int:
    """Start Python with this command line in so many processes; return 0, or the exit code of the first that failed.

    It is negative where a signal has ended it; that of process 0 counts where it has said what is wrong.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DDP would warn of what it was asked to do
    if "lo" in [name for _, name in socket.if_nameindex()]:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # nothing leaves the machine, whatever its name resolves to
    agent = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        signals_to_handle="SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
        shutdown_timeout=SHUTDOWN_SECONDS,
    )
    logging.disable(logging.ERROR)  # the agent's own; the processes speak for themselves
    try:
        elastic_launch(agent, sys.executable)(*command)
    except SignalException as error:
        return 130 if error.sigval == signal.SIGINT else 143
    except ChildFailedError as error:
        failures = sorted(error.failures.values(), key=lambda failure: failure.timestamp)
        spoken = [failure.exitcode for failure in failures if failure.local_rank == 0 and failure.exitcode > 1]
        return int(spoken[0] if spoken else failures[0].exitcode)
    finally:
        logging.disable(logging.NOTSET)
    return 0


def train(make: Callable[[], Path]) -> api_run.Result:
    """Be one of several processes: take over the run directory that process 0 makes, and train. Empty in the others."""
    if not process_group.is_main():
        console.set_level(quiet=True, verbose=False)
    path = None
    try:
        with process_group.joined():
            path = process_group.from_main(make)
            return api_run.resume(path)
    except process_group.LostError as error:
        error.hint = f"`cvlab resume {path.name if path else 'RUN'}` goes on from the last checkpoint"
        raise


def made(load: Callable[[], loading.Loaded], policy: Policy, root: Path) -> Path:
    """Make a run directory, or, where torchrun has started its processes again, return the one they had."""
    if process_group.is_restarted():
        for path in reversed(run_dir.list_runs(root)):
            if run_dir.read_json(path / "env.json").get("launch") == process_group.launch_id():
                return path
    return api_run.make(load(), policy, root, process_group.world().size)


def require_processes(path: Path, asked: int | None) -> int:
    """Return in how many processes a run is to go on: as many as it was begun in, or as many as are asked for.

    ConfigError where torchrun has started another number than that, or the run is none that so many could train.
    """
    wanted, size = asked or api_run.processes_of(path), process_group.world().size
    if size > 1 and wanted != size:
        raise ConfigError(
            f"{path.name} was begun in {wanted} processes, torchrun has started {size}",
            f"--nproc {size} goes on with them; the result is then not bitwise that of an unbroken run",
        )
    if wanted > 1:
        api_run.require_processes(loading.load(str(run_dir.config_file(path))), wanted)
    return wanted
