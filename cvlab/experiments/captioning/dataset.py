"""Photos with captions: Flickr8k, COCO, a CSV file, and generated scenes.

Sources: Hodosh et al., 2013 (Flickr8k, official splits); Chen et al., 2015, "Microsoft COCO captions".
"""

import functools
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from cvlab import registry
from cvlab.data import rng
from cvlab.data.captions import read_coco, read_csv
from cvlab.data.datasets import DatasetSize, DatasetSource
from cvlab.errors import ConfigError, DataError
from cvlab.experiments.captioning import scene_captions
from cvlab.storage.cache import install_folder, temporary_folder

CUSTOM = "captions"


SPLITS = ("train", "val", "test")


SEED = 0  # of the photos that become `val` and `test`


FLICKR_SPLITS = {"train": "train", "val": "dev", "test": "test"}  # ours -> Flickr8k's


FORMS = "a CSV with the columns image and caption, or COCO's captions as JSON, beside a folder of images"


@dataclass(frozen=True)
class CaptionSample:
    """A photo and what people say of it, as they wrote it."""

    path: Path
    sentences: tuple[str, ...]


@dataclass(frozen=True)
class CaptionDataset:
    """A set of photos with sentences; `splits` has `train`, `val` and `test`."""

    name: str
    splits: dict[str, tuple[CaptionSample, ...]]


def flickr8k(root: Path) -> CaptionDataset:
    """Return Flickr8k in its official splits. DataError where it is not there or a photo has no sentence."""
    folder = root / "flickr8k"
    hint = "`cvlab data fetch flickr8k --from FOLDER` takes a copy that you have"
    if not folder.is_dir():
        raise DataError(f"flickr8k is not in {root}", hint)
    sentences = read_csv(folder / "captions.txt")
    by_stem = {Path(name).stem: values for name, values in sentences.items()}
    splits = {}
    for split, theirs in FLICKR_SPLITS.items():
        path = folder / f"Flickr_8k.{theirs}Images.txt"
        try:
            names = path.read_text(encoding="utf-8").split()
        except OSError as error:
            raise DataError(f"{path}: {error.strerror or error}", hint) from error
        items = []
        for name in names:
            if Path(name).stem not in by_stem:
                raise DataError(f"{folder / 'captions.txt'}: no caption of {name}, which is in {path.name}")
            items.append(CaptionSample(folder / "Images" / name, tuple(by_stem[Path(name).stem])))
        splits[split] = tuple(items)
    return CaptionDataset("flickr8k", splits)


def read_custom(path: Path, val_fraction: float) -> CaptionDataset:
    """Read a user's own set: a file of captions whose images lie beside it, below it or in `images`.

    The last photos in a fixed random order are `val`; there is no `test`.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file", f"name {FORMS}")
    sentences = read_coco(path) if path.suffix == ".json" else read_csv(path)
    folders = [path.parent, path.parent / "images", path.parent / "Images", path.parent.parent / "images"]
    items = [CaptionSample(_place(name, folders, path), tuple(values)) for name, values in sentences.items()]
    order = rng.permutation(SEED, 0, len(items), torch.device("cpu")).tolist()
    num_val = max(int(bool(val_fraction)), round(len(items) * val_fraction))
    if num_val >= len(items):
        raise ConfigError(f"{path}: {len(items)} photos are too few to split", "a smaller val_fraction")
    shuffled = tuple(items[k] for k in order)
    cut = len(items) - num_val
    parts: tuple[tuple[CaptionSample, ...], ...] = (shuffled[:cut], shuffled[cut:], ())
    return CaptionDataset(path.stem, dict(zip(SPLITS, parts, strict=True)))


def _place(name: str, folders: Iterable[Path], listed: Path) -> Path:
    for folder in folders:
        if os.path.isfile(folder / name):  # False also for a name longer than the disk allows
            return folder / name
    raise DataError(
        f"{listed}: {name[:200]!r} is not beside it", "put the images into a folder `images` beside the file"
    )


def scenes(root: Path) -> CaptionDataset:
    """Return the built-in scenes with their sentences, generated at first use."""
    folder = scene_captions.SET.folder(root)
    splits: dict[str, list[CaptionSample]] = {split: [] for split in SPLITS}
    for name, sentences in read_csv(folder / "captions.csv").items():
        splits[name.partition("_")[0]].append(CaptionSample(folder / "images" / name, tuple(sentences)))
    return CaptionDataset("scene_sentences", {split: tuple(items) for split, items in splits.items()})


def load(name: str, root: Path, path: str | None = None, val_fraction: float = 0.1) -> CaptionDataset:
    """Return a set by name, or the user's own (`captions`) from `path`."""
    if (name == CUSTOM) != (path is not None):
        raise ConfigError(f"data {name}: " + ("path is missing" if path is None else "path goes with name: captions"))
    if path is not None:
        return read_custom(Path(path), val_fraction)
    if name == "flickr8k":
        return flickr8k(root)
    if name == "scene_sentences":
        return scenes(root)
    raise registry.unknown_name_error("set of photos with sentences", name, ("flickr8k", "scene_sentences", CUSTOM))


