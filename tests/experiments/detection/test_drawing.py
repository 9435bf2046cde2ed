"""Boxes on photos, their labels and legend; plots of an evaluation."""

import io
import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from cvlab.experiments.detection import drawing, plots
from cvlab.experiments.detection.drawing import LabeledBox
from cvlab.ops import average_precision
from cvlab.ops.average_precision import Detections, GroundTruth
from cvlab.reports import fonts
from cvlab.reports import plots as report_plots

PHOTO = Image.new("RGB", (640, 480), (90, 90, 90))


@pytest.fixture
def figures(monkeypatch):
    """Return a list that receives the figures."""
    saved_figures = []
    monkeypatch.setattr(report_plots, "to_png", lambda figure: saved_figures.append(figure) or b"")
    return saved_figures


def label_boxes(monkeypatch, boxes, photo=PHOTO):
    """Return the boxes in which labels are drawn, by text."""
    box_by_text = {}
    draw_label = drawing._draw_label
    monkeypatch.setattr(
        drawing,
        "_draw_label",
        lambda pen, item, box, px: box_by_text.update({item.text: box}) or draw_label(pen, item, box, px),
    )
    drawing.draw(photo, boxes)
    return box_by_text


class TestLabels:
    @pytest.mark.parametrize("corner", [(100, 100), (0, 0), (500, 400), (630, 470)])
    def test_labels_of_overlapping_boxes_do_not_cover_each_other(self, monkeypatch, corner):
        x, y = corner
        boxes = [LabeledBox((x + k, y + k, x + 90, y + 60), f"class {k} 0.9{k}", k) for k in range(5)]
        boxes_by_text = label_boxes(monkeypatch, boxes)
        assert len(boxes_by_text) == 5
        assert not any(drawing._overlap(a, b) for a, b in itertools.combinations(boxes_by_text.values(), 2))
        for left, top, right, bottom in boxes_by_text.values():
            assert left >= 0
            assert top >= 0
            assert right <= 640
            assert bottom <= 480

    def test_a_single_label_is_above_its_box(self, monkeypatch):
        (label_box,) = label_boxes(monkeypatch, [LabeledBox((100, 100, 200, 200), "cat 0.90", 0)]).values()
        assert label_box[0] == 100
        assert label_box[3] == 100
        assert label_box[2] - label_box[0] >= fonts.width("cat 0.90", drawing.MIN_TEXT_PX)

    def test_a_photo_with_less_height_than_a_label(self, monkeypatch):
        boxes_by_text = label_boxes(monkeypatch, [LabeledBox((0, 0, 5, 5), "a 1.00", 0)], Image.new("RGB", (40, 6)))
        assert boxes_by_text["a 1.00"][:2] == (0, 0)

    def test_labels_of_small_objects_in_a_large_photo_are_small(self, monkeypatch):
        photo = Image.new("RGB", (3000, 2000))
        (large,) = label_boxes(monkeypatch, [LabeledBox((100, 200, 1100, 1200), "cat", 0)], photo).values()
        boxes = [LabeledBox((100 * k, 200, 100 * k + 80, 260), f"cat {k}", 0) for k in range(5)]
        small = label_boxes(monkeypatch, boxes, photo)["cat 0"]
        assert large[3] - large[1] >= 0.026 * 3000
        assert small[3] - small[1] <= 40

    def test_class_names_of_any_script(self):
        plain = np.asarray(drawing.draw(PHOTO, [LabeledBox((100, 100, 300, 200), "", 0)]))
        accents = np.asarray(drawing.draw(PHOTO, [LabeledBox((100, 100, 300, 200), "Жöé", 0)]))
        assert (plain != accents).any()


