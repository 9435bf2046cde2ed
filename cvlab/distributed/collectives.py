"""Collectives between the ranks of a training run; the identity in a single process."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from cvlab.distributed.process_group import T, is_main, world

if TYPE_CHECKING:
    from torch import Tensor, nn


def broadcast_from_rank0(make: Callable[[], T]) -> T:
    """Return on every rank what `make` returns on rank 0; it is called there only."""
    if world().size == 1:
        return make()
    import torch
    import torch.distributed as dist

    values = [make() if is_main() else None]
    dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
    return values[0]  # type: ignore[return-value]


def all_gather_object(value: T) -> list[T]:
    """Return the values of all ranks, in the order of the ranks."""
    if world().size == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * world().size
    dist.all_gather_object(values, value)
    return values


def all_reduce_sums(values: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    """Return sums over all ranks by name.

    Args:
        values: Scalars by name; empty on a rank that has nothing to add. The names of rank 0 count.

    Returns:
        The sums, float64 on the CPU; in a single process the values themselves.
    """
    if world().size == 1:
        return dict(values)
    import torch
    import torch.distributed as dist

    names = broadcast_from_rank0(lambda: list(values))
    sums = torch.tensor([float(values[name]) if name in values else 0.0 for name in names], dtype=torch.float64)
    dist.all_reduce(sums)
    return dict(zip(names, sums, strict=True))


def all_gather_cat(values: "Tensor") -> "Tensor":
    """Concatenate the shards of all ranks, in the order of the ranks: (B / ranks, ...) -> (B, ...)."""
    if world().size == 1:
        return values
    import torch
    import torch.distributed as dist

    shards = [torch.empty_like(values) for _ in range(world().size)]
    dist.all_gather(shards, values.contiguous())
    return torch.cat(shards)


def broadcast_buffers(model: "nn.Module") -> None:
    """Copy the buffers of rank 0 to all ranks: BatchNorm's statistics differ between them."""
    if world().size > 1:
        import torch.distributed as dist

        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)
