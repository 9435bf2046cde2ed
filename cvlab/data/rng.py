"""Counter-based random numbers: pure functions of (seed, epoch, index), so that no generator state needs saving.

SplitMix64 (Steele, Lea and Flood, 2014, figure 16) over a counter, in int64 arithmetic that wraps around, so that the
numbers are the same on CPU and GPU and in any order of evaluation. A `stream` names the use: two streams of the same
(seed, epoch, index) are independent.
"""

import functools
import math
import zlib

import torch
from torch import Tensor

GOLDEN = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed integer; so are the other two
MIX_1 = -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
MIX_2 = -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
MAX_UINT64 = (1 << 64) - 1
ITEM_BITS = 24  # of an index, for the position within an item


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift right and fill with zeros; torch's shift of int64 fills with the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * MIX_1
    x = (x ^ _shift(x, 27)) * MIX_2
    return x ^ _shift(x, 31)


def hashes(seed: int, epoch: int, indices: Tensor, stream: str) -> Tensor:
    """Return int64 hashes of (seed, stream, epoch, index), one per index, of the shape of `indices` (int64)."""
    return _mix(_mix((indices ^ _key(seed, epoch, stream)) + GOLDEN) + GOLDEN)


@functools.lru_cache(maxsize=1000)
def _key(seed: int, epoch: int, stream: str) -> int:
    """Return what the indices of a stream in an epoch are mixed with: SplitMix64 of the three, as a signed integer."""
    key = 0
    for part in (seed, zlib.crc32(stream.encode()), epoch):
        key = ((key ^ part) + GOLDEN) & MAX_UINT64
        key = (key ^ key >> 30) * MIX_1 & MAX_UINT64
        key = (key ^ key >> 27) * MIX_2 & MAX_UINT64
        key ^= key >> 31
    return key - (1 << 64) if key >> 63 else key


def uniform(seed: int, epoch: int, indices: Tensor, stream: str) -> Tensor:
    """Return float64 numbers uniform in [0, 1), one per index, of the shape of `indices` (int64)."""
    return _shift(hashes(seed, epoch, indices, stream), 11).double() * 2.0**-53


def uniform_items(seed: int, epoch: int, numbers: Tensor, shape: tuple[int, ...], stream: str) -> Tensor:
    """Return float32 numbers uniform in [0, 1] for items of a shape, such as images: (N, *shape) for numbers (N,).

    Those of an item depend on its number and not on which other items there are.
    """
    positions = torch.arange(math.prod(shape), device=numbers.device)
    return uniform(seed, epoch, (numbers[:, None] << ITEM_BITS) + positions, stream).view(-1, *shape).float()


def permutation(seed: int, epoch: int, count: int, device: torch.device) -> Tensor:
    """Return a random permutation of 0 .. count - 1: int64 (count,)."""
    indices = torch.arange(count, device=device)
    return torch.argsort(hashes(seed, epoch, indices, "order"), stable=True)


class BatchSampler:
    """The indices of a batch as a pure function of (seed, step): shuffled epochs without the last partial batch."""

    def __init__(self, seed: int, count: int, batch_size: int, device: torch.device) -> None:
        self.seed, self.count, self.device = seed, count, device
        self.batch_size = min(batch_size, count)
        self.steps_per_epoch = max(1, count // batch_size)
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    def __call__(self, step: int) -> tuple[int, Tensor]:
        """Return the epoch of a step and the indices of its batch, int64 (batch_size,)."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            self._order = (epoch, permutation(self.seed, epoch, self.count, self.device))
        return epoch, self._order[1][position * self.batch_size : (position + 1) * self.batch_size]


def normal(seed: int, epoch: int, shape: tuple[int, ...], stream: str) -> Tensor:
    """Return float32 standard normal numbers of a shape, by the Box-Muller transform."""
    count = math.prod(shape)
    indices = torch.arange(2 * count).view(2, count)
    u = uniform(seed, epoch, indices, stream)
    return (torch.sqrt(-2 * torch.log1p(-u[0])) * torch.cos(2 * math.pi * u[1])).float().view(shape)
