"""Which part of a batch or a data set belongs to this rank."""

from typing import TYPE_CHECKING

from cvlab.distributed.process_group import world
from cvlab.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


def rank_seed(seed: int) -> int:
    """Return a seed that differs between ranks, below 2^32, which is numpy's limit."""
    return (seed + 2_654_435_761 * world().rank) % 2**32  # 2^32 divided by the golden ratio


def shard(indices: "Tensor") -> "Tensor":
    """Return this rank's shard of the indices of a batch: (B,) -> (B / ranks,)."""
    rank, size = world().rank, world().size
    count = len(indices) // size
    return indices if size == 1 else indices[rank * count : (rank + 1) * count]


def require_divisible(count: int, size: int) -> None:
    """Raise ConfigError unless a batch of `count` items can be divided equally among `size` ranks."""
    if count % size:
        raise ConfigError(f"batch_size {count}: {size} processes cannot share it equally", f"give a multiple of {size}")


def shard_range(count: int, rank: int | None = None, size: int | None = None) -> tuple[int, int]:
    """Return the range of items that a rank evaluates, so that each item is evaluated once.

    Args:
        count: Number of items.
        rank: The rank, by default this one.
        size: Number of ranks, by default that of the process group.

    Returns:
        First item and end of the range. Ranges differ in length by at most 1.
    """
    rank = world().rank if rank is None else rank
    base, remainder = divmod(count, size or world().size)
    start = rank * base + min(rank, remainder)
    return start, start + base + (rank < remainder)
