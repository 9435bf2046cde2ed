"""Arrays of rows that take long to compute: kept on the disk as they are filled, verified, and memory-mapped.

`<key>.rows` holds the rows in order. `<key>.jsonl` has a line for each complete block of rows: the number of rows up
to its end, the CRC-32 of its bytes, and a note for each of its rows. A block is written and synced before its line, so
that after a kill or a power cut the rows of all lines are valid, and the next process continues behind them.
"""

import contextlib
import json
import os
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from cvlab import console
from cvlab.errors import CvlabError
from cvlab.storage import atomic, lock

WAIT_SECONDS = 24 * 3600.0  # for another process that fills the same array
Notes = list[Any]
ComputeRows = Callable[[int, int], tuple[np.ndarray, Notes]]


@dataclass(frozen=True)
class RowArray:
    """Rows (N, ...), read-only in effect: changes are private to this process. `notes` has a JSON value for each."""

    rows: np.ndarray
    notes: Notes


@dataclass(frozen=True)
class RowSpec:
    """The number of rows, the shape and type of each, and how many are computed and written at a time."""

    count: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    block: int

    @property
    def row_bytes(self) -> int:
        """Size of a row."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def blocks(self, start: int = 0) -> Iterator[tuple[int, int]]:
        """Yield the first row of each block from row `start` on, and the one behind its last."""
        for first in range(start, self.count, self.block):
            yield first, min(first + self.block, self.count)


def load_or_compute(path: Path, spec: RowSpec, compute: ComputeRows) -> RowArray:
    """Return an array from the disk, after computing the rows that are not there yet.

    If the disk cannot be written, a warning is printed and the array is computed in memory.

    Args:
        path: Path of the array, without a suffix; its name identifies everything that the rows depend on.
        spec: The rows.
        compute: Called as `compute(start, end)`; returns the rows of a block and a note for each. It may raise to stop:
            the blocks before it stay.

    Returns:
        The rows, mapped into memory, and their notes.

    Raises:
        RunDirError: Another process fills the array, and takes too long.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with lock.exclusive(path.with_suffix(".lock"), WAIT_SECONDS):
            notes = _verify(path, spec)
            if len(notes) < spec.count:
                notes = _fill(path, spec, compute, notes)
        return RowArray(_map(path, spec), notes)
    except (OSError, _DiskError) as error:
        console.info(f"warning: {path.parent} cannot be written, so what is computed is not kept: {error}")
        return _in_memory(spec, compute)


class _DiskError(CvlabError):
    """The disk cannot be written; an error of `compute` is not one of these."""


def _in_memory(spec: RowSpec, compute: ComputeRows) -> RowArray:
    rows, notes = np.empty((spec.count, *spec.shape), spec.dtype), []
    for start, end in spec.blocks():
        rows[start:end], block_notes = compute(start, end)
        notes += block_notes
    return RowArray(rows, notes)


def _verify(path: Path, spec: RowSpec) -> Notes:
    """Return the notes of the rows that are complete and undamaged, and remove what follows them."""
    notes: Notes = []
    valid_lines = 0
    with contextlib.suppress(FileNotFoundError):
        lines = path.with_suffix(".jsonl").read_bytes().splitlines(keepends=True)
        with path.with_suffix(".rows").open("rb") as file:
            for line in lines:
                block_notes = _valid_block(line, file, len(notes), spec)
                if block_notes is None:
                    console.info(f"warning: {path}.rows is damaged from row {len(notes)} on, which is computed again")
                    break
                notes += block_notes
                valid_lines += len(line)
        os.truncate(path.with_suffix(".jsonl"), valid_lines)
    return notes


def _valid_block(line: bytes, file: BinaryIO, start: int, spec: RowSpec) -> Notes | None:
    """Return the notes of a line whose block, which begins at row `start`, has its CRC; None if it does not."""
    try:
        record = json.loads(line)
        end, notes = record["end"], record["notes"]
        is_next = (start, end) == next(iter(spec.blocks(start)), None) and len(notes) == end - start
        content = file.read((end - start) * spec.row_bytes) if is_next and line.endswith(b"\n") else b""
        return notes if content and zlib.crc32(content) == record["crc32"] else None
    except (ValueError, KeyError, TypeError):
        return None


def _fill(path: Path, spec: RowSpec, compute: ComputeRows, notes: Notes) -> Notes:
    notes = list(notes)
    with _disk_errors(), path.with_suffix(".rows").open("ab") as file:
        os.ftruncate(file.fileno(), len(notes) * spec.row_bytes)
    with (
        path.with_suffix(".rows").open("ab") as rows_file,
        path.with_suffix(".jsonl").open("ab") as index_file,
        ThreadPoolExecutor(1) as writer,  # a block is written while the next one is computed
    ):

        def write(content: memoryview, end: int, block_notes: Notes) -> None:
            line = json.dumps({"end": end, "crc32": zlib.crc32(content), "notes": block_notes}) + "\n"
            with _disk_errors():
                chunks: tuple[tuple[BinaryIO, memoryview | bytes], ...] = (
                    (rows_file, content),
                    (index_file, line.encode()),
                )
                for file, chunk in chunks:
                    file.write(chunk)
                    file.flush()
                    atomic.sync_file(file.fileno(), path)

        written: Future[None] | None = None
        for start, end in spec.blocks(len(notes)):
            rows, block_notes = compute(start, end)
            if written is not None:
                written.result()
            content = np.ascontiguousarray(rows, spec.dtype).data.cast("B")
            written = writer.submit(write, content, end, block_notes)
            notes += block_notes
        if written is not None:
            written.result()
    return notes


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _DiskError(error.strerror or str(error)) from error


def _map(path: Path, spec: RowSpec) -> np.ndarray:
    """Map the rows into memory, copy-on-write; unlike `np.memmap` this keeps no file open."""
    import torch

    content = torch.from_file(
        str(path.with_suffix(".rows")), shared=False, size=spec.count * spec.row_bytes, dtype=torch.uint8
    )
    rows: np.ndarray = content.numpy().view(spec.dtype).reshape(spec.count, *spec.shape)
    return rows
