"""The user's own photos as a data set: class folders, with or without splits, or a CSV of images and labels.

    photos/cat/1.jpg, photos/dog/...                     split by cvlab
    photos/train/cat/1.jpg, photos/val/..., photos/test/...
    photos.csv with the columns image, label and, if there are splits, split

The photos are decoded once, to squares of the model's input size, into a cache that is mapped into memory.
"""

import csv
import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cvlab import console, portability
from cvlab.console import Progress
from cvlab.data import descriptions, photos
from cvlab.data.files import is_hidden
from cvlab.data.photo_paths import SUFFIXES
from cvlab.errors import DataError
from cvlab.experiments.classification.data.images import ImageDataset, ImageDatasetSource, ImageRows
from cvlab.ops.resample import EvalTransform
from cvlab.storage.cache import data_root
from cvlab.storage.row_cache import RowArray, RowSpec, load_or_compute

SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
SPLITS = ("train", "val", "test")
HEIC_SUFFIXES = (".heic", ".heif")
CACHE_FOLDER = "photos-v2"
BLOCK = 64  # photos that are decoded and written at a time
PHOTOS_PER_TASK = 8  # of a thread
NUM_EXAMPLES = 3  # of each kind of problem, that a message names
LAYOUT_HINT = "data.path=PATH names a folder with a folder for each class, or with train/ and val/ of them, or a CSV"
CSV_HINT = "the first line names the columns: image,label or image,label,split"


@dataclass(frozen=True)
class LabeledPhoto:
    """A file, the name of its class, and its split; None if the split is for cvlab to choose."""

    path: Path
    label: str
    split: str | None
    size_bytes: int = 0
    modified_ns: int = 0

    def key(self) -> tuple[str, int, int]:
        """What identifies the content of the file, without reading it."""
        return str(self.path), self.size_bytes, self.modified_ns


@dataclass(frozen=True)
class PhotoListing:
    """The photos of a data set, by split and then at random, its classes, and what was noticed about it."""

    root: Path
    photos: tuple[LabeledPhoto, ...]
    classes: tuple[str, ...]
    notes: tuple[str, ...]

    def count(self, split: str) -> int:
        """Return the number of photos of a split."""
        return sum(photo.split == split for photo in self.photos)


@dataclass(frozen=True)
class SplitConfig:
    """How photos without splits are divided: fractions of each class, and the seed of the choice."""

    val_fraction: float = 0.2
    test_fraction: float = 0.0
    seed: int = 0


def scan(path: Path, config: SplitConfig, min_classes: int = 2) -> PhotoListing:
    """List the photos of a data set and divide them into splits; nothing is decoded.

    Args:
        path: A folder or a CSV file.
        config: How the photos are divided if the data set has no splits. The choice depends on the names of the files
            alone, so a new photo does not move the others; equal files are kept together.
        min_classes: Smallest number of classes.

    Returns:
        The photos.

    Raises:
        DataError: There is no such file or folder, or it is not laid out as a data set.
    """
    if path.is_dir():
        listed, notes = _list_folders(path)
    elif path.suffix.lower() == ".csv" and path.is_file():
        listed, notes = _list_csv(path)
    else:
        problem = "not a folder, nor a CSV file" if os.path.lexists(path) else "no such folder"
        raise DataError(f"{path}: {problem}", LAYOUT_HINT)
    listed = [_with_status(photo) for photo in listed]
    classes = _check_classes(path, listed, min_classes)
    copies = _find_copies(listed)
    notes += _describe_copies(path, listed, copies)
    if all(photo.split is None for photo in listed):
        listed = _choose_splits(path, listed, copies, config)
    elif not any(photo.split == "val" for photo in listed):
        listed = _choose_val(path, listed, copies, config)
    notes += _describe_classes(listed, classes)
    listed.sort(key=lambda photo: (SPLITS.index(photo.split or "train"), _rank(path, photo, config.seed)))
    return PhotoListing(path, tuple(listed), classes, tuple(notes))