def test_the_sheet_has_a_legend_for_the_ground_truth(monkeypatch):
    texts = []
    draw_text = fonts.draw
    monkeypatch.setattr(fonts, "draw", lambda *args: texts.append(args[2]) or draw_text(*args))
    photo = drawing.draw(PHOTO, [], [(50.0, 50.0, 300.0, 300.0)])
    assert photo.getpixel((50, 150)) == (255, 255, 255)
    sheet = drawing.contact_sheet([photo] * 5, "five photos", has_ground_truth=True)
    assert texts[-1] == "five photos"
    assert "ground truth" in texts
    assert any(text.startswith("detection") for text in texts)
    assert sheet.width == 4 * 480
    legend = np.asarray(drawing.legend(600))
    for color in ((255, 255, 255), drawing.color_of(0)):
        assert (legend == color).all(-1).sum() > 20
    texts.clear()
    drawing.contact_sheet([PHOTO], "one")
    assert texts == ["one"]


def evaluation():
    """Return the metrics of two photos with two cats, of which one is detected, and one dog; class `none` is absent."""
    box = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    cat_label, dog_label = torch.tensor([0]), torch.tensor([1])
    detections = [Detections(box, torch.tensor([0.9]), cat_label), Detections(box, torch.tensor([0.8]), dog_label)]
    truths = [
        GroundTruth(torch.cat([box, box + 50]), torch.tensor([0, 0]), torch.zeros(2, dtype=torch.bool)),
        GroundTruth(box, dog_label, torch.zeros(1, dtype=torch.bool)),
    ]
    return average_precision.evaluate(detections, truths, 3, "coco")


@pytest.mark.usefixtures("drawn_plots")
class TestPlots:
    def test_the_mean_curve_is_the_mean_over_classes_with_ground_truth(self):
        metrics = evaluation()
        recalls, precisions = plots.mean_curve(metrics)
        assert precisions[recalls <= 0.5].tolist() == [1.0] * 51
        assert precisions[recalls > 0.5].tolist() == [0.5] * 50
        assert float(precisions.mean()) == pytest.approx(metrics.map50)

    def test_the_mean_curve_is_black_and_has_a_label(self, figures):
        plots.precision_recall_png(evaluation(), ["cat", "dog", "none"], "my-run")
        (figure,) = figures
        lines = figure.axes[0].get_lines()
        assert [line.get_label().partition(":")[0] for line in lines] == ["cat", "dog", "mean over classes"]
        assert lines[-1].get_color() == "black"
        assert "my-run" in figure.axes[0].get_title()

    def test_the_confusion_matrix_has_counts_and_fractions_of_rows(self, figures):
        confusion = torch.tensor([[6, 2, 0], [0, 3, 1], [5, 0, 0]])
        plots.confusion_png(confusion, ["cat", "dog"], "my-run")
        (figure,) = figures
        axes, color_bar = figure.axes
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")
        assert color_bar.get_ylabel() == "fraction of the true class"
        for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
            assert [text.get_text() for text in labels] == ["cat", "dog", "background"]
        assert [text.get_text() for text in axes.texts] == ["6\n0.75", "2\n0.25", "3\n0.75", "1\n0.25", "5\n1.00"]
        assert axes.images[0].get_array().tolist() == [[0.75, 0.25, 0], [0, 0.75, 0.25], [1, 0, 0]]
        assert "my-run" in axes.get_title()
        assert "row background: detections of no object" in axes.get_title()

    def test_no_text_is_cut_off(self, monkeypatch):
        png = plots.confusion_png(torch.ones(4, 4), ["a", "b", "a class with a long name"], "my-run")
        pixels = np.asarray(Image.open(io.BytesIO(png)).convert("L"))
        border = np.concatenate(
            [pixels[:3].ravel(), pixels[-3:].ravel(), pixels[:, :3].ravel(), pixels[:, -3:].ravel()]
        )
        assert (border == 255).all()

    @pytest.mark.parametrize("count", [0, 1, 80])
    def test_any_number_of_classes(self, count):
        png = plots.confusion_png(torch.ones(count + 1, count + 1), [f"class {k}" for k in range(count)], "x")
        assert png.startswith(b"\x89PNG")
