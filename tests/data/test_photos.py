"""Reading photos of every mode, orientation and size, and of damaged files; finding photos by name."""

import io
import struct
import time
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from cvlab.data import photo_paths, photos
from cvlab.errors import DataError


@pytest.fixture
def corners_image():
    """Return a photo with a different color in each corner."""
    array = np.zeros((40, 60, 3), np.uint8)
    array[:20, :30], array[:20, 30:], array[20:, :30], array[20:, 30:] = (250, 0, 0), (0, 250, 0), (0, 0, 250), 250
    return Image.fromarray(array)


def corners(image):
    w, h = image.size
    return [image.getpixel(xy) for xy in ((4, 4), (w - 5, 4), (4, h - 5), (w - 5, h - 5))]


RED, GREEN, BLUE, WHITE = (250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 250)


@pytest.mark.parametrize("extension", ["png", "bmp", "jpg", "webp"])
def test_formats(corners_image, tmp_path, extension):
    corners_image.save(tmp_path / f"a.{extension}", **({"quality": 95} if extension in ("jpg", "webp") else {}))
    for actual, expected in zip(
        corners(photos.load(tmp_path / f"a.{extension}")), (RED, GREEN, BLUE, WHITE), strict=True
    ):
        assert max(abs(a - b) for a, b in zip(actual, expected, strict=True)) < 12


@pytest.mark.parametrize(
    ("orientation", "order"),
    [(1, (0, 1, 2, 3)), (2, (1, 0, 3, 2)), (3, (3, 2, 1, 0)), (4, (2, 3, 0, 1)), (6, (2, 0, 3, 1)), (8, (1, 3, 0, 2))],
)
def test_exif_orientation(corners_image, tmp_path, orientation, order):
    exif = Image.Exif()
    exif[0x0112] = orientation
    corners_image.save(tmp_path / "a.png", exif=exif)
    colors = (RED, GREEN, BLUE, WHITE)
    assert corners(photos.load(tmp_path / "a.png")) == [colors[k] for k in order]


def test_modes(tmp_path):
    gray = Image.fromarray(np.full((4, 5), 100, np.uint8))
    transparent = Image.new("RGBA", (5, 4), (10, 20, 30, 0))
    palette = Image.new("P", (5, 4), 1)
    palette.putpalette([0, 0, 0, 9, 8, 7])
    gray16 = Image.fromarray(np.full((4, 5), 100 * 257, np.uint16))
    cases = {
        "gray": (gray, {}, (100,) * 3),
        "gray with alpha": (Image.merge("LA", (gray, Image.new("L", (5, 4), 255))), {}, (100,) * 3),
        "transparent is white": (transparent, {}, (255,) * 3),
        "palette": (palette, {}, (9, 8, 7)),
        "palette with a transparent color": (palette, {"transparency": 1}, (255,) * 3),
        "16 bits": (gray16, {}, (100,) * 3),
        "one bit": (Image.new("1", (5, 4), 1), {}, (255,) * 3),
    }
    for name, (image, options, expected) in cases.items():
        image.save(tmp_path / "a.png", **options)
        assert photos.load(tmp_path / "a.png").getpixel((2, 2)) == expected, name
    Image.new("CMYK", (5, 4), (0, 255, 255, 0)).save(tmp_path / "a.jpg")
    red, green, blue = photos.load(tmp_path / "a.jpg").getpixel((2, 2))
    assert red > 240
    assert green < 15
    assert blue < 15


