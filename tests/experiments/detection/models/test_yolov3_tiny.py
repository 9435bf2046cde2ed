"""YOLOv3-tiny: darknet's file against a slow reference, boxes and letterboxes against loops, real photos."""

import csv
import hashlib
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from cvlab.data import photos
from cvlab.errors import ConfigError, DataError
from cvlab.experiments.detection.models import darknet, yolov3_tiny
from cvlab.experiments.detection.models.yolov3_tiny import COCO_CLASSES
from cvlab.models import weights
from cvlab.storage import download
from tests.conftest import REAL_DATA
from tests.fake_cifar import send, server

BYTES = 35_434_956  # size of the published file
SHAPES = [  # filters, inputs, size: from yolov3-tiny.cfg
    (16, 3, 3), (32, 16, 3), (64, 32, 3), (128, 64, 3), (256, 128, 3), (512, 256, 3), (1024, 512, 3), (256, 1024, 1),
    (512, 256, 3), (255, 512, 1), (128, 256, 1), (256, 384, 3), (255, 256, 1),
]  # fmt: skip


@pytest.fixture(scope="module")
def arrays():
    """Return random arrays for each convolution, in the order of the file: bias, factor, mean, variance, weight."""
    rng = np.random.default_rng(0)
    parameters = []
    for filters, inputs, size in SHAPES:
        bias, mean = rng.normal(0, 0.3, (2, filters)).astype("<f4")
        factor, variance = rng.uniform(0.5, 1.5, (2, filters)).astype("<f4")
        weight = rng.normal(0, (inputs * size * size) ** -0.5, (filters, inputs, size, size)).astype("<f4")
        parameters.append((bias, weight) if filters == 255 else (bias, factor, mean, variance, weight))
    return parameters


def to_darknet(arrays, version=(0, 2, 0)):
    num_seen = struct.pack("<q", 32_013_312) if version >= (0, 2, 0) else struct.pack("<i", 32_013_312)
    return struct.pack("<3i", *version) + num_seen + b"".join(part.tobytes() for parts in arrays for part in parts)


@pytest.fixture(scope="module")
def weights_file(arrays, tmp_path_factory):
    path = tmp_path_factory.mktemp("darknet") / "yolov3-tiny.weights"
    path.write_bytes(to_darknet(arrays))
    return path


@pytest.fixture(scope="module")
def model(weights_file):
    return yolov3_tiny.build(str(weights_file))


