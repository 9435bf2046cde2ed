"""Tiled inference with an artificial predictor that detects rectangles, and with the bundled detector."""

import io
import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from cvlab.data.scenes import generator
from cvlab.engine import device
from cvlab.experiments.detection import inference, tiling
from cvlab.ops import boxes
from cvlab.ops.average_precision import Detections

INPUT_PX = 64


def paint(size, rectangles):
    """Return a black photo with filled rectangles (box, class), each with a unique color."""
    photo = Image.new("RGB", size)
    for k, (box, label) in enumerate(rectangles):
        photo.paste((k + 1, label, 255), box)
    return photo


def predict_rectangles(images, score_threshold, nms_iou):
    """Return the boxes of the visible parts of rectangles that are at least 4 pixels long in the detector's input.

    The larger the visible part, the higher the score.
    """
    results = []
    for image in images:
        pixels = np.asarray(image)
        scale = INPUT_PX / max(image.size)
        rows = []
        for number in sorted({*pixels[pixels[..., 2] == 255][:, 0].tolist()}):
            mask = (pixels[..., 0] == number) & (pixels[..., 2] == 255)
            y, x = mask.nonzero()
            box = (x.min(), y.min(), x.max() + 1, y.max() + 1)
            if max(box[2] - box[0], box[3] - box[1]) * scale >= 4:
                rows.append((*box, 0.5 + 0.4 * mask.mean(), pixels[y[0], x[0], 1]))
        table = torch.tensor(rows, dtype=torch.float64).view(-1, 6)
        results.append(Detections(table[:, :4].float(), table[:, 4].float(), table[:, 5].long()))
    return results


def detect(photo, tile):
    (result,) = tiling.tiled(predict_rectangles, tile, INPUT_PX, 8)([photo], 0.25, 0.5)
    assert result.scores.tolist() == sorted(result.scores.tolist(), reverse=True)
    return sorted(
        (tuple(round(edge) for edge in box), label)
        for box, label in zip(result.boxes_xyxy.tolist(), result.labels.tolist(), strict=True)
    )


class TestTiles:
    @pytest.mark.parametrize("size", [(640, 480), (65, 64), (1000, 30), (31, 999), (128, 129)])
    def test_tiles_cover_the_photo_and_overlap(self, size):
        tiles = tiling.tiles_of(size, 64)
        covered = np.zeros(size, dtype=bool)
        for left, top, right, bottom in tiles:
            assert 0 <= left < right <= size[0]
            assert 0 <= top < bottom <= size[1]
            assert right - left == min(64, size[0])
            covered[left:right, top:bottom] = True
        assert covered.all()
        for axis in (0, 1):
            starts = sorted({tile[axis] for tile in tiles})
            assert all(b - a <= 64 * (1 - tiling.OVERLAP) + 1 for a, b in itertools.pairwise(starts))

    def test_a_photo_that_fits_into_one_tile_has_none(self):
        assert tiling.tiles_of((64, 40), 64) == []
        assert tiling.tiles_of((1, 1), 64) == []

    def test_automatic_tiles_are_as_large_as_the_input_and_not_too_many(self):
        assert tiling.tile_side("auto", (1000, 800), 320) == 320
        side = tiling.tile_side("auto", (6000, 4000), 320)
        assert len({x for x, *_ in tiling.tiles_of((6000, 4000), side)}) in (8, 9)
        assert tiling.tile_side(100, (6000, 4000), 320) == 100


