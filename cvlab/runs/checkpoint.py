"""Checkpoints that survive `kill -9` and are verified before they are loaded.

A checkpoint is `checkpoints/step_000001200.pt`: what `torch.save` writes, with a SHA-256 of the whole file as a
checksum footer in the zip's comment, written atomically. torch itself checks no checksum at all; a zip's own CRC-32
would miss its headers and padding. Reading checks the footer, then loads with `weights_only=True`, so that no file can
run code. The latest checkpoint is the valid one with the highest step, whatever the dates of the files.
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

from cvlab import console
from cvlab.errors import CheckpointError, ConfigError, DivergedError
from cvlab.runs.records import require_folder
from cvlab.storage import atomic, regular_files
from cvlab.storage.failpoints import reach

State = dict[str, Any]
KEEP = 2
STEP_FILE = re.compile(r"step_(\d{9})\.pt\Z")
BEST = "best.pt"
CHOICES = ("last", "best")  # of a run's weights
CHUNK_BYTES = 1024**2
CHECKSUM_PREFIX = b"cvlab sha256 "
CHECKSUM_BYTES = len(CHECKSUM_PREFIX) + 64
MAX_FILE_BYTES = 100 * 1024**3
MAX_NUMBER = 2**53  # of steps, bytes and seconds
MAX_PICKLE_BYTES = 64 * 1024**2  # names, shapes and numbers of a state; tensors are separate members of the zip


class _ChecksumWriter:
    """A file that hashes what is written to it, and ends the zip with the SHA-256 as its comment."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.hash = hashlib.sha256()
        self.pending = b""  # the last two bytes, not written yet: at the end they are the length of the comment

    def write(self, data: bytes) -> int:
        self._emit(self.pending)
        self.pending = bytes(data[-2:])
        self._emit(data[:-2])
        return len(data)

    def _emit(self, data: bytes) -> None:
        self.hash.update(data)
        self.file.write(data)

    def flush(self) -> None:
        self.file.flush()

    def write_footer(self) -> None:
        assert self.pending == b"\0\0", "a zip without a comment ends with the length zero"
        self._emit(CHECKSUM_BYTES.to_bytes(2, "little"))
        self.file.write(CHECKSUM_PREFIX + self.hash.hexdigest().encode())


def write(path: Path, state: State) -> None:
    """Write a state atomically, with its checksum footer."""

    def fill(file: BinaryIO) -> None:
        writer = _ChecksumWriter(file)
        torch.save(state, writer)  # type: ignore[arg-type]
        writer.write_footer()

    atomic.write(path, fill)


def path_of(folder: Path, step: int) -> Path:
    """Return the path of the checkpoint after `step` steps."""
    return folder / f"step_{step:09d}.pt"


def steps(folder: Path) -> list[int]:
    """Return the steps that have a checkpoint file, ascending; the files are not verified."""
    if folder.is_symlink():
        raise CheckpointError(f"{folder}: it is a link", "the run directory was changed")
    if not folder.is_dir():
        return []
    return sorted(int(match[1]) for path in folder.iterdir() if (match := STEP_FILE.match(path.name)))


def save(folder: Path, step: int, state: State, is_best: bool = False) -> Path:
    """Write a checkpoint atomically, then remove all but the latest two and the best.

    Args:
        folder: The folder of the checkpoints; it is created if missing, but not its parents.
        step: Number of steps done.
        state: What to save; `model` holds the weights.
        is_best: Link it as the best checkpoint.

    Returns:
        The path of the checkpoint.

    Raises:
        RunDirError: The file or folder cannot be written.
        DivergedError: Weights are not finite; nothing is written.
    """
    require_finite(state)
    path = path_of(folder, step)
    try:
        folder.mkdir(exist_ok=True)  # not its parents: a run directory that was removed must not reappear in part
        write(path, state)
        if is_best:
            link_best(path)
        reach("before_gc")
        for old in steps(folder)[:-KEEP]:
            with atomic.ignore_unsupported():  # of a folder whose files cannot be removed all checkpoints stay
                path_of(folder, old).unlink(missing_ok=True)
    except OSError as error:
        raise atomic.disk_error(path, error) from error
    return path


