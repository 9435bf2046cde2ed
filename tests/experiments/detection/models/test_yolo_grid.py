"""The one-stage detector of the course: decoding and losses against slow references, perfect outputs."""

import math

import pytest
import torch
from PIL import Image

from cvlab.data.scenes import generator
from cvlab.experiments.detection.data import writers
from cvlab.experiments.detection.models import yolo_grid
from cvlab.experiments.detection.models.base import collate_targets
from cvlab.experiments.detection.models.yolo_grid import YoloGrid, YoloGridOutputs
from cvlab.ops.anchors import COURSE_SHAPES
from tests.conftest import weights_digest

A = len(COURSE_SHAPES)
BOXES = torch.tensor([[20.0, 12, 90, 88], [130, 100, 200, 160], [60, 150, 92, 210]])  # in an image of 224 pixels
LABELS = torch.tensor([2, 0, 1])


def make_model(faithful=True, classes=3, seed=0):
    torch.manual_seed(seed)
    return YoloGrid([5], classes, width=8, faithful=faithful).eval()


def raw_outputs(model, n, h, w, seed=0):
    torch.manual_seed(seed)
    return model([torch.randn(n, 5, h, w) * 3])


def slow_anchor(index, h, w):
    """Return the center and the sides of the anchor with a flat index, in cells."""
    anchor, row, column = index // (h * w), index // w % h, index % w
    return column + 0.5, row + 0.5, *COURSE_SHAPES[anchor]


def slow_box(offsets, index, h, w):
    x, y, width, height = slow_anchor(index, h, w)
    x, y = x + offsets[0], y + offsets[1]
    width, height = width * math.exp(offsets[2]), height * math.exp(offsets[3])
    return [x - width / 2, y - height / 2, x + width / 2, y + height / 2]


def slow_iou(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    intersection = max(width, 0) * max(height, 0)
    return intersection / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection)


def slow_anchor_index(box, h, w):
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    cell = min((abs(c + 0.5 - x) + abs(r + 0.5 - y), r * w + c) for r in range(h) for c in range(w))[1]
    overlaps = [slow_iou(slow_box([0, 0, 0, 0], a * h * w + cell, h, w), box) for a in range(A)]
    return overlaps.index(max(overlaps)) * h * w + cell


