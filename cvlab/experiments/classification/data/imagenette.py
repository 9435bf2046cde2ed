"""Imagenette (Howard, 2019), version 2: photos of ten classes of ImageNet, 160 px on the shorter side.

`<root>/imagenette2-160/` holds train/ and val/ with a folder for each class, named by its WordNet number.
"""

from dataclasses import replace
from pathlib import Path

from cvlab.data import descriptions
from cvlab.errors import DataError
from cvlab.experiments.classification.data import folder
from cvlab.experiments.classification.data.folder import PhotoListing, PhotoSource, SplitConfig
from cvlab.experiments.classification.data.published import Download
from cvlab.storage import archives, download
from cvlab.storage.cache import install_folder, temporary_folder

FOLDER, NAMES = descriptions.IMAGENETTE_FOLDER, descriptions.IMAGENETTE_NAMES
ARCHIVE = Download(
    "imagenette2-160.tgz",
    "88daccb09b6fce93f45e6c09ddeb269cce705549e6bff322092a2a5a11489863",
    0,  # asked of the server
    ("https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-160.tgz",),
)
NUM_TRAIN, NUM_VAL = 9_469, 3_925
HINT = "`cvlab data fetch imagenette` gets it"


def list_photos(root: Path, _path: Path | None, config: SplitConfig) -> PhotoListing:
    """List the photos with the names of their classes; the published validation split is `val`."""
    if not SOURCE.ready(root):
        raise DataError(f"imagenette is not in {root}", HINT)
    listing = folder.scan(root / FOLDER, config)
    photos = tuple(replace(photo, label=NAMES.get(photo.label, photo.label)) for photo in listing.photos)
    return replace(listing, photos=photos, classes=tuple(NAMES.get(name, name) for name in listing.classes))


def check(root: Path) -> str:
    """Count the photos. Raises DataError if some are missing."""
    listing = list_photos(root, None, SplitConfig())
    counts = listing.count("train"), listing.count("val")
    if counts != (NUM_TRAIN, NUM_VAL):
        raise DataError(f"{root / FOLDER}: {counts[0]} + {counts[1]} photos, not {NUM_TRAIN} + {NUM_VAL}", HINT)
    return f"{NUM_TRAIN} photos to train on, {NUM_VAL} to validate"


def fetch(root: Path, origin: Path | None, wait: bool) -> None:
    """Download the archive, or take it, or the folder that it holds, from `origin`."""
    if origin is None:
        size, _ = download.published_size_and_sha256(ARCHIVE.urls[0])
        path = download.fetch(ARCHIVE.urls, root / "downloads" / ARCHIVE.name, ARCHIVE.checksum, size, wait)
        _install(path, root)
        path.unlink()
        return
    path = origin / ARCHIVE.name if origin.is_dir() else origin
    if not path.is_file():
        raise DataError(f"{origin}: neither {ARCHIVE.name} nor a folder with it", "give one of the two")
    download.verify(path, ARCHIVE.checksum)
    _install(path, root)


def _install(path: Path, root: Path) -> None:
    with temporary_folder(root) as scratch:
        archives.extract_tar(path, scratch, max_bytes=400_000_000, max_members=20_000)
        check(scratch)
        install_folder(scratch / FOLDER, root / FOLDER)


SOURCE = PhotoSource(
    **descriptions.of_source("images", "imagenette"),
    read=folder.not_loadable,
    check=check,
    fetch=fetch,
    list_photos=list_photos,
)