def link_best(path: Path) -> None:
    """Make a checkpoint the best one by a hard link, or a copy where the file system has no hard links."""
    atomic.link_or_copy(path, path.parent / BEST)


def require_finite(state: State) -> None:
    """Raise DivergedError with the name of the first weight that is nan or infinite."""
    for name, tensor in state.get("model", {}).items():
        if tensor.is_floating_point() and tensor.numel() and not math.isfinite(_max_abs(tensor)):
            raise DivergedError(f"weight {name} is not finite at step {state.get('step')}", "lower optimizer.lr")


def _max_abs(tensor: torch.Tensor) -> float:
    """Return max |x|, or nan if any value is; two reductions instead of a mask as large as the tensor."""
    low, high = torch.aminmax(tensor.detach())
    return max(abs(float(low)), abs(float(high))) if not low.isnan() else math.nan


def load(path: Path) -> State:
    """Verify a checkpoint and load it onto the CPU.

    Raises:
        CheckpointError: It is damaged, not a checkpoint, or holds more than tensors and plain values.
    """
    try:
        with regular_files.open_binary(path, MAX_FILE_BYTES) as file:
            verify(path, file)
            file.seek(0)
            # explicit: TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD can only change the default
            state = torch.load(file, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines()] or [type(error).__name__]
        reason = next((line for line in lines if "Unsupported" in line), lines[0])[:160]
        raise CheckpointError(f"{path}: not a valid checkpoint: {reason}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: not a valid checkpoint: it holds a {type(state).__name__}")
    return state


def verify(path: Path, file: BinaryIO) -> None:
    """Raise CheckpointError unless the checksum footer is right and the zip is plain, see `require_plain`.

    Args:
        path: The checkpoint, for messages.
        file: The same, opened.
    """
    body_bytes = file.seek(0, os.SEEK_END) - CHECKSUM_BYTES
    file.seek(max(body_bytes, 0))
    footer = file.read(CHECKSUM_BYTES)
    file.seek(0)
    actual = hashlib.sha256()
    while body_bytes > 0 and (chunk := file.read(min(CHUNK_BYTES, body_bytes))):
        actual.update(chunk)
        body_bytes -= len(chunk)
    if not footer.startswith(CHECKSUM_PREFIX):
        raise CheckpointError(f"{path}: damaged: incomplete, or not a checkpoint of cvlab")
    if footer != CHECKSUM_PREFIX + actual.hexdigest().encode():
        raise CheckpointError(f"{path}: damaged: its checksum differs")
    require_plain(path)


