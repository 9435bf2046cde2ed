"""Captioned photos: Flickr8k, COCO, your own (a CSV or COCO's JSON), and generated scenes.

References:
    Hodosh et al., 2013, "Framing image description as a ranking task" (Flickr8k and its splits).
    Chen et al., 2015, "Microsoft COCO captions: data collection and evaluation server".
"""

import functools
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cvlab.data import captions as captions_files
from cvlab.data import coco_sets, datasets, descriptions, rng
from cvlab.data.coco_sets import CocoSet
from cvlab.data.datasets import DatasetSource, FetchFn
from cvlab.data.digest import DataDigest
from cvlab.errors import ConfigError, DataError
from cvlab.experiments.captioning import scene_captions
from cvlab.experiments.captioning.config import CaptionDataConfig
from cvlab.storage.cache import install_folder, temporary_folder

SPLITS = ("train", "val", "test")
SPLIT_SEED = 0  # of the random split of custom photos
FLICKR8K_SPLITS = {"train": "train", "val": "dev", "test": "test"}  # our name -> Flickr8k's
FORMATS = "a CSV with the columns image and caption, or COCO's captions as JSON, beside a folder of images"


@dataclass(frozen=True)
class CaptionSample:
    """A photo and its reference captions, as they were written."""

    path: Path
    captions: tuple[str, ...]


@dataclass(frozen=True)
class CaptionDataset:
    """A data set of captioned photos.

    Attributes:
        name: Its name.
        splits: `train`, `val` and `test`.
        extra: The further data sets that a combined one has; their `train` is part of its own.
    """

    name: str
    splits: dict[str, tuple[CaptionSample, ...]]
    extra: tuple["CaptionDataset", ...] = ()

    def digest(self) -> str:
        """Return the digest of all photos and captions."""
        digest = DataDigest()
        for split, samples in self.splits.items():
            digest.add_values([split, *(sample.captions for sample in samples)])
            digest.add_files(sample.path for sample in samples)
        digest.add_values(extra.digest() for extra in self.extra)
        return digest.hex()


def load_flickr8k(root: Path) -> CaptionDataset:
    """Load Flickr8k in its official splits.

    Args:
        root: The folder of all data sets.

    Raises:
        DataError: It is not there, or a photo has no caption.
    """
    folder = root / "flickr8k"
    hint = "`cvlab data fetch flickr8k --from FOLDER` copies yours"
    if not folder.is_dir():
        raise DataError(f"flickr8k is not in {root}", hint)
    captions = captions_files.read_csv(folder / "captions.txt")
    by_stem = {Path(name).stem: values for name, values in captions.items()}
    splits = {}
    for split, official_name in FLICKR8K_SPLITS.items():
        path = folder / f"Flickr_8k.{official_name}Images.txt"
        try:
            names = path.read_text(encoding="utf-8").split()
        except OSError as error:
            raise DataError(f"{path}: {error.strerror or error}", hint) from error
        samples = []
        for name in names:
            if Path(name).stem not in by_stem:
                raise DataError(f"{folder / 'captions.txt'}: no caption of {name}, which is in {path.name}")
            samples.append(CaptionSample(folder / "Images" / name, tuple(by_stem[Path(name).stem])))
        splits[split] = tuple(samples)
    return CaptionDataset("flickr8k", splits)


def load_coco(coco_set: CocoSet, root: Path) -> CaptionDataset:
    """Load the captions of a data set in COCO's layout; a split that it does not have is empty.

    Args:
        coco_set: The data set.
        root: The folder of all data sets.

    Raises:
        DataError: It is not there, or damaged.
    """
    splits: dict[str, tuple[CaptionSample, ...]] = dict.fromkeys(SPLITS, ())
    for split, path in coco_set.annotation_files(root, coco_sets.CAPTIONS).items():
        images = root / coco_set.name / coco_set.splits[split].images
        captions = captions_files.read_coco(path)
        splits[split] = tuple(CaptionSample(images / name, tuple(values)) for name, values in captions.items())
    return CaptionDataset(coco_set.name, splits)