def _list_folders(root: Path) -> tuple[list[LabeledPhoto], list[str]]:
    folders = _subfolders(root)
    by_split = {folder: SPLIT_NAMES[folder.name.lower()] for folder in folders if folder.name.lower() in SPLIT_NAMES}
    if "train" not in by_split.values():
        by_split = {}
    pairs: list[tuple[Path, str | None]]
    if not by_split:
        pairs = [(folder, None) for folder in folders]
    else:
        pairs = [(child, split) for folder, split in by_split.items() for child in _subfolders(folder)]
    listed, notes, others = [], [], []
    for folder, split in pairs:
        paths, other_files = _photos_below(folder)
        others += other_files
        listed += [LabeledPhoto(path, folder.name, split) for path in paths]
        if not paths:
            notes.append(f"class folder {console.relative_path(folder)} has no photo; it is left out")
    skipped = [folder.name for folder in folders if by_split and folder not in by_split]
    if skipped:
        notes.append(f"folders beside train/ that are no split are left out: {_examples(skipped)}")
    if others:
        verb = "file is" if len(others) == 1 else "files are"
        num_heic = sum(path.suffix.lower() in HEIC_SUFFIXES for path in others)
        heic = f"; {num_heic} in Apple's format HEIC, to be exported as JPEG" if num_heic else ""
        notes.append(f"{len(others)} {verb} not JPEG, PNG, BMP or WEBP and left out{heic}")
    if not listed:
        raise DataError(f"{root}: no photos in folders of classes", LAYOUT_HINT)
    return listed, notes


def _subfolders(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not is_hidden(path.name) and path.is_dir())
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror}", "give a folder that can be read") from error