def slow_losses(outputs, targets, negatives, faithful):
    """Return the losses, computed object by object; `negatives` are the sampled pairs of image and anchor."""
    h, w = outputs.class_logits.shape[2:]
    confidence, offset_losses, class_losses = [], [], []
    for n in range(len(targets)):
        entropies = []
        for box_xyxy, label in zip(targets.boxes_xyxy[n].tolist(), targets.labels[n].tolist(), strict=True):
            if label < 0:
                continue
            box = [v / 32 for v in box_xyxy]
            index = slow_anchor_index(box, h, w)
            offsets = outputs.offsets[n, index].tolist()
            target = 1.0 if faithful else slow_iou(slow_box(offsets, index, h, w), box)
            confidence.append((outputs.confidence[n, index].item() - target) ** 2)
            x, y, width, height = slow_anchor(index, h, w)
            expected = [(box[0] + box[2]) / 2 - x, (box[1] + box[3]) / 2 - y]
            expected += [math.log((box[2] - box[0]) / width), math.log((box[3] - box[1]) / height)]
            offset_losses.append(sum((p - q) ** 2 for p, q in zip(offsets, expected, strict=True)))
            logits = outputs.class_logits[n, :, index // w % h, index % w].tolist()
            entropies.append(math.log(sum(math.exp(v) for v in logits)) - logits[label])
        if entropies:
            class_losses.append(sum(entropies) / len(entropies))
    confidence += [outputs.confidence[n, index].item() ** 2 for n, index in negatives]
    return [sum(part) / len(part) for part in (confidence, offset_losses, class_losses)]


class TestHead:
    @pytest.mark.parametrize(("n", "h", "w"), [(1, 7, 7), (2, 2, 3)])
    def test_shapes(self, n, h, w):
        outputs = raw_outputs(make_model(), n, h, w)
        assert outputs.confidence.shape == (n, A * h * w)
        assert outputs.offsets.shape == (n, A * h * w, 4)
        assert outputs.class_logits.shape == (n, 3, h, w)
        assert outputs.offsets[..., :2].abs().max() < 0.5
        assert bool((outputs.confidence > 0).all())

    def test_order_of_the_channels(self):
        model = make_model()
        x = torch.randn(2, 5, 2, 3)
        raw, outputs = model.head(x), model([x])
        for anchor, row, column in ((0, 0, 0), (4, 1, 2), (8, 0, 1)):
            index = (anchor * 2 + row) * 3 + column
            torch.testing.assert_close(outputs.confidence[1, index], raw[1, anchor, row, column].sigmoid())
            raw_offsets = raw[1, A + 4 * anchor : A + 4 * anchor + 4, row, column]
            torch.testing.assert_close(
                outputs.offsets[1, index], torch.cat([raw_offsets[:2].sigmoid() - 0.5, raw_offsets[2:]])
            )
        torch.testing.assert_close(outputs.class_logits, raw[:, 5 * A :])

    def test_anchor_shapes_are_a_buffer_outside_of_the_state_dict(self):
        model = make_model()
        assert "shapes" not in model.state_dict()
        assert model.double().shapes.dtype == torch.float64

    def test_decode_equals_the_loop_and_does_not_overflow(self):
        model = make_model()
        outputs = raw_outputs(model, 2, 2, 3)
        decoded = yolo_grid.boxes.cxcywh_to_xyxy(yolo_grid.decode(outputs.offsets, model.anchors(outputs)))
        expected = [[slow_box(outputs.offsets[n, p].tolist(), p, 2, 3) for p in range(A * 6)] for n in range(2)]
        torch.testing.assert_close(decoded, torch.tensor(expected), rtol=1e-4, atol=1e-5)
        huge = yolo_grid.decode(torch.full((1, 4), 1e4), torch.ones(1, 4))
        assert bool(torch.isfinite(huge).all())


class TestLosses:
    def targets(self):
        boxes_xyxy = torch.tensor([[5.0, 5, 40, 60]])
        return collate_targets(
            [BOXES, boxes_xyxy, torch.zeros(0, 4)], [LABELS, torch.tensor([1]), torch.zeros(0).long()]
        )

    @pytest.mark.parametrize("faithful", [True, False])
    def test_losses_match_the_loop(self, faithful):
        model, targets = make_model(faithful), self.targets()
        outputs = raw_outputs(model, 3, 7, 7)
        positives, is_negative = model.match_anchors(outputs, targets)
        torch.manual_seed(5)
        negatives = is_negative.nonzero()[torch.randperm(int(is_negative.sum()))[: len(positives.labels)]].tolist()
        torch.manual_seed(5)
        losses = model.losses(outputs, targets, 224)
        expected = slow_losses(outputs, targets, negatives, faithful)
        names = ("confidence_loss", "offset_loss", "class_loss")
        assert [losses[name].item() for name in names] == pytest.approx(expected, rel=1e-4)
        assert losses["loss"].item() == pytest.approx(sum(expected), rel=1e-4)

    def test_negatives(self):
        model, targets = make_model(), self.targets()
        outputs = raw_outputs(model, 3, 7, 7)
        positives, is_negative = model.match_anchors(outputs, targets)
        assert positives.image.tolist() == [0, 0, 0, 1]
        assert positives.labels.tolist() == [2, 0, 1, 1]
        assert bool(is_negative[2].all()), "all anchors of an image without objects are negative"
        boxes = [(box / 32).tolist() for box in BOXES]
        positive_anchors = {slow_anchor_index(box, 7, 7) for box in boxes}
        for index in range(A * 49):
            overlaps = [slow_iou(slow_box([0, 0, 0, 0], index, 7, 7), box) for box in boxes]
            assert bool(is_negative[0, index]) == (max(overlaps) < 0.2 and index not in positive_anchors)

    def test_the_positive_anchor_of_a_thin_box_is_not_negative(self):
        model = make_model()
        outputs = raw_outputs(model, 1, 7, 7)
        positives, is_negative = model.match_anchors(
            outputs, collate_targets([torch.tensor([[40.0, 40, 43, 60]])], [torch.tensor([0])])
        )
        assert len(positives.anchor) == 1
        assert not bool(is_negative[0, positives.anchor])

    def test_negatives_are_sampled_without_replacement_from_the_global_generator(self):
        torch.manual_seed(1)
        first = yolo_grid.sample_indices(50, 40)
        torch.manual_seed(1)
        assert torch.equal(first, yolo_grid.sample_indices(50, 40))
        assert not torch.equal(first, yolo_grid.sample_indices(50, 40))
        assert len(first.unique()) == 40
        assert len(yolo_grid.sample_indices(3, 9)) == 3

    @pytest.mark.parametrize("faithful", [True, False])
    def test_every_weight_has_a_gradient(self, faithful):
        model = make_model(faithful)
        model.losses(raw_outputs(model, 3, 7, 7), self.targets(), 224)["loss"].backward()
        for parameter in model.parameters():
            assert bool(torch.isfinite(parameter.grad).all())
            assert parameter.grad.abs().sum() > 0

    def test_losses_without_objects(self):
        model = make_model()
        losses = model.losses(
            raw_outputs(model, 2, 7, 7), collate_targets([torch.zeros(0, 4)] * 2, [torch.zeros(0).long()] * 2), 224
        )
        losses["loss"].backward()
        assert losses["loss"].item() == 0
        assert all(bool(torch.isfinite(parameter.grad).all()) for parameter in model.parameters())

    def test_two_objects_with_the_same_anchor(self):
        model = make_model()
        outputs = raw_outputs(model, 1, 7, 7)
        targets = collate_targets([BOXES[:1].repeat(2, 1)], [torch.tensor([0, 1])])
        losses = model.losses(outputs, targets, 224)
        assert bool(torch.isfinite(losses["loss"]))
        class_losses = [
            model.losses(outputs, collate_targets([BOXES[:1]], [torch.tensor([k])]), 224)["class_loss"] for k in (0, 1)
        ]
        torch.testing.assert_close(losses["class_loss"], (class_losses[0] + class_losses[1]) / 2)


class TestDetections:
    def perfect(self, model):
        """Return the outputs that encode the ground truth."""
        indices = [slow_anchor_index((box / 32).tolist(), 7, 7) for box in BOXES]
        outputs = YoloGridOutputs(torch.zeros(1, A * 49), torch.zeros(1, A * 49, 4), torch.zeros(1, 3, 7, 7))
        anchors = model.anchors(outputs)[indices]
        outputs.offsets[0, indices] = yolo_grid.encode(BOXES / 32, anchors)
        outputs.confidence[0, indices] = torch.tensor([0.7, 0.9, 0.8])
        for index, label in zip(indices, LABELS.tolist(), strict=True):
            outputs.class_logits[0, label, index // 7 % 7, index % 7] = 12.0
        return outputs

    @pytest.mark.parametrize("faithful", [True, False])
    def test_perfect_outputs_give_the_ground_truth(self, faithful):
        model = make_model(faithful)
        (result,) = model.postprocess(self.perfect(model), 224, 0.5, 0.5, 10)
        order = [1, 2, 0]  # by confidence
        torch.testing.assert_close(result.boxes_xyxy, BOXES[order])
        assert result.labels.tolist() == LABELS[order].tolist()
        torch.testing.assert_close(result.scores, torch.tensor([0.9, 0.8, 0.7]), atol=1e-4, rtol=0)

    def test_only_the_confidence_loss_of_perfect_outputs_is_large(self):
        model = make_model()
        targets = collate_targets([BOXES], [LABELS])
        losses = model.losses(self.perfect(model), targets, 224)
        assert losses["offset_loss"].item() < 1e-9
        assert losses["class_loss"].item() < 1e-4
        assert losses["confidence_loss"].item() == pytest.approx((0.09 + 0.01 + 0.04) / 6, rel=1e-5)
        improved = make_model(faithful=False)
        assert improved.losses(self.perfect(improved), targets, 224)["confidence_loss"].item() == pytest.approx(
            losses["confidence_loss"].item(), rel=1e-4
        ), "the IoU of a perfect box is 1"

    def test_the_score(self):
        """If faithful, the score is the confidence; otherwise it is multiplied by the probability of the class."""
        outputs = self.perfect(make_model())
        flat = outputs._replace(class_logits=torch.zeros_like(outputs.class_logits))
        (plain,) = make_model().postprocess(flat, 224, 0.1, 0.5, 10)
        (product,) = make_model(faithful=False).postprocess(flat, 224, 0.1, 0.5, 10)
        torch.testing.assert_close(product.scores, plain.scores / 3)
        assert len(make_model(faithful=False).postprocess(flat, 224, 0.5, 0.5, 10)[0].scores) == 0

    def test_detections_are_sorted_clipped_and_without_duplicates(self):
        model = make_model()
        for result in model.postprocess(raw_outputs(model, 2, 7, 7), 224, 0.2, 0.4, 30):
            assert 0 < len(result.scores) <= 30
            assert result.scores.tolist() == sorted(result.scores.tolist(), reverse=True)
            assert result.boxes_xyxy.min() >= 0
            assert result.boxes_xyxy.max() <= 224
            detections = list(zip(result.boxes_xyxy.tolist(), result.labels.tolist(), strict=True))
            for k, (box, label) in enumerate(detections):
                assert all(slow_iou(box, other) <= 0.4 + 1e-5 for other, name in detections[:k] if name == label)

    def test_no_score_above_the_threshold(self):
        model = make_model()
        (result,) = model.postprocess(raw_outputs(model, 1, 2, 2), 64, 1.0, 0.5, 10)
        assert result.boxes_xyxy.shape == (0, 4)
        assert result.labels.dtype == torch.int64


@pytest.fixture
def small_data_set(tmp_path):
    """Write six scenes with boxes in VOC's layout, and return their folder."""
    folder = tmp_path / "few"
    for name in ("Annotations", "JPEGImages"):
        (folder / name).mkdir(parents=True)
    for number in range(6):
        scene = generator.generate_scene(1, number)
        Image.fromarray(scene.image.numpy()).save(folder / "JPEGImages" / f"{number}.png")
        boxes_xyxy = torch.tensor([item.box_xyxy for item in scene.objects]).view(-1, 4)
        names = [item.shape for item in scene.objects]
        text = writers.write_voc_xml(boxes_xyxy, names, (generator.SIZE_PX, generator.SIZE_PX), f"{number}.png")
        (folder / "Annotations" / f"{number}.xml").write_text(text)
    return folder


def test_an_interrupted_run_ends_with_the_same_weights(stopped_and_resumed, small_data_set):
    """Dropout and negatives are sampled randomly in every step."""
    args = ("yolo_overfit", f"data={{name: boxes, path: {small_data_set}}}", "size=64", "batch_size=2")
    args += ("duration={steps: 4}", "expect=[]", "threads=1", "save_seconds=0", "log_every=1", "eval_every=1000")
    uninterrupted, resumed = stopped_and_resumed(*args)
    assert weights_digest(uninterrupted) == weights_digest(resumed)
    assert uninterrupted["run"] != resumed["run"]
