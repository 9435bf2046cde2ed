"""Batch inference over photos in a run directory; each result is a line of metrics.jsonl as soon as it is computed.

A photo that cannot be read is reported, and the others are processed. An interrupted run resumes with the first batch
that is incomplete; batches always consist of the same photos, so that the results are bit-for-bit identical.
"""

import contextlib
import json
from collections import Counter, deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image

from cvlab.console import Progress
from cvlab.data import photo_paths, photos
from cvlab.engine.device import ComputeContext
from cvlab.errors import DataError
from cvlab.experiments.common.photo_config import ImagesConfig, PhotoConfig
from cvlab.models.pretrained import PretrainedClassifier
from cvlab.runs.interrupt import StopRequest
from cvlab.runs.records import MAX_METRICS_BYTES, Row
from cvlab.runs.results import Column, PhotoResult, summarize
from cvlab.runs.run_dir import RunDir
from cvlab.storage import regular_files
from cvlab.storage.file_names import file_stem

MAX_DECODERS = 4


@dataclass(frozen=True)
class Photo:
    """A photo that was read; the names of the files made from it start with `label`."""

    path: Path
    label: str
    image: Image.Image


class CheckInterrupt(Protocol):
    """Called often while a batch is processed; raises StoppedError if a signal was received."""

    def __call__(self, note: str = "", fraction: float = 0.0) -> None:
        """Show a note, and which fraction of the batch is done."""


BatchFn = Callable[[list[Photo], CheckInterrupt], list[PhotoResult]]


def resolve_images(images: tuple[str, ...]) -> tuple[list[Path], list[Path]]:
    """Return the paths that names and patterns stand for, and those of them that exist. DataError if none does."""
    paths = photo_paths.find_images(images)
    existing = [path for path in paths if path.is_file()]
    if not existing:
        photos.load(paths[0])
    return paths, existing


def plan(config: PhotoConfig, ctx: ComputeContext, model: PretrainedClassifier) -> Row:
    """Return what a run would do. Raises DataError if none of the photos exists."""
    paths, existing = resolve_images(config.images)
    return {
        "photos": len(existing),
        "photos_missing": len(paths) - len(existing),
        "model": config.model,
        "parameters": sum(p.numel() for p in model.module.parameters()),
        **ctx.as_dict(),
    }


def run(
    config: ImagesConfig, run_dir: RunDir, batch_fn: BatchFn, verb: str, columns: Sequence[Column]
) -> list[PhotoResult]:
    """Apply a function to batches of the configured photos, from where an interrupted run stopped.

    Args:
        config: The photos and the batch size.
        run_dir: All results are appended to its metrics.jsonl and become the `results` of its summary.
        batch_fn: Called as `batch_fn(batch, check_interrupt)` with the photos of a batch that could be read; returns a
            result for each, and calls `check_interrupt()` often.
        verb: Label of the progress bar.
        columns: How tables and pages show the results.

    Returns:
        The results of the photos that could be read.

    Raises:
        DataError: No photo could be read.
        StoppedError: A signal was received; the current batch is repeated when the run is resumed.
    """
    if photo_paths.SAMPLE in config.images:
        run_dir.log(
            f"{photo_paths.SAMPLE} is the bundled photo {photo_paths.find_images([photo_paths.SAMPLE])[0].name}"
        )
    paths = photo_paths.find_images(config.images)
    labels = unique_labels(paths)
    batches = [range(k, min(k + config.batch_size, len(paths))) for k in range(0, len(paths), config.batch_size)]
    results = _restore_results(run_dir, paths, batches, columns)
    if results:
        run_dir.log(f"resumed: {len(results)} of {len(paths)} photos are done")
    with StopRequest() as stop, Progress(verb, len(paths), len(results)) as progress:

        def check_interrupt(note: str = "", fraction: float = 0.0) -> None:
            stop.raise_if_set(len(results), run_dir.path.name, "photo")
            if progress.due():
                name = paths[min(len(results), len(paths) - 1)].name
                progress.update(len(results) + fraction * len(batch), f"{name}, {note}" if note else name)

        remaining = [batch for batch in batches if batch.start >= len(results)]
        named = [[(paths[k], labels[k]) for k in batch] for batch in remaining]
        with contextlib.closing(_read_ahead(named, _num_decoders())) as photo_batches:
            for batch in remaining:
                check_interrupt()
                batch_paths = [paths[k] for k in batch]
                results += _process_batch(run_dir, batch_paths, next(photo_batches), batch_fn, check_interrupt)
    successful = [result for result in results if result.error is None]
    if not successful:
        detail = f"none of {len(results)} photos could be read" if len(results) > 1 else ""
        raise DataError(str(results[0].error), detail)
    run_dir.extra_summary |= summarize(results, columns)
    return successful


