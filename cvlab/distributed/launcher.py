"""Start a run in several processes on this machine with torch's elastic agent, as torchrun does.

The run directory is created first; each process then resumes it, so that a process that was killed, or the whole run,
can be started again from its name alone. Across machines users call torchrun with the same arguments.
"""

import logging
import os
import signal
import socket
import sys
import uuid
from pathlib import Path

from cvlab import console, portability
from cvlab.distributed.process_group import LAUNCHER

RETRIED_CODES = (1, *(-number for number in portability.FATAL_SIGNALS))  # failures that may not happen again
SHUTDOWN_SECONDS = "60"  # for the processes to save when all are asked to stop; torch before 2.11 gives them 30


def run(path: Path, processes: int, restarts: int, flags: tuple[str, ...]) -> int:
    """Resume a run in several processes; if one of them is killed, all are started again.

    Args:
        path: The run directory.
        processes: Number of processes.
        restarts: How often they may be started again.
        flags: Options of `cvlab resume`.

    Returns:
        The exit code of rank 0, or of the process that has failed.
    """
    command = ("-m", "cvlab", "resume", str(path.resolve()), f"--nproc={processes}", *flags)
    for restarts_left in range(restarts, -1, -1):
        code = start(command, processes)
        if code not in RETRIED_CODES or restarts_left == 0:
            break
        console.info(f"warning: a process ended with {code}; restarting all processes ({restarts_left} restarts left)")
    return code if code >= 0 else 128 - code


def start(command: tuple[str, ...], processes: int) -> int:
    """Start Python with a command line in several processes and wait for them.

    Args:
        command: Arguments of the Python interpreter.
        processes: Number of processes.

    Returns:
        0, or the exit code of the first process that failed, negative if a signal has ended it; that of rank 0 takes
        precedence if it has reported an error.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DDP would warn of find_unused_parameters
    if "lo" in [name for _, name in socket.if_nameindex()]:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # nothing leaves the machine, whatever its name resolves to
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SHUTDOWN_SECONDS)  # torch 2.10 has no argument for it
    os.environ[LAUNCHER] = str(os.getpid())
    agent = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        signals_to_handle=",".join(number.name for number in portability.AGENT_SIGNALS),
    )
    logging.disable(logging.ERROR)  # messages of the agent; the processes report their own errors
    try:
        elastic_launch(agent, sys.executable)(*command)
    except SignalException as error:
        return 130 if error.sigval == signal.SIGINT else 143
    except ChildFailedError as error:
        failures = sorted(error.failures.values(), key=lambda failure: failure.timestamp)
        reported = [failure.exitcode for failure in failures if failure.local_rank == 0 and failure.exitcode > 1]
        return int(reported[0] if reported else failures[0].exitcode)
    finally:
        logging.disable(logging.NOTSET)
    return 0