class TestMerge:
    def test_tiles_detect_objects_that_are_too_small_in_the_whole_photo(self):
        small = [((x, y, x + 12, y + 10), 3) for x in range(20, 600, 90) for y in range(20, 440, 90)]
        photo = paint((640, 480), small)
        assert predict_rectangles([photo], 0.25, 0.5)[0].scores.tolist() == []
        assert detect(photo, 64) == sorted(small)

    @pytest.mark.parametrize("shift", range(0, 64, 5))
    def test_an_object_at_a_seam_has_one_box(self, shift):
        objects = [((100 + shift, 90 + shift, 114 + shift, 101 + shift), 1)]
        assert detect(paint((640, 480), objects), 64) == objects

    @pytest.mark.parametrize("box", [(100, 100, 150, 110), (30, 20, 290, 30), (200, 100, 212, 300), (90, 90, 190, 170)])
    def test_an_object_longer_than_the_overlap_has_one_box(self, box):
        """The object is complete only in the whole photo, where it may be too small; the tiles contain parts of it."""
        assert detect(paint((1200, 900), [(box, 2)]), 64) == [(box, 2)]

    def test_adjacent_objects_remain_separate(self):
        objects = [((100, 100, 112, 160), 1), ((114, 100, 126, 160), 1), ((100, 162, 126, 172), 1)]
        assert detect(paint((640, 480), objects), 64) == sorted(objects)

    def test_overlapping_objects_of_two_classes_remain_separate(self):
        objects = [((100, 100, 140, 140), 1), ((108, 108, 132, 132), 2)]
        assert detect(paint((640, 480), objects), 64) == objects

    def test_a_part_that_is_detected_as_another_class_is_removed(self):
        whole = Detections(torch.tensor([[50.0, 50, 90, 90]]), torch.tensor([0.6]), torch.tensor([0]))
        part = Detections(torch.tensor([[50.0, 50, 64, 64]]), torch.tensor([0.9]), torch.tensor([1]))
        tiles = [(0, 0, 200, 100), (0, 0, 64, 64)]
        assert tiling.merge([whole, part], tiles, (200, 100), 0.5).labels.tolist() == [0]

    def test_a_truncated_object_that_only_one_tile_detects_is_kept(self):
        none = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
        part = Detections(torch.tensor([[50.0, 10, 64, 30]]), torch.tensor([0.9]), torch.tensor([1]))
        tiles = [(0, 0, 112, 64), (0, 0, 64, 64), (48, 0, 112, 64)]
        result = tiling.merge([none, part, none], tiles, (112, 64), 0.5)
        assert result.boxes_xyxy.tolist() == [[50, 10, 64, 30]]

    def test_photos_without_objects(self):
        assert detect(Image.new("RGB", (640, 480)), 64) == []
        assert detect(Image.new("RGB", (1, 1)), 64) == []

    def test_a_photo_that_fits_into_one_tile_is_predicted_once(self):
        sizes = []
        predict = tiling.tiled(
            lambda images, *_: sizes.extend(im.size for im in images) or predict_rectangles(images, 0, 0), 64, 64, 8
        )
        predict([Image.new("RGB", (64, 30)), Image.new("RGB", (100, 30))], 0.25, 0.5)
        assert sizes == [(64, 30), (100, 30), (64, 30), (64, 30)]


def test_the_bundled_detector_on_a_large_canvas_of_small_scenes():
    """In the whole canvas of adjacent scenes, reduced to the detector's input, objects are a fifth as large."""
    side, truth_boxes, truth_labels = generator.SIZE_PX, [], []
    detector = inference.load_detector("yolo", None, device.select_device("cpu", "float32", 1), for_evaluation=True)
    canvas = Image.new("RGB", (5 * side, 2 * side))
    for number, (row, column) in enumerate(itertools.product(range(2), range(5))):
        scene = generator.generate_scene(5, number)
        canvas.paste(Image.open(io.BytesIO(scene.png())), (column * side, row * side))
        for item in scene.objects:
            shift = (column * side, row * side) * 2
            truth_boxes.append([edge + offset for edge, offset in zip(item.box_xyxy, shift, strict=True)])
            truth_labels.append(detector.classes.index(item.shape))

    def matches(predict):
        (result,) = predict([canvas], 0.4, 0.5)
        is_match = boxes.iou(result.boxes_xyxy, torch.tensor(truth_boxes)) >= 0.5
        return is_match & (result.labels[:, None] == torch.tensor(truth_labels))

    tiled_matches = matches(tiling.tiled(detector.predict, "auto", detector.size_px, 8))
    assert tiled_matches.any(0).float().mean() >= 0.85
    assert tiled_matches.sum(0).max() == 1  # no object has two boxes
    assert matches(detector.predict).any(0).float().mean() <= 0.1