def _read(path: Path, label: str) -> Photo | DataError:
    """Read a photo; return the error if it cannot be read."""
    try:
        return Photo(path, label, photos.load(path))
    except DataError as error:
        return error


def _num_decoders() -> int:
    """Return how many threads decode: as many as the network may use, up to a number that few disks outrun."""
    return min(MAX_DECODERS, torch.get_num_threads())


def _read_ahead(
    batches: Sequence[Sequence[tuple[Path, str]]], num_threads: int
) -> Generator[list[Photo | DataError], None, None]:
    """Yield the photos of each batch; threads decode the next batch while the caller processes this one.

    At most two batches are in memory. Closing the generator waits for the photos that are being decoded, not for
    others.

    Args:
        batches: Path and label of each photo.
        num_threads: Number of threads; Pillow's decoders run in parallel.

    Yields:
        For each photo of a batch the photo, or why it cannot be read.
    """
    executor = ThreadPoolExecutor(max_workers=num_threads)
    ahead: deque[Future[Photo | DataError]] = deque()
    try:
        for batch, following in zip([(), *batches], [*batches, ()], strict=True):
            ahead.extend(executor.submit(_read, path, label) for path, label in following)
            if batch:
                yield [ahead.popleft().result() for _ in batch]
    finally:
        executor.shutdown(cancel_futures=True)


def _process_batch(
    run_dir: RunDir,
    paths: list[Path],
    photos_or_errors: list[Photo | DataError],
    batch_fn: BatchFn,
    check_interrupt: CheckInterrupt,
) -> list[PhotoResult]:
    """Apply the function to the photos of a batch, write a line of metrics.jsonl for each photo."""
    batch, errors = [], {}
    for path, photo in zip(paths, photos_or_errors, strict=True):
        if isinstance(photo, Photo):
            batch.append(photo)
        else:
            errors[path] = str(photo)
            run_dir.log(f"warning: {photo}")
    batch_results = batch_fn(batch, check_interrupt) if batch else []
    by_path = dict(zip((photo.path for photo in batch), batch_results, strict=True))
    results = [by_path[path] if path in by_path else PhotoResult(str(path), error=errors[path]) for path in paths]
    for result in results:
        run_dir.append(result.as_row())
    run_dir.sync_metrics()
    run_dir.set_status("running")
    return results


def _restore_results(
    run_dir: RunDir, paths: list[Path], batches: list[range], columns: Sequence[Column]
) -> list[PhotoResult]:
    """Return the results of the complete batches in metrics.jsonl, and truncate the file after them."""
    metrics_path = run_dir.path / "metrics.jsonl"
    has_rows = run_dir.sync_metrics() > 0
    content = regular_files.read_bytes(metrics_path, MAX_METRICS_BYTES) if has_rows else b""
    lines = content.splitlines(keepends=True)
    results: list[PhotoResult] = []
    for line, path in zip(lines, paths, strict=False):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(row, dict) or row.get("image") != str(path):
            break
        results.append(PhotoResult.from_row(row, columns))
    num_complete = max((batch.stop for batch in batches if batch.stop <= len(results)), default=0)
    run_dir.truncate_metrics(sum(map(len, lines[:num_complete])))
    return results[:num_complete]


def unique_labels(paths: list[Path]) -> list[str]:
    """Return a unique label for each photo: its name as a file's, numbered if several share it."""
    names = [file_stem(path.stem) or "photo" for path in paths]
    counts: Counter[str] = Counter()
    labels: list[str] = []
    taken = set(names)
    for name in names:
        counts[name] += 1
        label = name
        while counts[name] > 1 and label in taken:
            label = f"{name}-{counts[name]}"
            counts[name] += label in taken
        taken.add(label)
        labels.append(label)
    return labels
