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
import math
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from cvlab.errors import ConfigError, CvlabError, StoppedError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    LossFn = Callable[[nn.Module, Any], dict[str, Tensor]]

T = TypeVar("T")
TIMEOUT = datetime.timedelta(seconds=60)  # of one exchange: a process that hangs for longer is given up
BUCKET_MB = 100  # of gradients that go together; on a CPU the exchange takes the core from the backward pass
NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class LostError(CvlabError):
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
    if not all(os.environ.get(name) for name in NEEDED):
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


def threads_each(processes: int) -> int:
    """Return this machine's cores for each of so many processes on it, at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // processes)


@contextlib.contextmanager
def joined() -> Iterator[None]:
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
        raise LostError("another process of this training has ended") from error


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


def own_seed(seed: int) -> int:
    """Return a seed of this process alone, below 2^32 (numpy takes no larger one)."""
    return (seed + 2_654_435_761 * world().rank) % 2**32  # 2^32 divided by the golden ratio


def share(indices: "Tensor") -> "Tensor":
    """Return this process's part of what a step takes in all, (B,) -> (B / processes,)."""
    place = world()
    size = len(indices) // place.size
    return indices if place.size == 1 else indices[place.rank * size : (place.rank + 1) * size]


def require_shares(count: int, size: int) -> None:
    """Raise ConfigError unless so many processes can share a batch equally."""
    if count % size:
        raise ConfigError(f"batch_size {count}: {size} processes cannot share it equally", f"give a multiple of {size}")


def bounds(count: int, rank: int | None = None, size: int | None = None) -> tuple[int, int]:
    """Return from where to where a process evaluates `count` items, so that each is seen once."""
    rank = world().rank if rank is None else rank
    base, more = divmod(count, size or world().size)
    start = rank * base + min(rank, more)
    return start, start + base + (rank < more)


def from_main(make: Callable[[], T]) -> T:
    """Return what `make` gives in process 0, in all of them."""
    if world().size == 1:
        return make()
    import torch
    import torch.distributed as dist

    found = [make() if is_main() else None]
    dist.broadcast_object_list(found, src=0, device=torch.device("cpu"))
    return found[0]  # type: ignore[return-value]


def gathered(value: T) -> list[T]:
    """Return the values of all processes, in their order."""
    if world().size == 1:
        return [value]
    import torch.distributed as dist

    found: list[Any] = [None] * world().size
    dist.all_gather_object(found, value)
    return found


def total(values: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    """Return the sums over all processes, float64 on the CPU; a process that has nothing to add has no values."""
    if world().size == 1:
        return dict(values)
    import torch
    import torch.distributed as dist

    names = from_main(lambda: list(values))
    sums = torch.tensor([float(values[name]) if name in values else 0.0 for name in names], dtype=torch.float64)
    dist.all_reduce(sums)
    return dict(zip(names, sums, strict=True))


def concatenated(values: "Tensor") -> "Tensor":
    """Return the values of all processes one after the other: their shares of a batch, (B / processes,) -> (B,)."""
    if world().size == 1:
        return values
    import torch
    import torch.distributed as dist

    parts = [torch.empty_like(values) for _ in range(world().size)]
    dist.all_gather(parts, values.contiguous())
    return torch.cat(parts)


def same_buffers(model: "nn.Module") -> None:
    """Give all processes the buffers of process 0: the statistics of BatchNorm are each process's own."""
    if world().size > 1:
        import torch.distributed as dist

        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def stop_wanted(received: int | None) -> int | None:
    """Return the signal that any process has received; SIGTERM where what has started this one is gone."""
    place = world()
    orphaned = place.size > 1 and os.getppid() != place.launcher
    return received or (int(signal.SIGTERM) if orphaned else None)


class Alone:
    """The losses of a step in one process; `Averaged` is the same for several."""

    def __init__(self, model: "nn.Module", loss_fn: "LossFn") -> None:
        self.model, self.loss_fn = model, loss_fn
        self.wishes: Sequence[bool] = ()

    def losses(self, batch: Any, wishes: Sequence[bool]) -> "dict[str, Tensor]":
        """Return the losses of a batch."""
        self.wishes = wishes
        return self.loss_fn(self.model, batch)

    def agreed(self, losses: "Mapping[str, Tensor]") -> tuple[list[bool], bool]:
        """Return, after the backward pass, what any process wished for, and whether the loss is finite in all."""
        return list(self.wishes), math.isfinite(losses["loss"].item())


class Averaged(Alone):
    """The losses of a step in one of several processes: their gradients are means over all, by torch's DDP.

    What each process wishes for, and whether its loss is finite, is the gradient of a parameter that is always 0: it
    goes with the other gradients in one exchange, where one of its own costs a small net a tenth of its step. The
    buckets stay as they are made (`find_unused_parameters` brings that about), so that a training that goes on adds in
    the order of one that was never stopped. Statistics of BatchNorm are not exchanged: those of process 0 count.
    """

    def __init__(self, model: "nn.Module", loss_fn: "LossFn", device: "torch.device", num_wishes: int) -> None:
        super().__init__(model, loss_fn)
        import torch
        from torch import nn
        from torch.nn.parallel import DistributedDataParallel

        dtype = next(model.parameters()).dtype

        class Losses(nn.Module):
            """The losses as a module, whose parameters are the model's: a model's other methods may be called too."""

            def __init__(self) -> None:
                super().__init__()
                self.model = model
                self.wishes = nn.Parameter(torch.zeros(num_wishes + 1, dtype=dtype, device=device))

            def forward(self, batch: Any, wishes: "Tensor") -> "dict[str, Tensor]":
                losses = loss_fn(self.model, batch)
                diverged = ~torch.isfinite(losses["loss"].detach()).view(1)
                given = torch.cat([wishes, diverged.to(wishes)])
                return losses | {"loss": losses["loss"] + (self.wishes * given).sum().to(losses["loss"])}

        ids = [device.index] if device.type == "cuda" else None
        self.inner = Losses()
        self.outer = DistributedDataParallel(
            self.inner, device_ids=ids, find_unused_parameters=True, broadcast_buffers=False, bucket_cap_mb=BUCKET_MB
        )

    def losses(self, batch: Any, wishes: Sequence[bool]) -> "dict[str, Tensor]":
        """Return the losses of this process's share of a batch."""
        found: dict[str, Tensor] = self.outer(batch, self.inner.wishes.new_tensor([float(wish) for wish in wishes]))
        return found

    def agreed(self, losses: "Mapping[str, Tensor]") -> tuple[list[bool], bool]:
        """Return, after the backward pass, what any process wished for, and whether the loss is finite in all."""
        assert self.inner.wishes.grad is not None
        *wishes, diverged = (self.inner.wishes.grad > 0).tolist()
        self.inner.wishes.grad = None
        return wishes, not diverged


def together(model: "nn.Module", loss_fn: "LossFn", device: "torch.device", num_wishes: int) -> Alone:
    """Return the losses of a step for as many processes as there are."""
    return Alone(model, loss_fn) if world().size == 1 else Averaged(model, loss_fn, device, num_wishes)
