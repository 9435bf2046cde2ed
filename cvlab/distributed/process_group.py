"""The process group of a training run: which rank this process is, and how the ranks connect.

torchrun starts the processes (`cvlab train CONFIG --nproc 2` does it too) and describes each by its environment. In a
run of a single process everything in this package is the identity. The batch of a step and the order of the data are
those of a single process; each rank takes its shard. Only rank 0 writes, and it decides for all ranks whatever depends
on a clock, a signal or the disk, so that no rank waits in vain.

References:
    Li et al., 2020, "PyTorch Distributed: experiences on accelerating data parallel training".
"""

import contextlib
import datetime
import functools
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from cvlab import portability
from cvlab.errors import ConfigError, CvlabError, StoppedError

T = TypeVar("T")
TIMEOUT = datetime.timedelta(seconds=60)  # of a collective: a rank that hangs for longer is given up
REQUIRED_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LAUNCHER = "CVLAB_LAUNCHER"  # the process id of the launcher, which may have died when a rank first asks for its parent
ORPHAN_EXIT = 143
POLL_SECONDS = 0.5
DEFAULTS = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


_joined = threading.Event()  # set when the ranks are connected


class PeerLostError(CvlabError):
    """Another rank of the run has ended or hangs."""


@dataclass(frozen=True)
class World:
    """Which rank this process is, of how many, in all and on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    launcher: int = 0  # the process that has started this one

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "World":
        """Read the variables that torchrun sets; a single process if they are missing.

        Raises:
            ConfigError: One of them is not a number.
        """
        if not all(environment.get(name) for name in REQUIRED_VARIABLES):
            return cls()
        try:
            rank, size, local_rank, local_size = (int(environment.get(name, value)) for name, value in DEFAULTS.items())
        except ValueError as error:
            raise ConfigError(
                f"one of the variables {', '.join(DEFAULTS)} is no number", "start it with torchrun"
            ) from error
        launcher = environment.get(LAUNCHER, "")
        parent = int(launcher) if launcher.isdecimal() else os.getppid()
        return cls(rank, size, local_rank, local_size, parent) if size > 1 else cls()


@functools.cache
def world() -> World:
    """Return the world of this process's environment, as it was at the first call."""
    return World.from_environment(os.environ)


def is_main() -> bool:
    """Return whether this is rank 0, which writes, logs and decides."""
    return world().rank == 0


def launch_id() -> str | None:
    """Return torchrun's name of this launch, the same after a restart; None in a single process."""
    return os.environ.get("TORCHELASTIC_RUN_ID") if world().size > 1 else None


def is_restarted() -> bool:
    """Return whether torchrun has started the processes again because one of them had failed."""
    return world().size > 1 and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def threads_per_process(processes: int) -> int:
    """Return how many cores of this machine each of its processes gets, at least one."""
    return max(1, portability.num_cores() // processes)


@contextlib.contextmanager
def init_process_group() -> Iterator[None]:
    """Connect the ranks; at the end wait for all of them, unless one of them has failed.

    Raises:
        PeerLostError: Another rank has ended or hangs.
    """
    if world().size == 1:
        yield
        return
    import torch.distributed as dist

    try:
        _connect()
        _joined.set()
        try:
            yield
        except StoppedError:  # all ranks stop after the same step
            dist.barrier()
            raise
        dist.barrier()  # without it a rank that finishes earlier closes the connections of the others
        dist.destroy_process_group()
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise PeerLostError("another process of this run has ended") from error


def _connect() -> None:
    """Create the process group: gloo for the CPU, nccl in addition for GPUs."""
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    backend = "cpu:gloo,cuda:nccl" if dist.is_nccl_available() and torch.cuda.is_available() else "gloo"
    store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # torchrun keeps its store when it restarts the processes of a machine, and torch 2.13 would find the addresses
        # of those that have died.
        number = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"start {number}", store)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)


def watch_launcher() -> None:
    """End this process if its launcher dies before the ranks have joined, when no step asks for `pending_signal`."""
    if world().size > 1:
        threading.Thread(target=_exit_if_orphaned, daemon=True).start()


def _exit_if_orphaned() -> None:
    while not _joined.wait(POLL_SECONDS):
        if os.getppid() != world().launcher:
            os._exit(ORPHAN_EXIT)  # the main thread may be waiting for the other ranks


def pending_signal(received: int | None) -> int | None:
    """Return the signal that this process has received, or SIGTERM if the process that started it is gone."""
    is_orphaned = world().size > 1 and os.getppid() != world().launcher
    return received or (int(signal.SIGTERM) if is_orphaned else None)