def _photos_below(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the photos in a folder and the folders in it, each of which is visited once, and the other files."""
    paths, others, visited = [], [], set()
    for parent, children, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in visited:
            children.clear()
            continue
        visited.add(real)
        children[:] = sorted(name for name in children if not is_hidden(name))
        for name in sorted(name for name in names if not is_hidden(name)):
            if Path(name).suffix.lower() in SUFFIXES:
                paths.append(Path(parent, name))
            else:
                others.append(Path(parent, name))
    return paths, others


def _list_csv(path: Path) -> tuple[list[LabeledPhoto], list[str]]:
    listed = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            columns = set(reader.fieldnames or ())
            if not {"image", "label"} <= columns or columns - {"image", "label", "split"}:
                raise DataError(f"{path}: its columns are {', '.join(reader.fieldnames or ()) or 'missing'}", CSV_HINT)
            for row in reader:
                listed.append(_csv_photo(path, reader.line_num, row))
    except (csv.Error, UnicodeError) as error:
        raise DataError(f"{path}: not a CSV file: {error}", CSV_HINT) from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}", "give a file that can be read") from error
    if not listed:
        raise DataError(f"{path}: no photos", CSV_HINT)
    splits = {photo.split for photo in listed}
    if None in splits and len(splits) > 1:
        raise DataError(f"{path}: some rows have no split", "give a split in every row, or in none")
    if splits != {None} and "train" not in splits:
        raise DataError(f"{path}: no row has the split train", "use the splits train, val and test")
    return listed, []


def _csv_photo(path: Path, line: int, row: Mapping[str | None, Any]) -> LabeledPhoto:
    image, label, split = row.get("image"), row.get("label"), row.get("split")
    if row.get(None) or not image or not label:
        raise DataError(f"{path}:{line}: not `image,label`", "quote names that contain commas")
    if split and split.lower() not in SPLIT_NAMES:
        raise DataError(f"{path}:{line}: unknown split {split!r}", f"known: {', '.join(SPLITS)}")
    return LabeledPhoto(path.parent / image, label.strip(), SPLIT_NAMES[split.lower()] if split else None)


def _with_status(photo: LabeledPhoto) -> LabeledPhoto:
    try:
        status = photo.path.stat()
    except OSError as error:
        raise DataError(
            f"{photo.path}: {error.strerror or error}", "restore the photo, or remove it from the data set"
        ) from error
    return replace(photo, size_bytes=status.st_size, modified_ns=status.st_mtime_ns)


def _check_classes(path: Path, listed: Sequence[LabeledPhoto], min_classes: int) -> tuple[str, ...]:
    """Return the classes in order; DataError if there are too few, or one cannot be named or has no training."""
    classes = tuple(sorted({photo.label for photo in listed}))
    for name in classes:
        if not name.isprintable():
            raise DataError(f"{path}: class {name!r} has a character that cannot be printed", "rename the class")
    if len(classes) < min_classes:
        raise DataError(f"{path}: one class only, {classes[0]}", LAYOUT_HINT)
    trained = {photo.label for photo in listed if photo.split in (None, "train")}
    for photo in listed:
        if photo.label not in trained:
            raise DataError(f"{path}: class {photo.label!r} of {photo.split} is not in train", LAYOUT_HINT)
    return classes


def _find_copies(listed: Sequence[LabeledPhoto]) -> dict[Path, str]:
    """Return a digest for each file that has the same size as another one; equal files have equal digests."""
    by_size = defaultdict(list)
    for photo in listed:
        by_size[photo.size_bytes].append(photo.path)
    digests = {}
    for paths in by_size.values():
        for path in paths if len(paths) > 1 else ():
            try:
                digests[path] = hashlib.sha256(path.read_bytes()).hexdigest()
            except OSError:
                continue  # the error is raised where it is decoded
    return digests


def _describe_copies(root: Path, listed: Sequence[LabeledPhoto], copies: Mapping[Path, str]) -> list[str]:
    groups = defaultdict(list)
    for photo in listed:
        if photo.path in copies:
            groups[copies[photo.path]].append(photo)
    copied = [members for members in groups.values() if len(members) > 1]
    of_classes = [members for members in copied if len({photo.label for photo in members}) > 1]
    of_splits = [members for members in copied if len({photo.split for photo in members}) > 1]
    others = [members for members in copied if members not in of_classes and members not in of_splits]

    def names(members: Sequence[LabeledPhoto]) -> str:
        return " = ".join(_relative(root, photo.path) for photo in members[:2])

    notes = []
    for what, examples in (
        ("in two classes", of_classes),
        ("in two splits", of_splits),
        ("twice in one class", others),
    ):
        if examples:
            count = f"{len(examples)} photo{' occurs' if len(examples) == 1 else 's occur'}"
            notes.append(f"{count} {what}: {_examples([names(members) for members in examples])}")
    return notes


def _describe_classes(listed: Sequence[LabeledPhoto], classes: Sequence[str]) -> list[str]:
    counts = Counter(photo.label for photo in listed if photo.split == "train")
    single = [name for name in classes if counts[name] == 1]
    missing = {photo.label for photo in listed if photo.split == "val"}
    unseen = [name for name in classes if name not in missing]
    notes = [f"one training photo only: {_examples(single)}"] if single else []
    return [*notes, *([f"no validation photo: {_examples(unseen)}"] if unseen and missing else [])]


def _relative(root: Path, path: Path) -> str:
    folder = root if root.is_dir() else root.parent
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)


def _rank(root: Path, photo: LabeledPhoto, seed: int) -> bytes:
    """Return a pseudo-random value of a file's name: the order in which photos are taken for a split."""
    return hashlib.blake2b(f"{seed}/{_relative(root, photo.path)}".encode(errors="surrogateescape")).digest()


def _choose_splits(
    root: Path, listed: Sequence[LabeledPhoto], copies: Mapping[Path, str], config: SplitConfig
) -> list[LabeledPhoto]:
    """Divide photos without splits, class by class."""
    groups: dict[str, dict[str, list[LabeledPhoto]]] = defaultdict(lambda: defaultdict(list))
    owners: dict[str, str] = {}  # of copies: the class of the first, so that those in two classes stay together
    for photo in sorted(listed, key=lambda photo: _rank(root, photo, config.seed)):
        key = copies.get(photo.path, str(photo.path))
        groups[owners.setdefault(key, photo.label)][key].append(photo)
    divided = []
    for members in groups.values():
        total = sum(map(len, members.values()))
        limits = {"val": round(total * config.val_fraction), "test": round(total * config.test_fraction)}
        counts = Counter[str]()
        for photos_of_key in members.values():
            split = next((name for name, limit in limits.items() if counts[name] < limit), "train")
            counts[split] += len(photos_of_key)
            divided += [replace(photo, split=split) for photo in photos_of_key]
    return divided


def _choose_val(
    root: Path, listed: Sequence[LabeledPhoto], copies: Mapping[Path, str], config: SplitConfig
) -> list[LabeledPhoto]:
    """Take the validation split of a data set that has train and test only from its training photos."""
    train = [replace(photo, split=None) for photo in listed if photo.split == "train"]
    divided = _choose_splits(root, train, copies, replace(config, test_fraction=0.0))
    return [*divided, *(photo for photo in listed if photo.split != "train")]


def _examples(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - NUM_EXAMPLES} more" if len(names) > NUM_EXAMPLES else ""
    return console.printable(", ".join(names[:NUM_EXAMPLES]) + more)


def load(
    listing: PhotoListing, transform: EvalTransform, check_interrupt: Callable[[], None] = lambda: None
) -> ImageDataset:
    """Decode the photos of a listing, or map them from the cache.

    Args:
        listing: The photos.
        transform: How each becomes an image; exactly what `cvlab classify` does.
        check_interrupt: Called after every block of photos; may raise to stop, which keeps the blocks before it.

    Returns:
        The data set, without the photos that cannot be read, which are reported.

    Raises:
        DataError: No photo of a split can be read.
    """
    paths = sorted({photo.path for photo in listing.photos})
    array = _decode(listing, paths, transform, check_interrupt)
    for note in listing.notes:
        console.info(f"warning: {listing.root.name}: {note}")
    errors = {path: str(note["error"]) for path, note in zip(paths, array.notes, strict=True) if note["error"]}
    if errors:
        lines = _examples(f"{_relative(listing.root, path)} ({error})" for path, error in errors.items())
        console.info(f"warning: {len(errors)} of {len(paths)} photos cannot be read and are left out: {lines}")
    labels = {name: index for index, name in enumerate(listing.classes)}
    row_of = {path: row for row, path in enumerate(paths)}
    pixels = torch.from_numpy(array.rows)
    rows, targets, files = {}, {}, {}
    for split in SPLITS:
        chosen = [photo for photo in listing.photos if photo.split == split and photo.path not in errors]
        if not chosen and listing.count(split):
            raise DataError(f"{listing.root}: no photo of {split} can be read", next(iter(errors.values())))
        index = [row_of[photo.path] for photo in chosen]
        digests = tuple(f"{array.notes[row]['digest']} {transform}" for row in index)
        rows[split] = ImageRows(pixels, torch.tensor(index, dtype=torch.int64), digests)
        targets[split] = torch.tensor([labels[photo.label] for photo in chosen], dtype=torch.int64)
        files[split] = tuple(_relative(listing.root, photo.path) for photo in chosen)
    return ImageDataset(
        name=listing.root.name,
        train_images=rows["train"],
        train_labels=targets["train"],
        test_images=rows["test"],
        test_labels=targets["test"],
        classes=listing.classes,
        val_images=rows["val"],
        val_labels=targets["val"],
        files=files,
        transform=transform,
        photo_sizes=Counter((width, height) for note in array.notes for width, height in [note["size"]] if width),
    )


def _decode(
    listing: PhotoListing, paths: Sequence[Path], transform: EvalTransform, check_interrupt: Callable[[], None]
) -> RowArray:
    """Return a row for each path, from the cache or decoded by as many threads as there are cores."""
    size = transform.size_px
    spec = RowSpec(len(paths), (size, size, 3), np.dtype(np.uint8), BLOCK)
    pending: dict[int, tuple[np.ndarray, list[Future[list[dict[str, Any]]]]]] = {}  # by the first row of their block
    with (
        ThreadPoolExecutor(portability.num_cores()) as pool,
        Progress("decode photos", len(paths), 0) as progress,
    ):

        def start_block(start: int) -> None:
            block = paths[start : start + BLOCK]
            rows = np.empty((len(block), size, size, 3), np.uint8)
            parts = range(0, len(block), PHOTOS_PER_TASK)
            tasks = [
                pool.submit(_decode_into, rows[k : k + PHOTOS_PER_TASK], block[k : k + PHOTOS_PER_TASK], transform)
                for k in parts
            ]
            pending[start] = rows, tasks

        def compute(start: int, end: int) -> tuple[np.ndarray, list[Any]]:
            for each in (start, end):  # the threads have the next block to do while this one is written
                if each < len(paths) and each not in pending:
                    start_block(each)
            rows, tasks = pending.pop(start)
            notes = [note for task in tasks for note in task.result()]
            check_interrupt()
            if progress.due():
                progress.update(end, paths[end - 1].name)
            return rows, notes

        try:
            return load_or_compute(data_root() / CACHE_FOLDER / _key(listing, transform), spec, compute)
        finally:
            for _, tasks in pending.values():
                for task in tasks:
                    task.cancel()


def _decode_into(rows: np.ndarray, paths: Sequence[Path], transform: EvalTransform) -> list[dict[str, Any]]:
    """Decode photos into rows (N, S, S, 3); return the note of each."""
    return [_decode_one(row, path, transform) for row, path in zip(rows, paths, strict=True)]


def _decode_one(row: np.ndarray, path: Path, transform: EvalTransform) -> dict[str, Any]:
    """Write a photo as the model takes it into a row, or zeros; return its error, digest and size."""
    error, size = None, (0, 0)
    try:
        photo = photos.load(path)
        row[...], size = transform(photo), photo.size
    except DataError as data_error:
        row[...], error = 0, data_error.message.partition(": ")[2] or data_error.message
    try:
        digest = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
    except FileNotFoundError as missing:
        raise DataError(
            f"{path}: was removed while the photos were decoded", "restore it, or start again without it"
        ) from missing
    except OSError:  # it may not be read: the error is that of loading it
        digest = ""
    return {"error": error, "digest": digest, "size": size}


def _key(listing: PhotoListing, transform: EvalTransform) -> str:
    """Return the name of the cache: a digest of the transform and of each file's name, size and time of change."""
    digest = hashlib.sha256(repr(transform).encode())
    for key in sorted({photo.key() for photo in listing.photos}):
        digest.update(repr(key).encode())
    return digest.hexdigest()[:24]


@dataclass(frozen=True, kw_only=True)
class PhotoSource(ImageDatasetSource):
    """A data set of photos of any size, which become images of the size that a configuration asks for.

    Attributes:
        list_photos: Called with the root folder, the path that the configuration names and how to divide photos
            without splits.
    """

    list_photos: Callable[[Path, Path | None, SplitConfig], PhotoListing]


def _list_own(_root: Path, path: Path | None, config: SplitConfig) -> PhotoListing:
    assert path is not None, "the configuration was validated"
    return scan(path, config)


def not_loadable(_root: Path) -> Any:
    """Stand for `read`: photos are loaded by `load`, at the size that is asked for."""
    raise DataError("photos are loaded from a listing", LAYOUT_HINT)


SOURCE = PhotoSource(
    **descriptions.of_source("images", "folder"),
    check=lambda _: "your own",
    read=not_loadable,
    list_photos=_list_own,
)
