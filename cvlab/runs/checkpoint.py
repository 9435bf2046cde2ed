"""Checkpoints that survive `kill -9`, and that are verified before they are used.

A checkpoint is `checkpoints/step_000001200.pt`: what `torch.save` writes, sealed by a SHA-256 over the whole file in
the zip's comment, written in durable order. torch itself checks no checksum at all; a zip's own CRC-32 would miss its
headers and padding. Reading checks the seal, then loads with `weights_only=True`, so that no file can run code. The
newest is the highest step that verifies, never the latest date.
"""

import hashlib
import math
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from cvlab.errors import CheckpointError, DivergedError
from cvlab.storage import atomic
from cvlab.storage.failpoints import reach

State = dict[str, Any]
KEEP = 2
STEP_FILE = re.compile(r"step_(\d{9})\.pt\Z")
BEST = "best.pt"
CHUNK_BYTES = 1024**2
CHECKSUM_PREFIX = b"cvlab sha256 "
CHECKSUM_BYTES = len(CHECKSUM_PREFIX) + 64
MAX_PICKLE_BYTES = 64 * 1024**2  # names, shapes and numbers of a state; the tensors are members of their own


class _ChecksumWriter:
    """A file that hashes what it writes and ends the zip with its SHA-256 as the archive's comment."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.hash = hashlib.sha256()
        self.held = b""  # the last two bytes: in the end they are the length of the comment, zero until it is known

    def write(self, data: bytes) -> int:
        self._emit(self.held)
        self.held = bytes(data[-2:])
        self._emit(data[:-2])
        return len(data)

    def _emit(self, data: bytes) -> None:
        self.hash.update(data)
        self.file.write(data)

    def flush(self) -> None:
        self.file.flush()

    def seal(self) -> None:
        assert self.held == b"\0\0", "a zip without a comment ends with its length, zero"
        self._emit(CHECKSUM_BYTES.to_bytes(2, "little"))
        self.file.write(CHECKSUM_PREFIX + self.hash.hexdigest().encode())


def write(path: Path, state: State) -> None:
    """Write a state durably and sealed."""

    def fill(file: BinaryIO) -> None:
        sealer = _ChecksumWriter(file)
        torch.save(state, sealer)  # type: ignore[arg-type]
        sealer.seal()

    atomic.write(path, fill)


def path_of(folder: Path, step: int) -> Path:
    """Return the file of the checkpoint after `step` steps."""
    return folder / f"step_{step:09d}.pt"


def steps(folder: Path) -> list[int]:
    """Return the steps of which there is a checkpoint file, ascending; the files are not verified."""
    if not folder.is_dir():
        return []
    return sorted(int(match[1]) for path in folder.iterdir() if (match := STEP_FILE.match(path.name)))


def save(folder: Path, step: int, state: State, is_best: bool = False) -> Path:
    """Write a checkpoint durably, link it as the best if it is, then remove all but the newest two and the best.

    Raises:
        RunDirError: The disk refuses.
        DivergedError: Weights are not finite; nothing is written.
    """
    require_finite(state)
    path = path_of(folder, step)
    try:
        folder.mkdir(exist_ok=True)  # not its parents: a run directory that was removed is not to come back half
        write(path, state)
        if is_best:
            link_best(path)
        reach("before_gc")
        for old in steps(folder)[:-KEEP]:
            path_of(folder, old).unlink(missing_ok=True)
    except OSError as error:
        raise atomic.disk_error(path, error) from error
    return path


def link_best(path: Path) -> None:
    """Make a checkpoint the best one, by a hard link."""
    temporary = path.parent / f".{BEST}{atomic.TEMPORARY}"
    temporary.unlink(missing_ok=True)
    os.link(path, temporary)
    temporary.replace(path.parent / BEST)
    temporary.unlink(missing_ok=True)  # rename(2) does nothing where both names are links to one file already
    atomic.sync_directory(path.parent)


def require_finite(state: State) -> None:
    """Raise DivergedError naming the first weight that is nan or infinite."""
    for name, tensor in state.get("model", {}).items():
        if tensor.is_floating_point() and tensor.numel() and not math.isfinite(_largest(tensor)):
            raise DivergedError(f"weight {name} is not finite at step {state.get('step')}", "lower optimizer.lr")


def _largest(tensor: torch.Tensor) -> float:
    """Return max |x|, nan if there is one; two reductions instead of a mask as large as the tensor."""
    low, high = torch.aminmax(tensor.detach())
    return max(abs(float(low)), abs(float(high))) if not low.isnan() else math.nan


def load(path: Path) -> State:
    """Verify and read one checkpoint onto the CPU. CheckpointError says what is wrong with it."""
    try:
        verify(path)
        # Explicit, since TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD can only flip the default.
        state = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines()] or [type(error).__name__]
        reason = next((line for line in lines if "Unsupported" in line), lines[0])[:160]
        raise CheckpointError(f"{path}: not a valid checkpoint: {reason}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: not a valid checkpoint: it holds a {type(state).__name__}")
    return state


def verify(path: Path) -> None:
    """Check the seal, then that no member is compressed or claims more bytes than the file has."""
    with path.open("rb") as file:
        body_bytes = file.seek(0, os.SEEK_END) - CHECKSUM_BYTES
        file.seek(max(body_bytes, 0))
        seal = file.read()
        file.seek(0)
        actual = hashlib.sha256()
        while body_bytes > 0 and (chunk := file.read(min(CHUNK_BYTES, body_bytes))):
            actual.update(chunk)
            body_bytes -= len(chunk)
    if not seal.startswith(CHECKSUM_PREFIX):
        raise CheckpointError(f"{path}: damaged: incomplete, or not a checkpoint of cvlab")
    if seal != CHECKSUM_PREFIX + actual.hexdigest().encode():
        raise CheckpointError(f"{path}: damaged: its checksum differs")
    require_plain(path)


def require_plain(path: Path) -> None:
    """Refuse a zip whose members are compressed, or claim more bytes than the file has, or whose index is huge."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    if (
        any(m.compress_type != zipfile.ZIP_STORED for m in members)
        or sum(m.file_size for m in members) > path.stat().st_size
    ):
        raise CheckpointError(f"{path}: not a valid checkpoint: compressed or lying members")
    if any(m.filename.endswith(".pkl") and m.file_size > MAX_PICKLE_BYTES for m in members):
        raise CheckpointError(f"{path}: not a valid checkpoint: its index is too large")


