"""NanoDet-g: bundled weights, their transfer to the classes of a data set, and distances as distributions."""

import math

import pytest
import torch

from cvlab.experiments.detection.models import dense, detector, nanodet
from cvlab.experiments.detection.models.base import collate_targets
from cvlab.experiments.detection.models.nanodet import NUM_BINS, NanoDet
from cvlab.experiments.detection.models.yolov3_tiny import COCO_CLASSES
from cvlab.models import backbone, names, pretrained
from cvlab.models.features import FeatureExtractor

CHANNELS = (128, 256, 512)


@pytest.fixture(scope="module")
def coco():
    return detector.load(nanodet.BUNDLED_WEIGHTS, torch.device("cpu"))


class TestBackbone:
    def test_maps_of_three_strides(self):
        model = pretrained.build(names.NANODET)
        extractor = FeatureExtractor(model, backbone.feature_layers(model, (8, 16, 32)))
        maps = extractor.batch(torch.rand(2, 3, 96, 64))
        shapes = [tuple(maps[name].shape) for name in extractor.names]
        assert shapes == [(2, 128, 12, 8), (2, 256, 6, 4), (2, 512, 3, 2)]

    def test_the_backbone_has_no_classifier(self):
        assert pretrained.build(names.NANODET).classes == ()


class TestPretrainedHead:
    def test_known_classes_get_the_weights_of_coco(self, coco):
        torch.manual_seed(0)
        head = NanoDet(CHANNELS, 3)
        before = head.class_predictors[1].weight.clone()
        head.load_pretrained(("zebra", "blood cell", "person"))
        weight, published = head.class_predictors[1].weight, coco.head.class_predictors[1].weight
        assert torch.equal(weight[0], published[COCO_CLASSES.index("zebra")])
        assert torch.equal(weight[1], before[1])
        assert torch.equal(weight[2], published[COCO_CLASSES.index("person")])
        assert torch.equal(head.towers[2][0].weight, coco.head.towers[2][0].weight)

    def test_official_names_of_coco_are_known_in_any_case(self, coco):
        head = NanoDet(CHANNELS, 3)
        head.load_pretrained(("Airplane", "couch", "dining table"))
        published = coco.head.class_predictors[0].bias
        indices = [COCO_CLASSES.index(name) for name in ("aeroplane", "sofa", "diningtable")]
        assert torch.equal(head.class_predictors[0].bias, published[indices])

    def test_another_backbone_leaves_the_head_unchanged(self):
        torch.manual_seed(0)
        head = NanoDet((40, 112, 320), 2)
        before = {name: tensor.clone() for name, tensor in head.state_dict().items()}
        head.load_pretrained(("person", "dog"))
        assert all(torch.equal(tensor, before[name]) for name, tensor in head.state_dict().items())


class TestDistances:
    def test_distances_are_the_means_of_the_distributions(self):
        head = NanoDet(CHANNELS, 1)
        outputs = head([torch.randn(1, c, s, s) for c, s in zip(CHANNELS, (4, 2, 1), strict=True)])
        k, edge = 9, 2  # a point of the finest level, and its right edge
        probs = outputs.distance_logits[0, k, edge].softmax(0).tolist()
        mean = sum(p * number for number, p in enumerate(probs))
        x, _, stride = outputs.points[k].tolist()
        assert outputs.boxes_xyxy[0, k, edge].item() == pytest.approx(x + mean * stride, rel=1e-5)

    def test_loss_is_the_cross_entropy_of_the_two_nearest_bins(self):
        torch.manual_seed(1)
        logits, distances = torch.randn(5, 4, NUM_BINS), torch.rand(5, 4) * 12 - 1
        for row in range(5):
            for edge in range(4):
                d = min(max(distances[row, edge].item(), 0.0), NUM_BINS - 1 - dense.MAX_BIN_GAP)
                log_probs = logits[row, edge].log_softmax(0)
                low = math.floor(d)
                expected = -((low + 1 - d) * log_probs[low] + (d - low) * log_probs[low + 1])
                actual = dense.distribution_loss(logits, distances)[row, edge]
                assert actual.item() == pytest.approx(expected.item(), abs=1e-5)


class TestIgnoredBoxes:
    def losses(self, **flags):
        torch.manual_seed(0)
        head = NanoDet(CHANNELS, 2)
        outputs = head([torch.randn(1, c, s, s) for c, s in zip(CHANNELS, (8, 4, 2), strict=True)])
        boxes, labels = torch.tensor([[4.0, 4, 28, 28], [30, 30, 60, 60]]), torch.tensor([0, 1])
        targets = collate_targets([boxes], [labels], [torch.ones(2)], [torch.tensor(flags["ignored"])])
        return outputs, head.losses(outputs, targets, 64)

    def test_points_in_an_ignored_box_have_no_gradient_for_its_class(self):
        outputs, losses = self.losses(ignored=[False, True])
        (gradient,) = torch.autograd.grad(losses["class_loss"], outputs.class_logits)
        x, y = outputs.points[:, 0], outputs.points[:, 1]
        inside = (x > 30) & (x < 60) & (y > 30) & (y < 60)
        assert not gradient[0, inside, 1].any()
        assert bool(gradient[0, inside, 0].all())  # these points are background for the other class
        assert bool(gradient[0, ~inside, 1].all())

    def test_an_ignored_box_is_not_a_target(self):
        outputs, losses = self.losses(ignored=[True, True])
        assert losses["box_loss"].item() == 0
        assert losses["loss"].isfinite()
        assert outputs.class_logits.isfinite().all()
