"""Training a detector: metrics, the weights file, resuming, evaluation, rejected configurations."""

import json
from pathlib import Path

import pytest
import torch

from cvlab.data import photos
from cvlab.experiments.detection.models import detector as detector_model
from tests.conftest import weights_digest
from tests.experiments.detection.short_run import SHORT, train


class TestTraining:
    def test_metrics_and_weights_file(self, cvlab):
        found = train(cvlab)
        assert {"val_map50", "map50", "map50_95", "ap50/star", "train_loss"} <= found["metrics"].keys()
        made = detector_model.load(Path(found["run"]) / "detector.safetensors", torch.device("cpu"))
        assert made.metadata.size_px == 64
        assert len(made.metadata.classes) == 10
        assert made.metadata.trained_on == "scenes"
        summary = json.loads((Path(found["run"]) / "summary.json").read_text())
        assert summary["map_rule"] == "voc"
        assert summary["score_threshold"] == 0.001

    def test_an_interrupted_run_ends_with_the_same_weights(self, stopped_and_resumed):
        whole, again = stopped_and_resumed("yolo_scenes", *SHORT, "save_seconds=0")
        assert weights_digest(whole) == weights_digest(again)
        assert whole["run"] != again["run"]

    def test_eval_draws_curves_and_confusion_matrices(self, cvlab):
        found = train(cvlab)
        code, out, err = cvlab("eval", found["run"], "--split", "val", "--json")
        assert code == 0, err
        assert json.loads(out)["metrics"]["val_map50"] == pytest.approx(found["metrics"]["map50"], abs=1e-6)
        for name in ("val_precision_recall.png", "val_confusion.png"):
            assert photos.load(Path(found["run"]) / "plots" / name).width > 300

    def test_too_many_views_are_rejected_with_the_number_that_fits(self, cvlab, monkeypatch):
        from cvlab.engine import memory

        monkeypatch.setattr(memory, "free_bytes", lambda device: 60_000_000)
        code, _, err = cvlab("train", "yolo_scenes", "data.num_train=40", "size=224", "views=400")
        assert code == 2
        assert "views=" in err
        assert "fits" in err

    @pytest.mark.parametrize(
        ("words", "says"),
        [
            (("data.name=cifar10",), "photos with boxes are needed"),
            (("data.num_train=9999",), "has 40 photos"),
            (("model.name=yolo_fpm",), "did you mean 'yolo_fpn'"),
            (("expect=[ap51/star>0]",), "no metric"),
            (("data.name=boxes",), "requires a path"),
        ],
    )
    def test_errors(self, cvlab, words, says):
        code, _, err = cvlab("train", "yolo_scenes", *words, "--dry-run")
        assert code == 2, err
        assert says in err, err

    def test_overfits_a_few_images(self, cvlab):
        words = (
            "duration={steps: 150}",
            "views=1",
            "size=96",
            "data.num_train=4",
            "augment.zoom=1",
            "augment.aspect=1",
        )
        found = train(cvlab, *words, "augment.flip=false", "eval_every=1000", "log_every=10")
        rows = [json.loads(line) for line in (Path(found["run"]) / "metrics.jsonl").read_text().splitlines()]
        losses = [row["train_loss"] for row in rows if "train_loss" in row]
        assert losses[-1] < 0.4 * losses[0]
