"""Diagrams: positive anchors and sampled negatives, annotations next to a photo, and the drawings."""

import pytest
import torch
from PIL import Image, ImageChops

from cvlab.errors import DataError
from cvlab.experiments.detection import diagrams
from cvlab.experiments.detection.data import writers
from cvlab.ops import anchors, boxes

CAR = torch.tensor([[156.0, 97, 351, 270]])
SIZE = (500, 333)


def gray_photo(size=SIZE):
    return Image.new("RGB", size, (120, 120, 120))


def test_worked_example():
    (match,) = diagrams.match_anchors(SIZE, CAR)
    assert (match.anchor, match.row, match.column, match.index) == (2, 3, 3, 122)
    assert match.iou == pytest.approx(0.7454, abs=1e-4)
    assert match.description == "[2,3,3] 3x3 IoU 0.75"


def test_sampled_negatives_are_distinct_and_overlap_no_box():
    ground_truth = torch.tensor([[10.0, 20, 200, 300], [300, 10, 360, 60], [250, 200, 490, 330]])
    indices = diagrams.sample_negatives(SIZE, ground_truth)
    assert len(indices) == len(set(indices)) == 3
    assert indices == diagrams.sample_negatives(SIZE, ground_truth)
    centers, shapes = anchors.grid_centers(7, 7), torch.tensor(anchors.COURSE_SHAPES)
    all_anchors = anchors.generate_anchors(centers, shapes).flatten(0, 2)
    in_pixels = all_anchors[indices] * torch.tensor([500 / 7, 333 / 7] * 2)
    assert boxes.iou(in_pixels, ground_truth).max() < 0.2


@pytest.mark.parametrize("size", [(500, 333), (40, 90), (1200, 30), (1, 1)])
@pytest.mark.parametrize("kind", diagrams.KINDS)
def test_photos_of_any_size(kind, size):
    box = torch.tensor([[0.0, 0, size[0] * 0.6, size[1] * 0.5]])
    sheet = diagrams.draw(kind, gray_photo(size), box, ["thing"])
    assert sheet.mode == "RGB"
    assert max(sheet.size) >= 700
    assert sheet.width / sheet.height == pytest.approx(size[0] / size[1], rel=0.05)


def test_grid_lines_are_drawn_between_the_cells():
    sheet = diagrams.draw("grid", gray_photo((700, 700)))
    row = [sheet.getpixel((x, 25)) for x in range(700)]
    light = [x for x, pixel in enumerate(row) if min(pixel) > 200]
    assert light
    assert all(min(abs(x - 100 * k) for k in range(1, 7)) <= 2 for x in light)
    assert min(sheet.getpixel((350, 350))) > 200, "the center of the middle cell is marked"


def test_all_kinds_differ_and_the_photo_is_not_modified():
    photo = gray_photo()
    sheets = [diagrams.draw(kind, photo, CAR, ["car"]) for kind in diagrams.KINDS]
    for k in range(3):
        assert ImageChops.difference(sheets[k], sheets[k - 1]).getbbox() is not None
    assert photo.getcolors() == gray_photo().getcolors()


def test_targets_fill_the_positive_cell():
    sheet = diagrams.draw("targets", gray_photo((700, 700)), torch.tensor([[210.0, 310, 295, 395]]))
    inside, outside = sheet.getpixel((220, 330)), sheet.getpixel((120, 330))
    assert outside == (120, 120, 120)
    assert inside[0] > inside[2] + 40


@pytest.mark.parametrize("boxes_xyxy", [None, torch.empty(0, 4)])
def test_targets_without_boxes(boxes_xyxy):
    targets = diagrams.draw("targets", gray_photo(), boxes_xyxy)
    assert ImageChops.difference(targets, diagrams.draw("grid", gray_photo())).getbbox() is not None
    assert len(targets.getcolors(100_000)) > 1
    assert diagrams.sample_negatives(SIZE, torch.empty(0, 4)) == []


class TestAnnotated:
    def write(self, folder, names=("car",), boxes_xyxy=CAR):
        folder.mkdir(exist_ok=True)
        text = writers.write_voc_xml(boxes_xyxy, list(names), SIZE, "one.png")
        (folder / "one.xml").write_text(text)

    @pytest.mark.parametrize("folder", ["JPEGImages", "Annotations"])
    def test_annotation_next_to_the_photo_or_in_the_layout_of_voc(self, tmp_path, folder):
        (tmp_path / "JPEGImages").mkdir()
        photo = tmp_path / "JPEGImages" / "one.png"
        gray_photo().save(photo)
        assert diagrams.read_annotation(photo) is None
        self.write(tmp_path / folder)
        boxes_xyxy, names = diagrams.read_annotation(photo)
        assert boxes_xyxy.tolist() == CAR.tolist()
        assert names == ("car",)

    def test_annotation_without_objects_and_invalid_annotation(self, tmp_path):
        photo = tmp_path / "one.png"
        gray_photo().save(photo)
        self.write(tmp_path, (), torch.empty(0, 4))
        boxes_xyxy, names = diagrams.read_annotation(photo)
        assert boxes_xyxy.shape == (0, 4)
        assert names == ()
        (tmp_path / "one.xml").write_text("<annotation>")
        with pytest.raises(DataError, match="not valid XML"):
            diagrams.read_annotation(photo)


def test_proposals_before_and_after_nms_are_drawn_side_by_side():
    before = torch.tensor([[5.0, 5, 60, 60], [40, 40, 90, 90]]).repeat(200, 1)
    sheet = diagrams.draw_proposals(gray_photo((100, 100)), before, before[:1])
    assert sheet.size == (1406, 700)
    left, right = sheet.crop((0, 60, 700, 700)), sheet.crop((706, 60, 1406, 700))
    assert left.getpixel((629, 400)) != right.getpixel((629, 400))  # the right edge of the second box
