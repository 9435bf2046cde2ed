"""The images of a configuration, and the size of the result."""

from PIL import Image

from cvlab.data import photo_paths, photos
from cvlab.experiments.style.sample_painting import sample_painting


def load_image(name: str) -> Image.Image:
    """Read an image by name: a file, or a bundled image. Raises DataError if it cannot be read."""
    return sample_painting() if name == photo_paths.SAMPLE_PAINTING else photos.load(photo_paths.find_images([name])[0])


def scaled_size(image: Image.Image, size_px: int, side: str) -> tuple[int, int]:
    """Return the width and height at which the longer (or shorter) side of an image is `size_px`."""
    factor = size_px / (max(image.size) if side == "longer" else min(image.size))
    return max(1, round(image.width * factor)), max(1, round(image.height * factor))
