"""Photos for the tests of commands."""

import pytest

from cvlab.data import photo_paths, photos


@pytest.fixture
def two_photos(tmp_path):
    """Return the paths of two small crops of the bundled photo, of unusual sizes."""
    photo = photos.load(photo_paths.find_images(["sample"])[0])
    photo.crop((100, 40, 400, 300)).save(tmp_path / "wide.png")
    photo.crop((150, 0, 390, 331)).save(tmp_path / "tall.png")
    return [tmp_path / "wide.png", tmp_path / "tall.png"]
