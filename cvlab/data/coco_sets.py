"""Published data sets in COCO's layout, which have boxes and captions: where their files lie, how they are installed.

`<root>/NAME/annotations/` holds `instances_SPLIT.json` and `captions_SPLIT.json`. Reading boxes is the task of
detection, reading captions that of captioning.

References:
    Lin et al., 2014, "Microsoft COCO: common objects in context".
    Chen et al., 2015, "Microsoft COCO captions: data collection and evaluation server".
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cvlab import console
from cvlab.data.datasets import DatasetSize
from cvlab.errors import DataError
from cvlab.storage import archives, download
from cvlab.storage.cache import install_folder, temporary_folder

INSTANCES, CAPTIONS = "instances", "captions"  # what the annotation files of a split hold
LICENSE = "CC BY 4.0 (the annotations; the photos are under Flickr's terms)"


@dataclass(frozen=True)
class CocoSplit:
    """A split of a data set.

    Attributes:
        suffix: Suffix of its annotation files, `val2017` of `instances_val2017.json`.
        images: The folder of its photos.
        num_images: How many there are.
    """

    suffix: str
    images: str
    num_images: int


@dataclass(frozen=True)
class CocoSet:
    """A data set in the folder `name` below the root folder; `splits` by the names train, val and test.

    `image_px` is the longer side of its photos.
    """

    name: str
    splits: Mapping[str, CocoSplit]
    image_px: int

    def size(self, num_classes: int) -> DatasetSize:
        """Return the size of the data set, known without reading it."""
        train, test = (self.splits[name].num_images if name in self.splits else 0 for name in ("train", "test"))
        return DatasetSize(train, test, self.image_px, channels=3, num_classes=num_classes)

    def annotation_files(self, root: Path, content: str) -> dict[str, Path]:
        """Return the file of each split with `content`, INSTANCES or CAPTIONS. Raises DataError if one is missing."""
        folder = root / self.name / "annotations"
        paths = {split: folder / f"{content}_{files.suffix}.json" for split, files in self.splits.items()}
        missing = next((path for path in paths.values() if not path.is_file()), None)
        if missing is not None:
            problem = f"{missing}: no such file" if folder.is_dir() else f"{self.name} is not in {root}"
            raise DataError(problem, f"`cvlab data fetch {self.name}` gets it, or says how")
        return paths

    def ready(self, root: Path) -> bool:
        """Return whether the annotation files and the folders of the photos are present."""
        folder = root / self.name
        files = [
            f"{content}_{split.suffix}.json" for split in self.splits.values() for content in (INSTANCES, CAPTIONS)
        ]
        return all((folder / "annotations" / name).is_file() for name in files) and all(
            (folder / split.images).is_dir() for split in self.splits.values()
        )

    def check_counts(self, root: Path, counts: Mapping[str, int]) -> None:
        """Raise DataError unless each split has as many photos as were published."""
        for split, files in self.splits.items():
            if counts[split] != files.num_images:
                problem = f"{counts[split]} photos of {split}, not {files.num_images}"
                raise DataError(f"{root / self.name}: {problem}", "restore the photos, or fetch the data set again")


PEOPLE_SPLITS = {"train": 2000, "val": 200, "test": 300}
COCO_PEOPLE = CocoSet(
    "coco_people", {split: CocoSplit(split, "images", count) for split, count in PEOPLE_SPLITS.items()}, image_px=448
)


def fetch_people(root: Path, origin: Path | None, _wait: bool) -> None:
    """Install coco_people from `origin`, its folder or a zip file with it."""
    name = COCO_PEOPLE.name
    if origin is None:
        raise DataError(
            f"{name} is published nowhere as it is",
            f"`cvlab data fetch {name} --from FOLDER|ZIP` copies yours to {root / name}",
        )
    with temporary_folder(root) as scratch:
        if origin.is_file():
            archives.extract_zip(origin, scratch / "zip", max_bytes=10**9, max_members=10_000)
        folder = scratch / "zip" if origin.is_file() else origin
        source = next((parent for parent in (folder, folder.parent) if COCO_PEOPLE.ready(parent)), None)
        if source is None:
            raise DataError(f"{origin}: not {name}", f"name a folder {name} with `annotations` and `images`")
        for part in ("annotations", "images"):
            shutil.copytree(source / name / part, scratch / name / part)
        install_folder(scratch / name, root / name)


COCO = CocoSet(
    "coco",
    {"train": CocoSplit("train2017", "train2017", 118_287), "val": CocoSplit("val2017", "val2017", 5_000)},
    image_px=640,
)


@dataclass(frozen=True)
class Archive:
    """An archive of COCO 2017, which holds one folder.

    Attributes:
        folder: The folder.
        path: Path of the archive, below URL.
        size: In bytes.
        checksum: COCO publishes none; this MD5 is the one that many projects have recorded.
        unpacked_bytes: At least as many as its files have together.
    """

    folder: str
    path: str
    size: int
    checksum: str
    unpacked_bytes: int

    @property
    def name(self) -> str:
        """Its file name."""
        return self.path.rpartition("/")[2]


URL = "http://images.cocodataset.org"  # the certificate of https is that of another host
ARCHIVES = (
    Archive(
        "annotations",
        "annotations/annotations_trainval2017.zip",
        252_907_541,
        "md5:f4bbac642086de4f52a3fdda2de5fa2c",
        1_200_000_000,
    ),
    Archive("val2017", "zips/val2017.zip", 815_585_330, "md5:442b8da7639aecaf257c1dceb8ba8c80", 900_000_000),
    Archive("train2017", "zips/train2017.zip", 19_336_861_798, "md5:cced6f7f71b7629ddf16f17bbcfab6b2", 20_000_000_000),
)
MAX_MEMBERS = 130_000


def fetch_coco(root: Path, origin: Path | None, wait: bool) -> None:
    """Install the parts of COCO that are missing: from the network, or from `origin`.

    An archive is removed when its folder is installed, so that an interrupted fetch resumes where it was.

    Args:
        root: The folder of all data sets.
        origin: One of the archives, or a folder with some of them; None for the network.
        wait: Wait for a slow source.

    Raises:
        DataError: An archive cannot be had or is not the published one, or the disk has too little space.
    """
    missing = [archive for archive in ARCHIVES if not (root / COCO.name / archive.folder).is_dir()]
    if origin is not None:
        paths = {archive: origin / archive.name if origin.is_dir() else origin for archive in ARCHIVES}
        local = {archive: path for archive, path in paths.items() if path.is_file() and path.name == archive.name}
        if not local:
            names = ", ".join(archive.name for archive in ARCHIVES)
            raise DataError(f"{origin}: no archive of COCO", f"name a folder with {names}, or one of them")
        _require_space(root, sum(archive.unpacked_bytes for archive in local))
        for archive, path in local.items():
            download.verify(path, archive.checksum)
            _install(archive, path, root)
        return
    folder = root / "downloads" / COCO.name
    _require_space(root, _needed_bytes(missing, folder))
    for archive in missing:
        path = download.fetch((f"{URL}/{archive.path}",), folder / archive.name, archive.checksum, archive.size, wait)
        _install(archive, path, root)
        path.unlink()


def _needed_bytes(missing: Sequence[Archive], folder: Path) -> int:
    """Return the free space that is needed to install archives one after the other, some of which are downloaded."""
    needed = installed = 0
    for archive in missing:
        partial = folder / f"{archive.name}.partial"
        path = partial if partial.is_file() else folder / archive.name
        to_download = archive.size - path.stat().st_size if path.is_file() else archive.size
        needed = max(needed, installed + to_download + archive.unpacked_bytes)
        installed += archive.unpacked_bytes
    return needed


def _require_space(root: Path, needed: int) -> None:
    """Raise DataError if the disk of the root folder has less free space than `needed` bytes."""
    existing = next(path for path in (root, *root.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        problem = f"{COCO.name} needs {console.format_bytes(needed)}, {console.format_bytes(free)} are free"
        raise DataError(f"{root}: {problem}", "free space, or choose another folder with CVLAB_DATA")


def _install(archive: Archive, path: Path, root: Path) -> None:
    """Unpack a verified archive and install its folder in one step, if it has all photos."""
    console.info(f"unpacking {path}")
    with temporary_folder(root) as scratch:
        archives.extract_zip(path, scratch, max_bytes=archive.unpacked_bytes, max_members=MAX_MEMBERS)
        folder = scratch / archive.folder
        for split in COCO.splits.values():
            count = len(list(folder.glob("*.jpg"))) if folder.is_dir() else 0
            if split.images == archive.folder and count != split.num_images:
                raise DataError(f"{path}: {count} photos, not {split.num_images}", "get the archive again")
        install_folder(folder, root / COCO.name / archive.folder)
