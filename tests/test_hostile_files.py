"""Untrusted files, damaged by a seeded generator: each is read, or rejected by a one-line error, without side effects.

Cases that have raised another exception are separate tests below.
"""

import contextlib
import io
import json
import random
import re
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cvlab.data import photos
from cvlab.errors import CvlabError, DataError
from cvlab.experiments.captioning import dataset
from cvlab.experiments.detection.data import annotations
from cvlab.experiments.detection.data import dataset as data_dataset
from cvlab.experiments.detection.models.darknet import ConvSpec, read_darknet
from cvlab.models import weights
from cvlab.runs import checkpoint
from cvlab.storage import archives
from tests.experiments.detection.data.box_files import coco_set, voc_set, yolo_set

UNUSUAL_TOKENS = (
    *("", "-1", "0", "1e308", "-1e308", "nan", "Infinity", "9" * 400, "true", "null", "\0", "../../x", "/etc/passwd"),
    *(
        "<!ENTITY x SYSTEM 'file:///etc/passwd'>",
        "&x;",
        "\ufeff",
        "\ud800",
        '"',
        ",",
        "\n",
        "[" * 2000,
        "{}",
        "x" * 300,
    ),
)
TOKEN = re.compile(rb"[\w.+-]+|[<>\[\]{},:\"/]")


def damage(raw, draw):
    """Truncate, flip, repeat, zero or insert bytes, or replace a token of text by an unusual one."""
    kind = draw.choice(["cut", "flip", "zeros", "repeat", "insert", "word", "word", "word"])
    position = draw.randrange(len(raw) + 1)
    tokens = list(TOKEN.finditer(raw))
    if kind == "word" and tokens:
        token = draw.choice(tokens)
        return raw[: token.start()] + draw.choice(UNUSUAL_TOKENS).encode(errors="surrogatepass") + raw[token.end() :]
    if kind == "cut":
        return raw[:position]
    if kind == "repeat":
        end = min(len(raw), position + draw.randrange(1, 200))
        return raw[:end] + raw[position:]
    if kind == "insert":
        return raw[:position] + draw.randbytes(draw.randrange(1, 40)) + raw[position:]
    output = bytearray(raw)
    for k in range(position, min(len(raw), position + draw.choice([1, 1, 4, 64]))):
        output[k] = 0 if kind == "zeros" else output[k] ^ (1 << draw.randrange(8))
    return bytes(output)


