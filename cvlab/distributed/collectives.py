"""Collectives between the ranks of one training run; the identity in a single process."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from cvlab.distributed.process_group import T, is_main, world

if TYPE_CHECKING:
    from torch import Tensor, nn


def broadcast_from_rank0(make: Callable[[], T]) -> T:
    """Return what `make` gives in process 0, in all of them."""
    if world().size == 1:
        return make()
    import torch
    import torch.distributed as dist

    found = [make() if is_main() else None]
    dist.broadcast_object_list(found, src=0, device=torch.device("cpu"))
    return found[0]  # type: ignore[return-value]


def all_gather_object(value: T) -> list[T]:
    """Return the values of all processes, in their order."""
    if world().size == 1:
        return [value]
    import torch.distributed as dist

    found: list[Any] = [None] * world().size
    dist.all_gather_object(found, value)
    return found


def all_reduce_sums(values: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    """Return the sums over all processes, float64 on the CPU; a process that has nothing to add has no values."""
    if world().size == 1:
        return dict(values)
    import torch
    import torch.distributed as dist

    names = broadcast_from_rank0(lambda: list(values))
    sums = torch.tensor([float(values[name]) if name in values else 0.0 for name in names], dtype=torch.float64)
    dist.all_reduce(sums)
    return dict(zip(names, sums, strict=True))


def all_gather_cat(values: "Tensor") -> "Tensor":
    """Return the values of all processes one after the other: their shares of a batch, (B / processes,) -> (B,)."""
    if world().size == 1:
        return values
    import torch
    import torch.distributed as dist

    parts = [torch.empty_like(values) for _ in range(world().size)]
    dist.all_gather(parts, values.contiguous())
    return torch.cat(parts)


def broadcast_buffers(model: "nn.Module") -> None:
    """Give all processes the buffers of process 0: the statistics of BatchNorm are each process's own."""
    if world().size > 1:
        import torch.distributed as dist

        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)