def load_latest(folder: Path, report: Callable[[str], None]) -> tuple[Path, State]:
    """Return the checkpoint with the highest step that verifies, the best one where none of them does.

    `report` is told of each one that does not. Raises CheckpointError where there is none: never a silent fresh start.
    """
    found = [path_of(folder, step) for step in reversed(steps(folder))]
    found += [folder / BEST] if (folder / BEST).is_file() else []
    for path in found:
        try:
            return path, load(path)
        except CheckpointError as error:
            report(f"warning: {error.message}; trying the one before")
    reason = "all checkpoints are damaged" if found else "there is no checkpoint"
    raise CheckpointError(f"{folder}: {reason}", "start the run again with `cvlab run` on its config.yaml")


def check_complete(missing: list[str], path: Path) -> None:
    """Raise CheckpointError where pieces of a state are missing."""
    if missing:
        raise CheckpointError(f"{path}: lacks {', '.join(missing)}", "it was not written by this version of cvlab")


def check_same_config(state: State, digest: str, fingerprint: State, path: Path, report: Callable[[str], None]) -> None:
    """Raise CheckpointError unless a state belongs to the configuration with this digest.

    `report` is called for each part of the fingerprint that has changed since: the result will not be bit-for-bit
    identical to that of an uninterrupted run.
    """
    if state["config_sha256"] != digest:
        raise CheckpointError(f"{path}: config.yaml was changed since", "start the changed one with `cvlab run`")
    for key, now in fingerprint.items():
        before = state["fingerprint"].get(key)
        if before != now:
            report(f"warning: {key} was {before}, is {now}: the result is not bitwise that of an uninterrupted run")


def weights_digest(weights: State) -> str:
    """Return the SHA-256 of names, shapes, dtypes and bytes of a state_dict: equal only for equal bits."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def match_model(model: torch.nn.Module, weights: State, path: Path | str) -> None:
    """Raise CheckpointError unless names, shapes and dtypes of `weights` are those of `model`."""
    own = model.state_dict()
    missing, extra = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    if missing or extra:
        parts = [
            f"{len(names)} {word} ({names[0]}, ...)"
            for names, word in ((missing, "missing"), (extra, "unknown"))
            if names
        ]
        raise CheckpointError(f"{path}: the checkpoint of another model: {', '.join(parts)}", "check the configuration")
    for name, tensor in own.items():
        other = weights[name]
        if tensor.shape != other.shape or tensor.dtype != other.dtype:
            raise CheckpointError(
                f"{path}: the checkpoint of another model: {name} is {tuple(other.shape)} {other.dtype}, "
                f"the model's is {tuple(tensor.shape)} {tensor.dtype}",
                "check the configuration",
            )


def load_eval_weights(model: torch.nn.Module, state: State, path: Path | str) -> None:
    """Load the weights to evaluate into a model: their moving average if present, else those that were trained.

    Raises:
        CheckpointError: They do not fit the model.
    """
    weights = state["model"] if state["ema_model"] is None else state["ema_model"]
    match_model(model, weights, path)
    model.load_state_dict(weights)
