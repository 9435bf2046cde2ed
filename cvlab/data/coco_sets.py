"""Published data sets in COCO's layout, which have boxes and captions: where their files lie, how they are installed.

`<root>/NAME/annotations/` holds `instances_SPLIT.json` and `captions_SPLIT.json`. Reading boxes is the task of
detection, reading captions that of captioning.

References:
    Lin et al., 2014, "Microsoft COCO: common objects in context".
    Chen et al., 2015, "Microsoft COCO captions: data collection and evaluation server".
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cvlab.errors import DataError
from cvlab.storage import archives
from cvlab.storage.cache import install_folder, temporary_folder

INSTANCES, CAPTIONS = "instances", "captions"  # what the annotation files of a split hold


@dataclass(frozen=True)
class CocoSplit:
    """A split of a data set.

    Attributes:
        suffix: Of its annotation files, `val2017` of `instances_val2017.json`.
        images: The folder of its photos.
        num_images: How many there are.
    """

    suffix: str
    images: str
    num_images: int


@dataclass(frozen=True)
class CocoSet:
    """A data set in the folder `name` below the root folder; `splits` by the names train, val and test."""

    name: str
    splits: Mapping[str, CocoSplit]

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
    "coco_people", {split: CocoSplit(split, "images", count) for split, count in PEOPLE_SPLITS.items()}
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
