"""Work on photos in a run directory: batch by batch, each photo's result a line of metrics.jsonl as soon as it is made.

A photo that cannot be read is reported and the others go on. Stopped and resumed, a run goes on with the first batch
that is not whole; batches are always of the same photos, so that the results are the same to the bit.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image
from pydantic import Field, field_validator

from cvlab.config.schema import PositiveInt, RunConfig
from cvlab.console import Progress
from cvlab.data import photos
from cvlab.engine.device import ComputeContext, seed_everything, select_device
from cvlab.errors import DataError
from cvlab.models import pretrained
from cvlab.models.pretrained import PretrainedClassifier
from cvlab.runs.interrupt import StopRequest
from cvlab.runs.records import Row
from cvlab.runs.results import Column, PhotoResult, summarize
from cvlab.runs.run_dir import RunDir


class PretrainedConfig(RunConfig):
    """The keys of every experiment that uses an ImageNet-pretrained model."""

    model: str = Field(
        pretrained.DEFAULT_MODEL, description=f"{pretrained.DEFAULT_MODEL}, timm:NAME or torchvision:NAME"
    )
    weights: str | None = Field(None, description="file with the model's weights; null: those found on this machine")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "float32", description="of the optimization; results are always evaluated in float32"
    )

    @field_validator("model")
    @classmethod
    def _known(cls, name: str) -> str:
        pretrained.check_name(name)
        return name

    @field_validator("weights")
    @classmethod
    def _absolute(cls, name: str | None) -> str | None:
        return os.path.abspath(name) if name else name

    def build(self) -> tuple[ComputeContext, PretrainedClassifier]:
        """Choose the device and build the net there, the random numbers seeded."""
        ctx = select_device(self.device, self.precision, self.threads)
        seed_everything(self.seed)
        return ctx, pretrained.build(self.model, self.weights, ctx.device)


class ImagesConfig(RunConfig):
    """The keys of every experiment that processes photos."""

    images: tuple[str, ...] = Field(
        (photos.SAMPLE,), description="files, folders or patterns; `sample` is a bundled photo"
    )
    batch_size: PositiveInt = Field(8, description="photos per batch")

    @field_validator("images")
    @classmethod
    def _absolute_images(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return absolute(names)


class PhotoConfig(ImagesConfig, PretrainedConfig):
    """The keys of every experiment that applies an ImageNet-pretrained model to photos."""


def absolute(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return names of photos as absolute ones, so that a run's configuration means the same from any folder."""
    if not names:
        raise ValueError("give at least one photo")
    comes_along = (photos.SAMPLE, photos.SAMPLE_PAINTING)
    return tuple(name if name in comes_along or "://" in name else os.path.abspath(name) for name in names)


@dataclass(frozen=True)
class Photo:
    """A photo, and the word that the names of its pictures start with."""

    path: Path
    label: str
    image: Image.Image


BatchFn = Callable[[list[Photo], Callable[[], None]], list[PhotoResult]]  # the second is to be called now and then


def resolve_images(images: tuple[str, ...]) -> tuple[list[Path], list[Path]]:
    """Return the photos that are meant, and those of them that are there. DataError where none is."""
    found = photos.find_images(images)
    some = [path for path in found if path.is_file()]
    if not some:
        photos.load(found[0])
    return found, some


def plan(config: PhotoConfig, ctx: ComputeContext, net: PretrainedClassifier) -> Row:
    """Say what a run would do. DataError where none of the photos is there."""
    found, some = resolve_images(config.images)
    return {
        "photos": len(some),
        "photos_missing": len(found) - len(some),
        "model": config.model,
        "parameters": sum(p.numel() for p in net.module.parameters()),
        **ctx.as_dict(),
    }


def run(config: ImagesConfig, out: RunDir, work: BatchFn, verb: str, columns: Sequence[Column]) -> list[PhotoResult]:
    """Go through the photos; return the results of those that could be read.

    All results become the run's `results`, which tables and pages show by `columns`. DataError where no photo could be
    read; StoppedError where a signal asked to stop, as soon as the work calls what it is given: the batch in progress
    is done again by a resume.
    """
    if photos.SAMPLE in config.images:
        out.log(f"{photos.SAMPLE} is the photo that comes along: {photos.find_images([photos.SAMPLE])[0].name}")
    found = photos.find_images(config.images)
    labels = _labels(found)
    batches = [range(k, min(k + config.batch_size, len(found))) for k in range(0, len(found), config.batch_size)]
    rows = _done(out, found, batches, columns)
    if rows:
        out.log(f"{len(rows)} of {len(found)} photos were done before")
    with StopRequest() as stop, Progress(verb, len(found), len(rows)) as progress:

        def check_interrupt() -> None:
            stop.raise_if_set(len(rows), out.path.name, "photo")
            if progress.due():
                progress.update(len(rows), found[min(len(rows), len(found) - 1)].name)

        for batch in batches:
            if batch.start >= len(rows):
                check_interrupt()
                rows += _one_batch(out, [found[k] for k in batch], [labels[k] for k in batch], work, check_interrupt)
    good = [row for row in rows if row.error is None]
    if not good:
        raise DataError(str(rows[0].error), f"none of {len(rows)} photos could be read" if len(rows) > 1 else "")
    out.extra_summary |= summarize(rows, columns)
    return good


def _one_batch(
    out: RunDir, paths: list[Path], labels: list[str], work: BatchFn, check_interrupt: Callable[[], None]
) -> list[PhotoResult]:
    good, errors = [], {}
    for path, label in zip(paths, labels, strict=True):
        try:
            good.append(Photo(path, label, photos.load(path)))
        except DataError as error:
            errors[path] = str(error)
            out.log(f"warning: {error}")
    made = dict(zip((photo.path for photo in good), work(good, check_interrupt) if good else [], strict=True))
    rows = [made[path] if path in made else PhotoResult(str(path), error=errors[path]) for path in paths]
    for row in rows:
        out.append(row.as_row())
    out.sync_metrics()
    out.set_status("running")
    return rows


def _done(out: RunDir, found: list[Path], batches: list[range], columns: Sequence[Column]) -> list[PhotoResult]:
    """Return the results of whole batches that an earlier start has left; what comes after them is cut off."""
    path = out.path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    rows: list[PhotoResult] = []
    for line, photo in zip(lines, found, strict=False):
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not isinstance(row, dict) or row.get("image") != str(photo):
            break
        rows.append(PhotoResult.from_row(row, columns))
    whole = max((batch.stop for batch in batches if batch.stop <= len(rows)), default=0)
    out.truncate_metrics(sum(map(len, lines[:whole])))
    return rows[:whole]


def _labels(found: list[Path]) -> list[str]:
    """Return for each photo a word for file names: its own name without odd characters, numbered where two share it."""
    plain = [re.sub(r"[^\w.-]+", "_", path.stem, flags=re.ASCII).strip("._-")[:60] or "photo" for path in found]
    counts: Counter[str] = Counter()
    labels: list[str] = []
    taken = set(plain)
    for name in plain:
        counts[name] += 1
        label = name
        while counts[name] > 1 and label in taken:
            label = f"{name}-{counts[name]}"
            counts[name] += label in taken
        taken.add(label)
        labels.append(label)
    return labels