def darknet_pool(x, stride):
    """Compute max pooling of size 2 over the existing pixels only, as darknet does, with loops."""
    n, c, h, w = x.shape
    output = torch.empty(n, c, h // stride, w // stride)
    for i in range(h // stride):
        for j in range(w // stride):
            output[:, :, i, j] = x[:, :, i * stride : i * stride + 2, j * stride : j * stride + 2].amax((2, 3))
    return output


def reference_maps(arrays, x):
    """Evaluate yolov3-tiny.cfg section by section with the arrays of the file and separate normalizations."""
    remaining = iter(arrays)
    outputs, heads = [], []

    def conv(x):
        parts = [torch.from_numpy(part.copy()) for part in next(remaining)]
        padding = parts[-1].shape[2] // 2
        if len(parts) == 2:
            return F.conv2d(x, parts[1], parts[0], padding=padding)
        bias, factor, mean, variance, weight = (part.view(-1, 1, 1) if part.ndim == 1 else part for part in parts)
        x = (F.conv2d(x, weight, padding=padding) - mean) / torch.sqrt(variance + 1e-5) * factor + bias
        return torch.where(x > 0, x, 0.1 * x)

    for section in ("conv pool2 " * 5 + "conv pool1 conv conv conv conv yolo -4 conv up -1,8 conv conv yolo").split():
        if section == "conv":
            x = conv(x)
        elif section.startswith("pool"):
            x = darknet_pool(x, int(section[4:]))
        elif section == "up":
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        elif section == "yolo":
            heads.append(x)
        else:
            routed = [int(layer) for layer in section.split(",")]
            x = torch.cat([outputs[k if k >= 0 else len(outputs) + k] for k in routed], 1)
        outputs.append(x)
    assert next(remaining, None) is None
    return heads


class TestFile:
    def test_has_the_size_of_the_published_file(self, weights_file):
        assert weights_file.stat().st_size == BYTES == weights.PINNED_FILES["yolov3_tiny"].size

    def test_arrays_are_read_in_order(self, arrays, weights_file):
        tensors = darknet.read_darknet(weights_file, yolov3_tiny.CONVS)
        expected = [part for parts in arrays for part in parts]
        assert len(tensors) == len(expected)
        for tensor, array in zip(tensors.values(), expected, strict=True):
            assert np.array_equal(tensor.numpy(), array)

    def test_versions_before_0_2_have_a_shorter_header(self, arrays, tmp_path):
        (tmp_path / "old.weights").write_bytes(to_darknet(arrays, (0, 1, 0)))
        tensors = darknet.read_darknet(tmp_path / "old.weights", yolov3_tiny.CONVS)
        assert np.array_equal(tensors["conv22.weight"].numpy(), arrays[-1][1])

    @pytest.mark.parametrize("size", [0, 7, 12, 20, BYTES - 4, BYTES - 1, BYTES + 1, BYTES + 4])
    def test_a_file_of_wrong_size_is_rejected_with_both_sizes(self, weights_file, tmp_path, size):
        content = weights_file.read_bytes()
        (tmp_path / "w.weights").write_bytes(content[:size] + b"x" * (size - len(content)))
        with pytest.raises(DataError) as error:
            yolov3_tiny.build(str(tmp_path / "w.weights"))
        message = str(error.value)
        assert f"{size:,} bytes" in message
        assert f"{BYTES:,}" in message
        assert "\n" not in message
        assert "cvlab models fetch yolov3_tiny" in message
        assert error.value.code == 4

    def test_missing_weights(self, tmp_path, monkeypatch):
        monkeypatch.setenv("CVLAB_DATA", str(tmp_path))
        with pytest.raises(DataError, match=r"not on the disk; `cvlab models fetch yolov3_tiny` gets them"):
            yolov3_tiny.build()
        with pytest.raises(DataError, match="no such file"):
            yolov3_tiny.build(str(tmp_path / "gone.weights"))
        with pytest.raises(DataError, match="not a file"):
            yolov3_tiny.build(str(tmp_path))

    @pytest.mark.parametrize(("position", "value", "text"), [(1, math.nan, "not finite"), (3, -9.0, "negative")])
    def test_invalid_numbers_are_rejected(self, arrays, tmp_path, position, value, text):
        first = [part.copy() for part in arrays[0]]
        first[position][0] = value
        (tmp_path / "w.weights").write_bytes(to_darknet([first, *arrays[1:]]))
        with pytest.raises(DataError, match=text):
            yolov3_tiny.build(str(tmp_path / "w.weights"))


class TestModel:
    @pytest.mark.parametrize("shape", [(1, 3, 64, 64), (2, 3, 96, 32)])
    def test_maps_equal_the_reference(self, model, arrays, shape):
        x = torch.rand(shape)
        for actual, expected in zip(model(x), reference_maps(arrays, x), strict=True):
            assert expected.std() > 0.1
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)

    def test_is_frozen_and_channels_last(self, model):
        assert not model.training
        assert not any(p.requires_grad for p in model.parameters())
        assert model.conv12.weight.is_contiguous(memory_format=torch.channels_last)
        # folding removes three of four vectors of the batch norms
        assert sum(p.numel() for p in model.parameters()) == 8_858_734 - 3 * 3_184

    def test_images_are_not_modified(self, model):
        x = torch.rand(1, 3, 32, 32)
        before = x.clone()
        model(x)
        assert torch.equal(x, before)


def slow_detect(maps, floor):
    """Return the boxes with a score over the floor, computed number by number with the formulas of the paper."""
    all_anchors = [(10, 14), (23, 27), (37, 58), (81, 82), (135, 169), (344, 319)]
    detections = []
    for raw_map, stride, mask in zip(maps, (32, 16), ((3, 4, 5), (1, 2, 3)), strict=True):
        values = raw_map.double().tolist()
        for a, k in enumerate(mask):
            for row in range(len(values[0])):
                for column in range(len(values[0][0])):
                    tx, ty, tw, th, to, *classes = (values[85 * a + c][row][column] for c in range(85))
                    x, y = (column + sigmoid(tx)) * stride, (row + sigmoid(ty)) * stride
                    w, h = all_anchors[k][0] * math.exp(tw), all_anchors[k][1] * math.exp(th)
                    for label, score in enumerate(sigmoid(to) * sigmoid(t) for t in classes):
                        if score > floor:
                            detections.append((x - w / 2, y - h / 2, x + w / 2, y + h / 2, score, label))
    return torch.tensor(detections).view(-1, 6)


def sigmoid(t):
    return 1 / (1 + math.exp(-t))


class TestDetect:
    @pytest.mark.parametrize("floor", [0.2, 0.3, 0.999])
    def test_boxes_equal_the_loops(self, model, floor):
        images = torch.rand(2, 3, 64, 64)
        maps = model(images)
        detections = yolov3_tiny.detect(model, images, floor)
        assert len(detections) == 2
        for k, (boxes, scores, labels) in enumerate(detections):
            expected = slow_detect([m[k] for m in maps], floor)
            assert (len(expected) > 50) == (floor < 0.9)
            actual = torch.cat([boxes, scores[:, None], labels[:, None].float()], 1)
            assert boxes.shape == (len(expected), 4)
            assert labels.dtype == torch.int64
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-3)

    def test_a_box_may_have_several_labels(self):
        raw_map = torch.full((1, 255, 1, 1), -20.0)
        raw_map[0, 85 + 4] = raw_map[0, 85 + 5 + 15] = raw_map[0, 85 + 5 + 16] = 20.0
        empty_map = torch.full((1, 255, 2, 2), -20.0)
        ((boxes, scores, labels),) = yolov3_tiny.detect(
            lambda images: (raw_map, empty_map), torch.zeros(1, 3, 32, 32), 0.5
        )
        assert labels.tolist() == [15, 16]
        assert torch.equal(boxes[0], boxes[1])
        assert scores.tolist() == pytest.approx([1, 1])

    def test_huge_outputs_stay_finite(self):
        raw_map = torch.full((1, 255, 1, 1), 1e4)
        boxes, objectness, _ = yolov3_tiny.decode(raw_map, 32, (3, 4, 5))
        assert torch.isfinite(boxes).all()
        assert objectness.tolist() == [[1.0] * 3]

    def test_bfloat16_gives_approximately_the_same_scores(self, model):
        images = torch.rand(1, 3, 64, 64)
        with torch.autocast("cpu", torch.bfloat16):
            ((_, scores, _),) = yolov3_tiny.detect(model, images, 0.0)
        ((_, expected, _),) = yolov3_tiny.detect(model, images, 0.0)
        assert scores.dtype == torch.float32
        assert len(scores) == len(expected) == (2 * 2 + 4 * 4) * 3 * 80
        assert 0 < (scores - expected).abs().max() < 0.1

    @pytest.mark.parametrize(("size", "near"), [(400, 384), (0, 32), (33, 32)])
    def test_invalid_sizes_are_rejected(self, model, size, near):
        with pytest.raises(ConfigError, match=f"{size} pixels is not a multiple of 32; {near} is the nearest"):
            yolov3_tiny.letterbox(Image.new("RGB", (50, 40)), size)
        with pytest.raises(ConfigError, match="multiple of 32"):
            yolov3_tiny.detect(model, torch.zeros(1, 3, size, size), 0.5)


SIDES = [(640, 480), (333, 500), (416, 416), (50, 40), (1000, 7), (3, 999), (1, 1)]


class TestLetterbox:
    @pytest.mark.parametrize("sides", SIDES)
    @pytest.mark.parametrize("size", [416, 96])
    def test_round_trip(self, sides, size):
        image, scale, left, top = yolov3_tiny.letterbox(Image.new("RGB", sides, "red"), size)
        assert image.shape == (3, size, size)
        assert image.dtype == torch.float32
        assert scale == pytest.approx(size / max(sides))
        corners = torch.rand(20, 4, dtype=torch.float64) * max(sides)
        shifted = corners * scale + torch.tensor([left, top, left, top])
        torch.testing.assert_close(yolov3_tiny.unletterbox(shifted, scale, left, top), corners)
        red = (image == torch.tensor([1.0, 0, 0]).view(3, 1, 1)).all(0)
        rows, columns = red.any(1).nonzero(), red.any(0).nonzero()
        w, h = int(columns[-1] - columns[0]) + 1, int(rows[-1] - rows[0]) + 1
        assert (left, top) == (int(columns[0]), int(rows[0])) == ((size - w) // 2, (size - h) // 2)
        assert red.sum() == w * h
        assert max(w, h) == size
        assert (image[:, ~red] == 0.5).all()
        # truncated to a whole number, as in darknet, but at least one
        for side, length in zip((w, h), sides, strict=True):
            assert side == max(1, length * size // max(sides))

    @pytest.mark.parametrize("sides", [(300, 200), (217, 300), (90, 160)])
    def test_letterboxed_objects_lie_in_their_boxes(self, sides):
        box = torch.tensor([[20.0, 30.0, 70.0, 80.0]])
        photo = Image.new("RGB", sides)
        photo.paste((255, 255, 255), (20, 30, 70, 80))
        image, scale, left, top = yolov3_tiny.letterbox(photo, 416)
        inside = image[0] > 0.75  # brighter than the gray border
        rows, columns = inside.any(1).nonzero(), inside.any(0).nonzero()
        corners = torch.tensor([[columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]]).float()
        assert (
            yolov3_tiny.unletterbox(corners, scale, left, top) - box
        ).abs().max() < 0.25 + 1 / scale  # blurred edges, whole pixels

    def test_both_sides_have_the_same_scale(self):
        ramp = np.repeat(np.arange(50, dtype=np.uint8)[:, None, None] * 5, 1000, 1).repeat(3, 2)
        image, scale, _, top = yolov3_tiny.letterbox(Image.fromarray(ramp), 416)  # 20.8 rows, truncated to 20
        centers = (torch.arange(1, 19) + 0.5) / scale - 0.5  # the corresponding rows of the photo
        torch.testing.assert_close(image[0, top + 1 : top + 19, 200] * 255, centers * 5, rtol=0, atol=1.0)

    def test_no_resize_changes_nothing(self):
        pixels = np.random.default_rng(0).integers(0, 256, (64, 40, 3), dtype=np.uint8)
        image, scale, left, top = yolov3_tiny.letterbox(Image.fromarray(pixels), 64)
        assert (scale, left, top) == (1.0, 12, 0)
        assert torch.equal(image[:, :, 12:52], photos.to_tensor(Image.fromarray(pixels)))


class TestFetch:
    @pytest.fixture
    def pinned(self, monkeypatch, tmp_path):
        """Replace the real file by a small one; return its content, a function that sets its URL, and its path."""
        content = bytes(range(256)) * 40
        monkeypatch.setenv("CVLAB_DATA", str(tmp_path / "data"))
        monkeypatch.delenv("CVLAB_OFFLINE")

        def set_url(url):
            sha256 = hashlib.sha256(content).hexdigest()
            pinned_file = weights.PinnedFile(f"{url}/yolov3-tiny.weights", len(content), sha256)
            monkeypatch.setitem(weights.PINNED_FILES, "yolov3_tiny", pinned_file)

        set_url("https://localhost:1")
        return content, set_url, tmp_path / "data" / "weights" / "yolov3-tiny.weights"

    def test_downloads_the_published_file(self, pinned):
        content, set_url, target = pinned
        with server(lambda handler: send(handler, content)) as (url, requests):
            set_url(url)
            assert weights.fetch("yolov3_tiny") == target == weights.find_pinned("yolov3_tiny")
            assert weights.fetch("yolov3_tiny") == target
            assert len(requests) == 1
        assert target.read_bytes() == content

    def test_rejects_another_file(self, pinned, tmp_path):
        content, set_url, target = pinned
        damaged = content[:-1] + b"!"
        with server(lambda handler: send(handler, damaged)) as (url, _):
            set_url(url)
            with pytest.raises(DataError, match="sha256"):
                weights.fetch("yolov3_tiny")
        assert not target.exists()
        (tmp_path / "local.weights").write_bytes(damaged)
        with pytest.raises(DataError, match=r"local.weights: differs from the published file"):
            weights.fetch("yolov3_tiny", tmp_path / "local.weights")
        assert not target.exists()
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(damaged)
        with pytest.raises(DataError, match="remove it"):
            weights.fetch("yolov3_tiny")
        assert target.read_bytes() == damaged

    def test_installs_a_local_file(self, pinned, tmp_path, cvlab):
        content, _, target = pinned
        (tmp_path / "local.weights").write_bytes(content)
        code, out, err = cvlab("models", "fetch", "yolov3_tiny", "--from", tmp_path / "local.weights")
        assert code == 0, err
        assert str(target) in out
        assert target.read_bytes() == content

    def test_offline(self, monkeypatch, tmp_path, cvlab):
        monkeypatch.setenv("CVLAB_DATA", str(tmp_path))
        code, _, err = cvlab("models", "fetch", "yolov3_tiny")
        assert code == 4
        assert "CVLAB_OFFLINE is set" in err
        assert "--from FILE" in err


def slow_nms(boxes, scores, labels, max_iou=0.45):
    """Keep a box unless one of its class with a higher score overlaps it by more than `max_iou`."""
    selected = []
    for k in scores.argsort(descending=True).tolist():
        if all(labels[k] != labels[i] or overlap(boxes[k].tolist(), boxes[i].tolist()) <= max_iou for i in selected):
            selected.append(k)
    return selected


def overlap(a, b):
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    intersection = max(w, 0) * max(h, 0)
    return intersection / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection)


@pytest.fixture(scope="module")
def real():
    path = Path(REAL_DATA or "/nowhere") / "weights" / "yolov3-tiny.weights"
    if not path.is_file() or not (path.parent.parent / "imagenet_samples" / "labels.csv").is_file():
        pytest.skip("CVLAB_DATA has no weights/yolov3-tiny.weights, or no imagenet_samples")
    return yolov3_tiny.build(str(path))


@pytest.mark.realdata
class TestRealWeights:
    def detect(self, model, name, floor=0.4):
        folder = Path(REAL_DATA) / "imagenet_samples"
        with (folder / "labels.csv").open() as file:
            files = [row["file"] for row in csv.DictReader(file) if row["name"] == name]
        image, scale, left, top = yolov3_tiny.letterbox(photos.load(folder / files[0]))
        ((boxes, scores, labels),) = yolov3_tiny.detect(model, image[None], floor)
        selected = slow_nms(boxes, scores, labels)
        boxes_xyxy = yolov3_tiny.unletterbox(boxes[selected], scale, left, top).tolist()
        return [(COCO_CLASSES[labels[k]], box_xyxy) for k, box_xyxy in zip(selected, boxes_xyxy, strict=True)]

    @pytest.mark.parametrize(
        ("photo", "expected", "box"),
        [  # boxes drawn by hand around the visible objects
            ("school bus", "bus", (34, 106, 470, 293)),
            ("golden retriever", "dog", (46, 122, 236, 402)),
            ("Border collie", "dog", (40, 155, 333, 500)),
            ("Border collie", "car", (0, 12, 236, 126)),
        ],
    )
    def test_detections_in_photos(self, real, photo, expected, box):
        boxes_xyxy = [box_xyxy for name, box_xyxy in self.detect(real, photo) if name == expected]
        assert len(boxes_xyxy) == 1
        assert overlap(boxes_xyxy[0], box) > 0.7

    def test_classes_equal_those_of_darknet(self, real):
        names = (Path(REAL_DATA) / "weights" / "coco.names").read_text().split("\n")
        assert tuple(names[:80]) == COCO_CLASSES

    def test_the_file_is_the_published_one(self, real):
        pinned_file = weights.PINNED_FILES["yolov3_tiny"]
        download.verify(Path(REAL_DATA) / "weights" / "yolov3-tiny.weights", pinned_file.sha256)
