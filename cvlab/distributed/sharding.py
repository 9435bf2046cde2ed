"""Which part of a batch or data set belongs to this rank."""

from typing import TYPE_CHECKING

from cvlab.distributed.process_group import world
from cvlab.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


def rank_seed(seed: int) -> int:
    """Return a seed of this process alone, below 2^32 (numpy takes no larger one)."""
    return (seed + 2_654_435_761 * world().rank) % 2**32  # 2^32 divided by the golden ratio


def shard(indices: "Tensor") -> "Tensor":
    """Return this process's part of what a step takes in all, (B,) -> (B / processes,)."""
    place = world()
    size = len(indices) // place.size
    return indices if place.size == 1 else indices[place.rank * size : (place.rank + 1) * size]


def require_divisible(count: int, size: int) -> None:
    """Raise ConfigError unless so many processes can share a batch equally."""
    if count % size:
        raise ConfigError(f"batch_size {count}: {size} processes cannot share it equally", f"give a multiple of {size}")


def shard_range(count: int, rank: int | None = None, size: int | None = None) -> tuple[int, int]:
    """Return from where to where a process evaluates `count` items, so that each is seen once."""
    rank = world().rank if rank is None else rank
    base, more = divmod(count, size or world().size)
    start = rank * base + min(rank, more)
    return start, start + base + (rank < more)