def write_image(extension):
    def make(folder):
        noise = np.random.default_rng(0).integers(0, 255, (24, 31, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"photo.{extension}")
        return folder / f"photo.{extension}"

    return make


def captions_csv(folder):
    for k in range(4):
        Image.new("RGB", (8, 8)).save(folder / f"{k}.png")
    rows = [f'{k}.png,"a dog, a {word}"' for k in range(4) for word in ("ball", "stick")]
    (folder / "captions.csv").write_text("image,caption\n" + "\n".join(rows) + "\n")
    return folder / "captions.csv"


def captions_json(folder):
    captions_csv(folder).unlink()
    document = {
        "images": [{"id": k, "file_name": f"{k}.png"} for k in range(4)],
        "annotations": [{"image_id": k, "caption": f"a dog {k}"} for k in range(4)],
    }
    (folder / "captions.json").write_text(json.dumps(document))
    return folder / "captions.json"


def tar_of(kind):
    def make(folder):
        with tarfile.open(folder / "x.tar", f"w:{kind}") as tar:
            for name in ("a/b.txt", "a/c.txt", "d" * 120):
                member = tarfile.TarInfo(name)
                member.size = 700
                tar.addfile(member, io.BytesIO(bytes(range(100)) * 7))
        return folder / "x.tar"

    return make


def zip_of(folder):
    with zipfile.ZipFile(folder / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("a/b.txt", "a/c.txt"):
            archive.writestr(name, bytes(range(100)) * 7)
    return folder / "x.zip"


STATE = {"conv.weight": torch.arange(54.0).view(2, 3, 3, 3), "conv.bias": torch.zeros(2)}
CONVS = (ConvSpec("conv", 3, 2, 3),)


def safetensors(folder):
    from safetensors.torch import save_file

    save_file(STATE, folder / "w.safetensors")
    return folder / "w.safetensors"


def pth(folder):
    torch.save(STATE, folder / "w.pth")
    return folder / "w.pth"


def write_checkpoint(folder):
    checkpoint.write(folder / "step.pt", STATE)
    return folder / "step.pt"


def darknet(folder):
    raw = struct.pack("<iiiq", 0, 2, 0, 100) + np.arange(4 * 2 + 54, dtype="<f4").tobytes()
    (folder / "w.weights").write_bytes(raw)
    return folder / "w.weights"


def read_boxes(path):
    loaded = data_dataset.load("boxes", Path("nowhere"), str(path), val_fraction=0.5)
    for items in loaded.splits.values():
        for item in items:
            assert torch.isfinite(item.boxes_xyxy).all()
            assert (item.boxes_xyxy >= 0).all()
            assert (item.boxes_xyxy[:, 2:] > item.boxes_xyxy[:, :2]).all()
            assert len(item.labels) == len(item.boxes_xyxy)
            assert all(0 <= label < len(loaded.classes) for label in item.labels.tolist())


def read_captions(path):
    for items in dataset.load_custom(path, 0.25).splits.values():
        assert all(item.path.is_file() and item.captions for item in items)


def read_photo(path):
    with contextlib.suppress(DataError):
        annotations.read_header(path)
    loaded = photos.load(path)
    assert loaded.mode == "RGB"
    assert loaded.width * loaded.height <= photos.MAX_PIXELS


def unpack_with(extract):
    def read(path):
        out = path.parent / "out"
        out.mkdir()
        extract(path, out, max_bytes=10_000, max_members=10)

    return read


KINDS = {  # name -> (function that writes a file or a folder and returns it, function that reads it, number of cases)
    "jpeg": (write_image("jpg"), read_photo, 150),
    "png": (write_image("png"), read_photo, 150),
    "bmp": (write_image("bmp"), read_photo, 80),
    "webp": (write_image("webp"), read_photo, 80),
    "voc": (voc_set, read_boxes, 200),
    "coco": (coco_set, read_boxes, 200),
    "yolo": (yolo_set, read_boxes, 200),
    "captions.csv": (captions_csv, read_captions, 120),
    "captions.json": (captions_json, read_captions, 120),
    "tar": (tar_of(""), unpack_with(archives.extract_tar), 100),
    "tar.gz": (tar_of("gz"), unpack_with(archives.extract_tar), 60),
    "tar.xz": (tar_of("xz"), unpack_with(archives.extract_tar), 60),
    "tar.bz2": (tar_of("bz2"), unpack_with(archives.extract_tar), 60),
    "zip": (zip_of, unpack_with(archives.extract_zip), 100),
    "safetensors": (safetensors, weights.read_state_dict, 100),
    "pth": (pth, weights.read_state_dict, 100),
    "checkpoint": (write_checkpoint, checkpoint.load, 100),
    "darknet": (darknet, lambda path: read_darknet(path, CONVS), 60),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_read_or_a_one_line_error(tmp_path, kind):
    make, read, count = KINDS[kind]
    num_errors = 0
    for seed in range(count):
        folder = tmp_path / str(seed) / "inside"
        folder.mkdir(parents=True)
        path = make(folder)
        draw = random.Random(f"{kind} {seed}")
        files = sorted(file for file in folder.rglob("*") if file.is_file()) if path.is_dir() else [path]
        damaged_file = draw.choice([file for file in files if path.is_file() or file.suffix != ".jpg"] or files)
        damaged_file.write_bytes(damage(damaged_file.read_bytes(), draw))
        try:
            read(path)
        except CvlabError as error:
            num_errors += 1
            assert "\n" not in str(error), (seed, error)
            assert error.code in (2, 4, 7), (seed, error)
        except Exception as error:
            raise AssertionError(
                f"{kind}, case {seed}, {damaged_file.name}: {type(error).__name__}: {error}"
            ) from error
        assert sorted(p.name for p in (tmp_path / str(seed)).iterdir()) == ["inside"], (
            f"case {seed} wrote outside its folder"
        )
    assert num_errors > count // 20, "the generator damages relevant bytes"


def error_of(read, path):
    with pytest.raises(CvlabError) as error:
        read(path)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["x" * 300, "x\0y", "../../etc", "a\nb"])
def test_invalid_file_names_in_annotations(tmp_path, name):
    table = captions_csv(tmp_path)
    table.write_text(f'image,caption\n"{name}",a dog\n')
    assert "is not beside it" in error_of(read_captions, table) or name == "x\0y"
    coco = coco_set(tmp_path / "coco") / "annotations/instances_train2017.json"
    document = json.loads(coco.read_text())
    document["images"][0]["file_name"] = name
    coco.write_text(json.dumps(document))
    assert "no object in any photo; a detector needs some to train on; photos that are not in" in error_of(
        read_boxes, coco
    )


def test_deeply_nested_json_is_rejected(tmp_path):
    for path, read in ((captions_json(tmp_path), read_captions), (coco_set(tmp_path / "coco"), read_boxes)):
        file = path if path.is_file() else next(path.rglob("*.json"))
        file.write_text("[" * 100_000)
        assert "not valid JSON" in error_of(read, path) or "not a COCO file" in error_of(read, path)


@pytest.mark.parametrize("compression", ["gz", "xz", "bz2"])
def test_a_damaged_compressed_archive_is_rejected(tmp_path, compression):
    path = tar_of(compression)(tmp_path)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 255
    path.write_bytes(raw)
    assert "cannot be unpacked" in error_of(
        lambda p: archives.extract_tar(p, p.parent / "o", max_bytes=9**9, max_members=9), path
    )