def load_custom(path: Path, val_fraction: float) -> CaptionDataset:
    """Load a user's own captions and split them at random into `train` and `val`; `test` is empty.

    Args:
        path: A CSV or COCO's JSON; the images lie beside it, or in `images` or `Images` beside it or its folder.
        val_fraction: The share of photos that become `val`, at least one photo unless it is 0.

    Raises:
        DataError: The file is missing or damaged, or an image of it is missing.
        ConfigError: There are too few photos to split.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file", f"name {FORMATS}")
    captions = captions_files.read(path)
    folders = [path.parent, path.parent / "images", path.parent / "Images", path.parent.parent / "images"]
    samples = [CaptionSample(_find_image(name, folders, path), tuple(values)) for name, values in captions.items()]
    order = rng.permutation(SPLIT_SEED, 0, len(samples), torch.device("cpu")).tolist()
    num_val = max(int(bool(val_fraction)), round(len(samples) * val_fraction))
    if num_val >= len(samples):
        raise ConfigError(f"{path}: {len(samples)} photos are too few to split", "lower val_fraction")
    shuffled = tuple(samples[k] for k in order)
    num_train = len(samples) - num_val
    parts: tuple[tuple[CaptionSample, ...], ...] = (shuffled[:num_train], shuffled[num_train:], ())
    return CaptionDataset(path.stem, dict(zip(SPLITS, parts, strict=True)))


def _find_image(name: str, folders: Iterable[Path], captions_path: Path) -> Path:
    for folder in folders:
        if os.path.isfile(folder / name):  # False also for a name that is too long for the file system
            return folder / name
    raise DataError(
        f"{captions_path}: {name[:200]!r} is not beside it", "put the images into a folder `images` beside the file"
    )


def load_scene_captions(root: Path) -> CaptionDataset:
    """Load the generated scenes with one caption each; they are generated at first use."""
    folder = scene_captions.GENERATED.folder(root)
    splits: dict[str, list[CaptionSample]] = {split: [] for split in SPLITS}
    for name, captions in captions_files.read_csv(folder / "captions.csv").items():
        splits[name.partition("_")[0]].append(CaptionSample(folder / "images" / name, tuple(captions)))
    return CaptionDataset("scene_captions", {split: tuple(samples) for split, samples in splits.items()})


@dataclass(frozen=True, kw_only=True)
class CaptionDatasetSource(DatasetSource[CaptionDataset]):
    """A data set of captioned photos.

    Attributes:
        read: Reads the data set below a root folder; None for the custom one, which is read from a path.
    """

    kind = "captions"

    read: Callable[[Path], CaptionDataset] | None = None

    def load(self, root: Path, path: str | None = None, val_fraction: float = 0.1) -> CaptionDataset:
        """Read and verify the data set.

        Args:
            root: The folder of all data sets.
            path: The file of the custom data set; None for all others.
            val_fraction: The share of custom photos that become `val`.

        Raises:
            ConfigError: `path` cannot be used with this data set.
            DataError: The data set is missing or damaged.
        """
        if self.read is not None:
            if path is not None:
                raise ConfigError(f"data {self.name}: path requires name: captions")
            return self.read(root)
        if path is None:
            raise ConfigError(f"data {self.name}: path is missing")
        return load_custom(Path(path), val_fraction)


def load(name: str, root: Path, path: str | None = None, val_fraction: float = 0.1) -> CaptionDataset:
    """Load a captioned data set by name; arguments and errors are those of `CaptionDatasetSource.load`."""
    return datasets.get_of_kind(name, CaptionDatasetSource).load(root, path, val_fraction)


def combine(first: CaptionDataset, extra: Sequence[CaptionDataset]) -> CaptionDataset:
    """Add the training photos of further data sets to one; `val` and `test` remain those of the first."""
    if not extra:
        return first
    name = " + ".join(each.name for each in (first, *extra))
    train = tuple(sample for each in (first, *extra) for sample in each.splits["train"])
    return CaptionDataset(name, first.splits | {"train": train}, tuple(extra))


def load_configured(config: CaptionDataConfig, root: Path) -> CaptionDataset:
    """Load the data set of a configuration, with its `extra` ones; errors are those of `load`."""
    first = load(config.name, root, config.path, config.val_fraction)
    return combine(first, [load(name, root) for name in config.extra])


def _check(load_dataset: Callable[[Path], CaptionDataset], root: Path) -> str:
    """Return the number of photos and captions. DataError if a photo is missing."""
    samples = [sample for split in load_dataset(root).splits.values() for sample in split]
    missing = [sample.path for sample in samples if not sample.path.is_file()]
    if missing:
        raise DataError(f"{missing[0]}: no such photo ({len(missing)} are missing)", "restore the photos")
    return f"{len(samples)} photos, {sum(len(sample.captions) for sample in samples)} captions"


def _fetch_flickr8k(root: Path, origin: Path | None, wait: bool) -> None:
    """Copy a Flickr8k that the user has; it is distributed on request only."""
    if origin is None:
        raise DataError(
            "flickr8k is distributed on request only", "`cvlab data fetch flickr8k --from FOLDER` copies yours"
        )
    if not (origin / "captions.txt").is_file() or not (origin / "Images").is_dir():
        raise DataError(f"{origin}: not Flickr8k", "it needs captions.txt, Images and Flickr_8k.*Images.txt")
    with temporary_folder(root) as scratch:
        shutil.copytree(origin, scratch / "flickr8k")
        install_folder(scratch / "flickr8k", root / "flickr8k")


FLICKR8K = CaptionDatasetSource(
    **descriptions.of_source("captions", "flickr8k"),
    read=load_flickr8k,
    check=lambda root: _check(load_flickr8k, root),
    fetch=_fetch_flickr8k,
)


def _check_coco(coco_set: CocoSet, root: Path) -> str:
    """Return the number of photos and captions. DataError if photos are missing."""
    loaded = load_coco(coco_set, root)
    coco_set.check_counts(root, {split: len(samples) for split, samples in loaded.splits.items()})
    return _check(lambda _: loaded, root)


def _coco_source(coco_set: CocoSet, fetch: FetchFn) -> CaptionDatasetSource:
    return CaptionDatasetSource(
        **descriptions.of_source("captions", coco_set.name),
        read=functools.partial(load_coco, coco_set),
        check=functools.partial(_check_coco, coco_set),
        fetch=fetch,
    )


COCO_PEOPLE = _coco_source(coco_sets.COCO_PEOPLE, coco_sets.fetch_people)
COCO = _coco_source(coco_sets.COCO, coco_sets.fetch_coco)
SCENE_CAPTIONS = CaptionDatasetSource(
    **descriptions.of_source("captions", "scene_captions"),
    read=load_scene_captions,
    check=scene_captions.GENERATED.check,
)


CAPTIONS = CaptionDatasetSource(
    **descriptions.of_source("captions", "captions"),
    check=lambda _: "your own, read and checked by every run",
)
