"""Headers of images, which all readers of annotations use."""

from cvlab.data import photo_paths, photos
from cvlab.experiments.detection.data import annotations
from tests.experiments.detection.data.box_files import write_photo


def test_headers_agree_with_decoded_photos(tmp_path):
    for orientation in (None, 1, 6):
        for ending in photo_paths.SUFFIXES[:3] + photo_paths.SUFFIXES[4:]:
            path = write_photo(tmp_path / f"x{ending}", orientation=orientation)
            header = annotations.read_header(path)
            size = (header.height, header.width) if header.orientation >= 5 else (header.width, header.height)
            assert size == photos.load(path).size
    late = tmp_path / "late.png"  # a PNG whose EXIF comes after its pixels
    raw = write_photo(tmp_path / "y.png", orientation=6).read_bytes()
    start = raw.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(raw[start : start + 4], "big")
    late.write_bytes(raw[:start] + raw[end:-12] + raw[start:end] + raw[-12:])
    assert annotations.read_header(late).orientation == 6
    assert photos.load(late).size == (40, 60)