def damaged_jpeg(kind):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 90, 3), np.uint8)).save(buffer, format="JPEG")
    whole = buffer.getvalue()
    return {"empty": b"", "text": b"hello", "header only": whole[:20], "half": whole[: len(whole) // 2]}[kind]


@pytest.mark.parametrize("kind", ["empty", "text", "header only", "half"])
def test_errors_of_unreadable_files_are_one_line_with_the_file_name(tmp_path, kind):
    (tmp_path / "bad.jpg").write_bytes(damaged_jpeg(kind))
    with pytest.raises(DataError, match=r"bad\.jpg: ") as error:
        photos.load(tmp_path / "bad.jpg")
    assert "\n" not in str(error.value)


def bomb(width, height):
    """Return a PNG whose header states a size; its content is zeros."""

    def chunk(kind, content):
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [12_000, 50_000])
def test_decompression_bombs_are_rejected_before_decoding(tmp_path, side):
    (tmp_path / "bomb.png").write_bytes(bomb(side, side))
    start = time.monotonic()
    with pytest.raises(DataError, match=r"bomb\.png.*50 megapixels"):
        photos.load(tmp_path / "bomb.png")
    assert time.monotonic() - start < 1


def test_photos_of_one_pixel_and_of_extreme_aspect_ratio(tmp_path):
    from cvlab.ops.resample import EvalTransform

    Image.new("RGB", (1, 1), (1, 2, 3)).save(tmp_path / "dot.png")
    assert EvalTransform(224, 256)(photos.load(tmp_path / "dot.png")).getpixel((100, 100)) == (1, 2, 3)
    Image.new("RGB", (40_000, 1), (1, 2, 3)).save(tmp_path / "line.png")
    assert EvalTransform(224, 256)(photos.load(tmp_path / "line.png")).size == (224, 224)


def test_unsupported_formats_are_rejected(tmp_path):
    Image.new("RGB", (5, 5)).save(tmp_path / "a.gif")
    with pytest.raises(DataError, match="not a photo that can be read"):
        photos.load(tmp_path / "a.gif")


def test_find_images(tmp_path, corners_image):
    for name in ("b.jpg", "a.PNG", ".hidden.png", "notes.txt", "odd [1].png"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    names = [path.name for path in photo_paths.find_images([str(tmp_path)])]
    assert names == ["a.PNG", "b.jpg", "odd [1].png"]
    assert [p.name for p in photo_paths.find_images([f"{tmp_path}/*.jpg", f"{tmp_path}/b.jpg"])] == ["b.jpg"]
    assert [p.name for p in photo_paths.find_images([f"{tmp_path}/odd [1].png", f"{tmp_path}/missing.jpg"])] == [
        "odd [1].png",
        "missing.jpg",
    ]
    assert photos.load(photo_paths.find_images(["sample"])[0]).size == (512, 600)
    for pattern, text in (("empty", "no photos in this folder"), ("*.bmp", "matches no file")):
        with pytest.raises(DataError, match=text):
            photo_paths.find_images([f"{tmp_path}/{pattern}"])
    with pytest.raises(DataError, match="URLs are not downloaded"):
        photo_paths.find_images(["https://example.org/a.jpg"])


def test_missing_and_not_a_file(tmp_path):
    with pytest.raises(DataError, match=r"no such file; no photo at hand\? `sample`"):
        photos.load(tmp_path / "missing.jpg")
    with pytest.raises(DataError, match="not a file"):
        photos.load(tmp_path)


def test_conversion_to_tensors_and_back(corners_image):
    tensor = photos.to_tensor(corners_image)
    assert tensor.shape == (3, 40, 60)
    assert tensor.dtype == torch.float32
    assert 0.98 < tensor.max() < 0.981
    assert photos.to_image(tensor).tobytes() == corners_image.tobytes()
    batch = photos.to_batch([corners_image, corners_image])
    assert batch.equal(tensor.expand(2, -1, -1, -1))
    assert batch.is_contiguous(memory_format=torch.channels_last)
    assert photos.to_image(torch.tensor([-1.0, 0.5, 2.0]).view(3, 1, 1)).getpixel((0, 0)) == (0, 128, 255)


def noisy_jpeg(path, size=(61, 43), **options):
    noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)
    smooth = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
    smooth.save(path, quality=80, **options)
    return path


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
@pytest.mark.parametrize("missing", [1, 2])
def test_a_jpeg_without_its_end_marker_is_read_with_a_warning(tmp_path, capsys, options, missing):
    path = noisy_jpeg(tmp_path / "a.jpg", **options)
    expected = photos.load(path).tobytes()
    path.write_bytes(path.read_bytes()[:-missing])
    assert photos.load(path).tobytes() == expected
    assert photos.load(path).tobytes() == expected
    assert capsys.readouterr().err.count(f"warning: {path}: lacks the end marker of a JPEG") == 1


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
@pytest.mark.parametrize("missing", [12, 20, 50, 300])
def test_a_truncated_jpeg_is_rejected(tmp_path, options, missing):
    path = noisy_jpeg(tmp_path / "a.jpg", **options)
    path.write_bytes(path.read_bytes()[:-missing])
    with pytest.raises(DataError, match="truncated"):
        photos.load(path)


def test_warnings_of_pillow_are_ignored_without_changing_the_warning_filters(tmp_path, monkeypatch):
    path = tmp_path / "photo.jpg"
    exif = b"Exif\0\0II*\0\x08\0\0\0" + b"\xff" * 20  # more entries than there are bytes
    Image.new("RGB", (8, 8)).save(path, exif=exif)
    with monkeypatch.context() as patch:
        patch.setattr(warnings, "catch_warnings", None)
        assert photos.load(path).size == (8, 8)
        assert photos.read_metadata(path) is not None
    filters = list(warnings.filters)
    photos.load(path)
    assert warnings.filters == filters
    with warnings.catch_warnings():
        warnings.resetwarnings()
        warnings.simplefilter("error")
        photos.load(path)
        with pytest.raises(UserWarning, match="unrelated"):
            warnings.warn("unrelated", stacklevel=1)
