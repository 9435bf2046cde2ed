"""The images that a network is looked at with: photos, or a split of the data that it was trained on."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from cvlab.data import photo_paths, photos
from cvlab.errors import DataError
from cvlab.experiments.common.labeled_classifier import LabeledImages, to_pixels
from cvlab.models.pretrained import PretrainedClassifier

THUMBNAIL_PX = 96


@dataclass(frozen=True)
class ImageBatch:
    """Some images of a set.

    Attributes:
        names: What the images are called.
        inputs: What the model takes, (N, C, S, S) in [0, 1].
        pictures: The images as pictures, reduced.
        labels: Their classes, int64 (N,), or None.
    """

    names: list[str]
    inputs: Tensor
    pictures: list[Image.Image]
    labels: Tensor | None


@dataclass(frozen=True)
class ImageSet:
    """A set of images.

    Attributes:
        title: What it is.
        count: Number of images, some of which may not be readable.
        classes: Names of the classes; empty if there are no labels.
        read: Returns the images of a range; those that cannot be read are left out.
    """

    title: str
    count: int
    classes: tuple[str, ...]
    read: Callable[[int, int], ImageBatch]

    def batches(self, batch_size: int) -> Iterator[ImageBatch]:
        """Yield the images in order."""
        for start in range(0, self.count, batch_size):
            batch = self.read(start, min(start + batch_size, self.count))
            if batch.names:
                yield batch


def evenly_spaced(total: int, count: int) -> list[int]:
    """Return at most `count` of the indices below `total`, ascending, at even intervals."""
    count = min(total, count)
    return [k * total // count for k in range(count)]


def of_split(split: LabeledImages, num_images: int) -> ImageSet:
    """Return some images of a split, at even intervals."""
    indices = torch.tensor(evenly_spaced(len(split.labels), num_images))

    def read(start: int, end: int) -> ImageBatch:
        chosen = indices[start:end]
        pixels = split.images(chosen)  # uint8 (N, H, W, C)
        pictures = [_reduced(_to_picture(image)) for image in pixels]
        return ImageBatch([f"image {int(k)}" for k in chosen], to_pixels(pixels), pictures, split.labels[chosen].cpu())

    return ImageSet(f"{split.data} {split.split}", len(indices), split.classes, read)


def _to_picture(pixels: Tensor) -> Image.Image:
    array = pixels.cpu().numpy()
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array[..., :3]).convert("RGB")


def _reduced(picture: Image.Image) -> Image.Image:
    if max(picture.size) <= THUMBNAIL_PX:
        return picture
    picture = picture.copy()
    picture.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    return picture


def list_folder(folder: Path) -> tuple[list[Path], list[int], tuple[str, ...]]:
    """Return the photos of a folder, the class of each, and the classes: its subfolders, if it has no photos itself.

    Raises:
        DataError: There are no photos, or the folder cannot be read.
    """
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror}", "give a folder that can be read") from error
    if any(path.suffix.lower() in photo_paths.SUFFIXES and path.is_file() for path in entries):
        return photo_paths.find_images([str(folder)]), [], ()
    paths: list[Path] = []
    labels: list[int] = []
    classes: list[str] = []
    for subfolder in (path for path in entries if path.is_dir() and not path.name.startswith(".")):
        photos_of_class = [path for path in sorted(subfolder.iterdir()) if path.suffix.lower() in photo_paths.SUFFIXES]
        if photos_of_class:
            paths += photos_of_class
            labels += [len(classes)] * len(photos_of_class)
            classes.append(subfolder.name)
    if not paths:
        raise DataError(f"{folder}: no photos in this folder or its subfolders", photo_paths.FORMAT_HINT)
    return paths, labels, tuple(classes)


def of_photos(
    paths: Sequence[Path],
    labels: Sequence[int],
    classes: tuple[str, ...],
    title: str,
    model: PretrainedClassifier,
    on_error: Callable[[Path, DataError], None],
) -> ImageSet:
    """Return photos as a set of images.

    Args:
        paths: The photos.
        labels: Their classes; empty if they have none.
        classes: Names of the classes.
        title: What the set is called.
        model: The model, which determines size and crop.
        on_error: Called for each photo that cannot be read, which is then left out.
    """

    def read(start: int, end: int) -> ImageBatch:
        names: list[str] = []
        tensors: list[Tensor] = []
        pictures: list[Image.Image] = []
        labels_read: list[int] = []
        for index in range(start, end):
            try:
                image = model.transform(photos.load(paths[index]))
            except DataError as error:
                on_error(paths[index], error)
                continue
            names.append(paths[index].name)
            tensors.append(photos.to_tensor(image))
            pictures.append(_reduced(image))
            labels_read += labels[index : index + 1]
        inputs = torch.stack(tensors) if tensors else torch.empty(0)
        return ImageBatch(names, inputs, pictures, torch.tensor(labels_read) if labels else None)

    return ImageSet(title, len(paths), classes, read)
