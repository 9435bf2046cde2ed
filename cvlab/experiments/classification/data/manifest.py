"""`photos.csv` in a run directory: which photo is in which split, so that a resumed run notices what was changed."""

import csv
import io
from collections.abc import Iterator

from cvlab.errors import CheckpointError
from cvlab.experiments.classification.data.images import ImageDataset, ImageRows
from cvlab.runs.records import MAX_JSON_BYTES
from cvlab.runs.run_dir import RunDir
from cvlab.storage import regular_files

FILE = "photos.csv"
COLUMNS = ("split", "image", "label", "digest")
Row = tuple[str, ...]


def _rows(dataset: ImageDataset) -> Iterator[Row]:
    for split, (images, labels) in dataset.splits().items():
        if isinstance(images, ImageRows):
            for file, label, digest in zip(dataset.files[split], labels.tolist(), images.digests, strict=True):
                yield split, file, dataset.classes[label], digest.partition(" ")[0]


def record(run: RunDir, dataset: ImageDataset) -> None:
    """Write the photos of a data set, or compare them with those that the run began with.

    Raises:
        CheckpointError: A photo was changed, added or removed since, and the run may not continue with changes.
    """
    rows = list(_rows(dataset))
    if not rows:
        return
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([COLUMNS, *rows])
    path = run.path / FILE
    try:
        before = regular_files.read_bytes(path, MAX_JSON_BYTES).decode(errors="surrogateescape")
    except FileNotFoundError:
        run.write_bytes(FILE, text.getvalue().encode(errors="surrogateescape"))
        return
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}", "the run directory was changed") from error
    change = _first_change([tuple(row) for row in csv.reader(io.StringIO(before))][1:], rows)
    if change and not run.allow_changes:
        raise CheckpointError(
            f"{change} after the run began; resuming would mix both versions",
            f"restore it, or `cvlab resume {run.path.name} --allow-changes`",
        )


def _first_change(before: list[Row], after: list[Row]) -> str:
    """Return what happened to the first photo that differs; "" if none does."""
    known, present = {row[:2]: row for row in before}, {row[:2]: row for row in after}
    for key, row in known.items():
        if key not in present:
            return f"photo {row[1]} of {row[0]} was removed, or moved to another split,"
        if present[key] != row:
            return f"photo {row[1]} of {row[0]} was changed"
    added = next((key for key in present if key not in known), None)
    return f"photo {added[1]} of {added[0]} was added" if added else ""