def _summary(name: str, root: Path) -> str:
    found = load(name, root)
    items = [item for split in found.splits.values() for item in split]
    missing = [item.path for item in items if not item.path.is_file()]
    if missing:
        raise DataError(f"{missing[0]}: no such photo, as of {len(missing)} others", "restore the set's photos")
    return f"{len(items)} photos, {sum(len(item.sentences) for item in items)} sentences"


def _fetch_flickr8k(root: Path, origin: Path | None, patient: bool) -> None:
    """Copy a Flickr8k that the user has; it is given out on request only."""
    if origin is None:
        raise DataError(
            "flickr8k is given out on request only", "`cvlab data fetch flickr8k --from FOLDER` copies yours"
        )
    if not (origin / "captions.txt").is_file() or not (origin / "Images").is_dir():
        raise DataError(f"{origin}: not Flickr8k", "it needs captions.txt, Images and Flickr_8k.*Images.txt")
    with temporary_folder(root) as scratch:
        shutil.copytree(origin, scratch / "flickr8k")
        install_folder(scratch / "flickr8k", root / "flickr8k")


@dataclass(frozen=True, kw_only=True)
class CaptionDatasetSource(DatasetSource[CaptionDataset]):
    """A data set for captioning."""

    kind = CUSTOM
    contents = "photos with sentences"

    def load(self, root: Path, path: str | None = None, val_fraction: float = 0.1) -> CaptionDataset:
        """Read the data set below `root`, or the user's own from `path`; see the function `load`."""
        return load(self.name, root, path, val_fraction)


FLICKR8K = CaptionDatasetSource(
    name="flickr8k",
    summary="8,000 everyday photos with five sentences each, official splits",
    license="research and education only",
    size=DatasetSize(train_images=6000, test_images=1000, image_px=224, channels=3, num_classes=1),
    ready=lambda root: (root / "flickr8k" / "captions.txt").is_file(),
    check=functools.partial(_summary, "flickr8k"),
    fetch=_fetch_flickr8k,
)


SCENE_SENTENCES = CaptionDatasetSource(
    name="scene_sentences",
    summary="3,500 generated pictures of 224x224 px with a sentence each; built in",
    license="MIT, as cvlab",
    size=DatasetSize(
        train_images=scene_captions.COUNTS["train"],
        test_images=scene_captions.COUNTS["test"],
        image_px=224,
        channels=3,
        num_classes=1,
    ),
    ready=scene_captions.SET.ready,
    check=scene_captions.SET.check,
)


CAPTIONS = CaptionDatasetSource(
    name=CUSTOM,
    summary="your own photos with sentences: a CSV (image,caption) or COCO's JSON; data.path names it",
    license="yours",
    size=DatasetSize(train_images=1, test_images=0, image_px=1, channels=3, num_classes=1),
    ready=lambda _: False,
    check=lambda _: "your own, read and checked by every run",
    is_custom=True,
)