def require_plain(path: Path) -> None:
    """Raise CheckpointError if members of a zip are compressed, larger together than the file, or its index is huge."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    if (
        any(m.compress_type != zipfile.ZIP_STORED for m in members)
        or sum(m.file_size for m in members) > path.stat().st_size
    ):
        raise CheckpointError(f"{path}: not a valid checkpoint: compressed members or wrong sizes")
    if any(m.filename.endswith(".pkl") and m.file_size > MAX_PICKLE_BYTES for m in members):
        raise CheckpointError(f"{path}: not a valid checkpoint: its index is too large")


def load_latest(folder: Path, report: Callable[[str], None]) -> tuple[Path, State]:
    """Return the valid checkpoint with the highest step, or the best one if no other is valid.

    Args:
        folder: The folder of the checkpoints.
        report: Called with a warning for each invalid checkpoint.

    Returns:
        Path and state.

    Raises:
        CheckpointError: No checkpoint is valid; a run never starts over silently.
    """
    candidates = [path_of(folder, step) for step in reversed(steps(folder))]
    candidates += [folder / BEST] if (folder / BEST).is_file() else []
    for path in candidates:
        try:
            return path, load(path)
        except CheckpointError as error:
            report(f"warning: {error.message}; trying the one before")
    reason = "all checkpoints are damaged" if candidates else "there is no checkpoint"
    raise CheckpointError(f"{folder}: {reason}", "start the run again with `cvlab run` on its config.yaml")


def load_of_run(path: Path, weights: str) -> State:
    """Load the `last` or `best` checkpoint of a run directory. CheckpointError if there is none."""
    if weights not in CHOICES:
        raise ConfigError(f"--checkpoint {weights}: unknown", f"known: {', '.join(CHOICES)}")
    folder = require_folder(path / "checkpoints")
    if weights == "last":
        return load_latest(folder, console.info)[1]
    best = folder / BEST
    if not best.is_file():
        raise CheckpointError(f"{best}: no such checkpoint", "use --checkpoint last, or resume the run")
    return load(best)


def require_last(weights: str, kind: str) -> None:
    """Raise ConfigError unless `weights` is `last`, the only ones that a run of this kind keeps for inference."""
    if weights != "last":
        raise ConfigError(f"checkpoint {weights!r}: a run of {kind} has its last weights only", "leave it out")


def check_complete(missing: list[str], path: Path) -> None:
    """Raise CheckpointError if keys of a state are missing."""
    if missing:
        raise CheckpointError(f"{path}: lacks {', '.join(missing)}", "it was not written by this version of cvlab")


def check_types(expected: Any, value: Any, path: Path, key: str = "") -> None:
    """Raise CheckpointError unless a state has the structure of another one.

    Args:
        expected: The state of a job that has not begun; None and empty collections allow any content.
        value: The state that was read.
        path: Where it was read from.
        key: The dotted key of the value.
    """
    types = (bool, int, float, str, dict, torch.Tensor)
    kind: Any = next((kind for kind in types if isinstance(expected, kind)), None)
    kind = (list, tuple) if isinstance(expected, (list, tuple)) else kind
    if kind is None:
        return
    is_valid = isinstance(value, (int, float) if kind is float else kind) and (kind is bool or value is not True)
    if kind in (int, float) and is_valid:
        is_valid = not isinstance(value, bool) and min(expected, 0) <= value < MAX_NUMBER
    if kind is torch.Tensor and is_valid:
        is_valid = value.shape == expected.shape and value.dtype == expected.dtype
    if not is_valid:
        raise CheckpointError(
            f"{path}: {key or 'its content'} has the wrong type, shape or value", "the file was changed"
        )
    if isinstance(expected, dict) and expected:
        unknown = sorted(map(str, value.keys() - expected.keys()))
        if unknown:
            raise CheckpointError(f"{path}: {key}{'.' * bool(key)}{unknown[0]} is unknown", "the file was changed")
        for name, item in expected.items():
            if name in value:
                check_types(item, value[name], path, f"{key}{'.' * bool(key)}{name}")


def check_weights(weights: Any, path: Path | str) -> None:
    """Raise CheckpointError unless weights are tensors by name."""
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in weights.items()
    ):
        raise CheckpointError(f"{path}: its weights are not tensors by name", "the file was changed")


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
    """Return the SHA-256 of names, shapes, dtypes and bytes of a state_dict: equal only if bit-for-bit identical."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def match_model(model: torch.nn.Module, weights: State, path: Path | str) -> None:
    """Raise CheckpointError unless names, shapes and dtypes of `weights` are those of `model`."""
    check_weights(weights, path)
    expected = model.state_dict()
    missing, extra = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing or extra:
        parts = [
            f"{len(names)} {problem} ({names[0]}, ...)"
            for names, problem in ((missing, "missing"), (extra, "unknown"))
            if names
        ]
        raise CheckpointError(f"{path}: the checkpoint of another model: {', '.join(parts)}", "check the configuration")
    for name, tensor in expected.items():
        other = weights[name]
        if tensor.shape != other.shape or tensor.dtype != other.dtype:
            raise CheckpointError(
                f"{path}: the checkpoint of another model: {name} is {tuple(other.shape)} {other.dtype}, "
                f"the model's is {tuple(tensor.shape)} {tensor.dtype}",
                "check the configuration",
            )


def load_eval_weights(model: torch.nn.Module, state: State, path: Path | str) -> None:
    """Load the weights to evaluate into a model: their moving average if present and used, else the trained ones.

    Raises:
        CheckpointError: They do not fit the model.
    """
    check_complete([key for key in ("model", "ema_model", "uses_ema") if key not in state], Path(path))
    weights = state["model"] if state["ema_model"] is None or not state["uses_ema"] else state["ema_model"]
    match_model(model, weights, path)
    model.load_state_dict(weights)
