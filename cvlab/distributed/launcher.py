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
from pathlib import Path

from cvlab import console

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
        console.info(f"warning: a process ended with {code}; all are started again ({left} times left)")
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
