"""Fine-tuning: copied backbone stages, which of their parameters are trained, and when."""

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
ABOUT = DetectorMetadata("yolo_fpn", {"width": 8}, ("a", "b"), 64, is_finetuned=True)


@pytest.fixture(scope="module")
def made():
    return detector_model.build(ABOUT, CPU)


def test_stages_compute_the_backbone_s_feature_maps(made):
    photos = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        everything = [made.all_features.batch(photos)[name] for name in made.all_features.names]
        finest = made.features.batch(photos)
        assert list(finest) == ["blocks.2"]
        mine = made.head.feature_maps(finest["blocks.2"])
        for ours, theirs in zip(mine, everything, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        made.head.eval()
        torch.testing.assert_close(made.head([everything[0]])[1], made.head(everything)[1], rtol=1e-3, atol=1e-2)


def test_only_pointwise_filters_are_trained_and_the_backbone_is_not_shared(made):
    learning = {name for name, p in made.head.stages.named_parameters() if p.requires_grad}
    depthwise = {
        f"{name}.weight" for name, m in made.head.stages.named_modules() if isinstance(m, nn.Conv2d) and m.groups > 1
    }
    assert depthwise
    assert not depthwise & learning
    assert sum(p.numel() for p in made.head.stages.parameters() if p.requires_grad) > 2_000_000
    backbone = set(made.features.model.module.parameters())
    assert not backbone & set(made.head.parameters())


def test_batch_norms_stay_in_evaluation_mode():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), nn.Conv2d(4, 4, 1))
    tuned = FineTunedDetector(nn.BatchNorm2d(4), model, ["0", "1", "2"]).train()
    assert tuned.head.training
    assert not any(m.training for m in tuned.stages.modules())
    with torch.no_grad():
        x = torch.randn(2, 4, 6, 6)
        torch.testing.assert_close(tuned.feature_maps(x)[2], model.eval()[2](model[1](x)))


@pytest.mark.parametrize("names", [["0"], ["0", "1.0"]])
def test_layers_outside_of_one_sequence_are_rejected(names):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 1)))
    with pytest.raises(ConfigError) as error:
        FineTunedDetector(nn.Identity(), model, names)
    assert "finetune_epochs=0" in error.value.hint


class TestTraining:
    WORDS = ("duration={epochs: 2}", "finetune_epochs=1", "model.width=8")

    def test_only_the_last_epochs_change_the_backbone_and_the_file_holds_it(self, cvlab):
        before = detector_model.build(
            DetectorMetadata("yolo_fpn", {"width": 8}, tuple("abcdefghij"), 64, is_finetuned=True), CPU
        )
        untouched = train(cvlab, "duration={epochs: 2}", "finetune_epochs=0", "model.width=8")
        found = train(cvlab, *self.WORDS)
        own = detector_model.load(Path(found["run"]) / "detector.safetensors", CPU)
        change = [
            (mine - theirs.half().float()).abs().max().item()
            for mine, theirs in zip(own.head.stages.parameters(), before.head.stages.parameters(), strict=True)
        ]
        assert max(change) > 0
        assert own.metadata.is_finetuned
        assert found["metrics"]["parameters"] > untouched["metrics"]["parameters"] + 2_000_000
        losses = [
            [json.loads(line).get("train_loss") for line in (Path(f["run"]) / "metrics.jsonl").read_text().splitlines()]
            for f in (untouched, found)
        ]
        first = [next(value for value in values if value is not None) for values in losses]
        assert first[0] == first[1]  # the first epoch is the same with and without

    def test_impossible_fine_tuning_is_rejected(self, cvlab):
        for words, says in (
            (("finetune_epochs=3", "duration={epochs: 2}"), "finetune_epochs: 3 is more than"),
            (("finetune_epochs=1", "duration={seconds: 9}"), "in seconds"),
            (("finetune_epochs=1", "duration={epochs: 2}", "model={name: yolo_grid}"), "one map"),
        ):
            code, _, err = cvlab("train", "yolo_scenes", *words, "--dry-run")
            assert code == 2, err
            assert says in err, err
