"""One training in several processes: which one this is, its share of the work, and what all of them agree on.

torchrun starts the processes (`cvlab train CONFIG --nproc 2` does it too) and tells each its place by the environment.
In a training of one process everything here is the identity. The batch of a step and the order of the data are those of
one process: each takes its share. Process 0 alone writes; what depends on a clock, a signal or the disk it decides for
all, so that no process waits in vain. Paper: Li et al., 2020, "PyTorch Distributed: experiences on accelerating data
parallel training".
"""

import contextlib
import datetime
import functools
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

from cvlab.errors import ConfigError, CvlabError, StoppedError

T = TypeVar("T")
TIMEOUT = datetime.timedelta(seconds=60)  # of one exchange: a process that hangs for longer is given up
REQUIRED_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class PeerLostError(CvlabError):
    """Another process of the training has ended or hangs."""


@dataclass(frozen=True)
class World:
    """Which process this is of how many, in all and on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    launcher: int = 0  # the process that has started this one


@functools.cache
def world() -> World:
    """Return this process's place, as torchrun tells it. ConfigError where what it tells makes no sense."""
    if not all(os.environ.get(name) for name in REQUIRED_VARIABLES):
        return World()
    places = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    try:
        rank, size, local_rank, local_size = (int(os.environ.get(name, alone)) for name, alone in places.items())
    except ValueError as error:
        raise ConfigError(f"of the variables {', '.join(places)} one is no number", "start it by torchrun") from error
    return World(rank, size, local_rank, local_size, os.getppid()) if size > 1 else World()


def is_main() -> bool:
    """Whether this process writes, speaks and decides."""
    return world().rank == 0


def launch_id() -> str | None:
    """Return what torchrun calls this start of several processes; restarts of them bear the same name."""
    return os.environ.get("TORCHELASTIC_RUN_ID") if world().size > 1 else None


def is_restarted() -> bool:
    """Whether torchrun has started these processes again, because one of them had failed."""
    return world().size > 1 and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def threads_per_process(processes: int) -> int:
    """Return this machine's cores for each of so many processes on it, at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // processes)


@contextlib.contextmanager
def init_process_group() -> Iterator[None]:
    """Connect the processes; at the end wait for all of them, unless one of them has failed.

    LostError where another process has gone.
    """
    if world().size == 1:
        yield
        return
    import torch.distributed as dist

    try:
        _connect()
        try:
            yield
        except StoppedError:  # all stop at the same step
            dist.barrier()
            raise
        dist.barrier()  # without it a process that is ready earlier takes the connections of the others with it
        dist.destroy_process_group()
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise PeerLostError("another process of this training has ended") from error


def _connect() -> None:
    """Make the process group: gloo for the CPU, nccl beside it for GPUs."""
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    backend = "cpu:gloo,cuda:nccl" if dist.is_nccl_available() and torch.cuda.is_available() else "gloo"
    store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # torchrun keeps its store when it starts the processes of a machine again, and torch 2.13 would find the
        # addresses of those that have died.
        number = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"start {number}", store)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)


def pending_signal(received: int | None) -> int | None:
    """Return the signal that any process has received; SIGTERM where what has started this one is gone."""
    place = world()
    orphaned = place.size > 1 and os.getppid() != place.launcher
    return received or (int(signal.SIGTERM) if orphaned else None)
