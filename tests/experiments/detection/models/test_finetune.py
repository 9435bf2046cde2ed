"""Fine-tuning: copied backbone stages, their trained parameters, and the epochs in which they are trained."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from cvlab.errors import ConfigError
from cvlab.experiments.detection.models import detector as detector_model
from cvlab.experiments.detection.models.detector import DetectorMetadata
from cvlab.experiments.detection.models.finetune import FineTunedDetector
from tests.experiments.detection.short_run import train

CPU = torch.device("cpu")
METADATA = DetectorMetadata("yolo_fpn", {"width": 8}, ("a", "b"), 64, is_finetuned=True)


@pytest.fixture(scope="module")
def detector():
    return detector_model.build(METADATA, CPU)


def test_stages_compute_the_feature_maps_of_the_backbone(detector):
    photos = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        all_maps = [detector.all_features.batch(photos)[name] for name in detector.all_features.names]
        finest = detector.features.batch(photos)
        assert list(finest) == ["blocks.2"]
        maps = detector.head.feature_maps(finest["blocks.2"])
        for actual, expected in zip(maps, all_maps, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        detector.head.eval()
        torch.testing.assert_close(detector.head([all_maps[0]])[1], detector.head(all_maps)[1], rtol=1e-3, atol=1e-2)


def test_only_pointwise_filters_are_trained_and_the_backbone_is_not_shared(detector):
    trainable = {name for name, p in detector.head.stages.named_parameters() if p.requires_grad}
    depthwise = {
        f"{name}.weight"
        for name, m in detector.head.stages.named_modules()
        if isinstance(m, nn.Conv2d) and m.groups > 1
    }
    assert depthwise
    assert not depthwise & trainable
    assert sum(p.numel() for p in detector.head.stages.parameters() if p.requires_grad) > 2_000_000
    backbone = set(detector.features.model.module.parameters())
    assert not backbone & set(detector.head.parameters())


def test_batch_norms_stay_in_evaluation_mode():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), nn.Conv2d(4, 4, 1))
    tuned = FineTunedDetector(nn.BatchNorm2d(4), model, ["0", "1", "2"]).train()
    assert tuned.head.training
    assert not any(m.training for m in tuned.stages.modules())
    with torch.no_grad():
        x = torch.randn(2, 4, 6, 6)
        torch.testing.assert_close(tuned.feature_maps(x)[2], model.eval()[2](model[1](x)))


@pytest.mark.parametrize("names", [["0"], ["0", "1.0"]])
def test_layers_outside_a_single_sequence_are_rejected(names):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 1)))
    with pytest.raises(ConfigError) as error:
        FineTunedDetector(nn.Identity(), model, names)
    assert "finetune_epochs=0" in error.value.hint


class TestTraining:
    ARGS = ("duration={epochs: 2}", "finetune_epochs=1", "model.width=8")

    def test_only_the_last_epochs_change_the_backbone_and_the_file_contains_it(self, cvlab):
        before = detector_model.build(
            DetectorMetadata("yolo_fpn", {"width": 8}, tuple("abcdefghij"), 64, is_finetuned=True), CPU
        )
        frozen = train(cvlab, "duration={epochs: 2}", "finetune_epochs=0", "model.width=8")
        finetuned = train(cvlab, *self.ARGS)
        loaded = detector_model.load(Path(finetuned["run"]) / "detector.safetensors", CPU)
        change = [
            (trained - initial.half().float()).abs().max().item()
            for trained, initial in zip(loaded.head.stages.parameters(), before.head.stages.parameters(), strict=True)
        ]
        assert max(change) > 0
        assert loaded.metadata.is_finetuned
        assert finetuned["metrics"]["parameters"] > frozen["metrics"]["parameters"] + 2_000_000
        losses = [
            [
                json.loads(line).get("train_loss")
                for line in (Path(result["run"]) / "metrics.jsonl").read_text().splitlines()
            ]
            for result in (frozen, finetuned)
        ]
        first = [next(value for value in values if value is not None) for values in losses]
        assert first[0] == first[1]  # the first epoch is identical with and without fine-tuning

    def test_impossible_fine_tuning_is_rejected(self, cvlab):
        for args, message in (
            (("finetune_epochs=3", "duration={epochs: 2}"), "finetune_epochs: 3 is more than"),
            (("finetune_epochs=1", "duration={seconds: 9}"), "in seconds"),
            (("finetune_epochs=1", "duration={epochs: 2}", "model={name: yolo_grid}"), "one map"),
        ):
            code, _, err = cvlab("train", "yolo_scenes", *args, "--dry-run")
            assert code == 2, err
            assert message in err, err
