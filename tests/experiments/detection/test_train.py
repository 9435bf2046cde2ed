"""Training a detector: metrics, the weights file, resuming, evaluation, rejected configurations."""

import json
from pathlib import Path

import pytest
import torch

from cvlab.data import photos
from cvlab.experiments.detection.models import detector as detector_model
from cvlab.experiments.detection.models.yolo_fpn import YoloFpn
from tests.conftest import weights_digest
from tests.experiments.detection.short_run import SHORT, train


class TestTraining:
    def test_metrics_and_weights_file(self, cvlab):
        report = train(cvlab)
        assert {"val_map50", "map50", "map50_95", "ap50/star", "train_loss"} <= report["metrics"].keys()
        detector = detector_model.load(Path(report["run"]) / "detector.safetensors", torch.device("cpu"))
        assert detector.metadata.size_px == 64
        assert len(detector.metadata.classes) == 10
        assert detector.metadata.trained_on == "scenes"
        summary = json.loads((Path(report["run"]) / "summary.json").read_text())
        assert summary["map_rule"] == "voc"
        assert summary["score_threshold"] == 0.001

    def test_the_gradient_is_the_mean_over_the_parts_of_a_batch(self, cvlab, monkeypatch):
        sizes = []

        def losses(head, outputs, targets, size_px):
            sizes.append(len(targets))
            return original(head, outputs, targets, size_px)

        original = YoloFpn.losses
        monkeypatch.setattr(YoloFpn, "losses", losses)
        report = train(cvlab, "accumulate=2")
        assert sizes == [2] * 8  # 4 steps of 2 x 2 images
        assert report["metrics"]["train_loss"] > 0
        code, _, err = cvlab("train", "yolo_scenes", *SHORT, "data.num_train=1", "views=2", "accumulate=4")
        assert code == 2
        assert "2 images per process have no 4 equal parts" in err

    def test_an_interrupted_run_ends_with_the_same_weights(self, stopped_and_resumed):
        uninterrupted, resumed = stopped_and_resumed("yolo_scenes", *SHORT, "save_seconds=0")
        assert weights_digest(uninterrupted) == weights_digest(resumed)
        assert uninterrupted["run"] != resumed["run"]

    @pytest.mark.usefixtures("drawn_plots")
    def test_eval_draws_curves_and_confusion_matrices(self, cvlab):
        report = train(cvlab)
        code, out, err = cvlab("eval", report["run"], "--split", "val", "--json")
        assert code == 0, err
        assert json.loads(out)["metrics"]["val_map50"] == pytest.approx(report["metrics"]["map50"], abs=1e-6)
        for name in ("val_precision_recall.png", "val_confusion.png"):
            assert photos.load(Path(report["run"]) / "plots" / name).width > 300

    def test_too_many_views_are_rejected_with_the_number_that_fits(self, cvlab, monkeypatch):
        from cvlab.engine import memory

        monkeypatch.setattr(memory, "free_bytes", lambda device: 60_000_000)
        code, _, err = cvlab("train", "yolo_scenes", "data.num_train=40", "size=224", "views=400")
        assert code == 2
        assert "views=" in err
        assert "fits" in err

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (("data.name=cifar10",), "photos with boxes are needed"),
            (("data.num_train=9999",), "has 40 photos"),
            (("model.name=yolo_fpm",), "did you mean 'yolo_fpn'"),
            (("expect=[ap51/star>0]",), "no metric"),
            (("data.name=boxes",), "requires a path"),
            (("data.path=photos",), "set path=null"),
            (("batch_size=4", "accumulate=3"), "3 does not divide batch_size: 4"),
        ],
    )
    def test_errors(self, cvlab, args, message):
        code, _, err = cvlab("train", "yolo_scenes", *args, "--dry-run")
        assert code == 2, err
        assert message in err, err

    def test_overfits_a_few_images(self, cvlab):
        args = (
            "duration={steps: 150}",
            "views=1",
            "size=96",
            "data.num_train=4",
            "augment.zoom=1",
            "augment.aspect=1",
        )
        report = train(cvlab, *args, "augment.flip=false", "eval_every=1000", "log_every=10")
        rows = [json.loads(line) for line in (Path(report["run"]) / "metrics.jsonl").read_text().splitlines()]
        losses = [row["train_loss"] for row in rows if "train_loss" in row]
        assert losses[-1] < 0.4 * losses[0]


def write_photos(folder, splits, with_boxes=lambda split, k: True):
    """Write a YOLO data set of gray photos, each with a labeled white square."""
    from PIL import Image

    for split, count in splits.items():
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
        for k in range(count):
            image = Image.new("RGB", (64, 64), (60 + k, 60, 60))
            image.paste("white", (16, 16, 48, 48))
            image.save(folder / "images" / split / f"{k}.png")
            label = "0 0.5 0.5 0.5 0.5\n" if with_boxes(split, k) else ""
            (folder / "labels" / split / f"{k}.txt").write_text(label)
    (folder / "data.yaml").write_text("names: [square]\n" + "".join(f"{split}: images/{split}\n" for split in splits))
    return folder


def train_on_photos(cvlab, folder, *args):
    arguments = (*SHORT, "data={name: boxes, path: " + str(folder) + "}", "expect=[]", "batch_size=2", *args)
    return cvlab("train", "yolo_scenes", *arguments, "--json")


class TestUserData:
    def test_without_a_test_split_val_is_evaluated_and_a_warning_is_logged(self, cvlab, tmp_path):
        folder = write_photos(tmp_path / "own", {"train": 6, "val": 2})
        code, out, err = train_on_photos(cvlab, folder, "evaluate_test=true")
        assert code == 0, err
        assert "boxes has no test split; val is evaluated at the end" in err
        assert "map50" in json.loads(out)["metrics"]
        run = Path(json.loads(out)["run"])
        assert json.loads((run / "summary.json").read_text())["evaluated_split"] == "val"
        code, out, _ = train_on_photos(cvlab, folder, "evaluate_test=true", "--dry-run")
        assert json.loads(out)["evaluated_split"] == "val"

    def test_a_damaged_test_photo_is_found_before_the_first_step(self, cvlab, tmp_path):
        folder = write_photos(tmp_path / "own", {"train": 4, "val": 2, "test": 3})
        path = folder / "images" / "test" / "2.png"
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        code, _, err = train_on_photos(cvlab, folder, "evaluate_test=true")
        assert code == 4
        assert "2.png" in err
        assert not list((tmp_path / "runs").glob("*/metrics.jsonl"))

    def test_without_boxes_in_val_the_map_is_undefined(self, cvlab, tmp_path):
        folder = write_photos(tmp_path / "own", {"train": 4, "val": 2}, lambda split, _: split == "train")
        code, out, err = train_on_photos(cvlab, folder)
        assert code == 0, err
        assert "val has no boxes: its mAP is undefined" in err
        metrics = json.loads(out)["metrics"]
        assert not {"map50", "val_map50", "best_val_map50"} & metrics.keys()
        assert metrics["best_step"] == metrics["steps"]
        code, out, err = cvlab("eval", json.loads(out)["run"], "--json")
        assert code == 0, err
        code, _, err = train_on_photos(cvlab, folder, "expect=[map50 > 0]")
        assert code == 3

    @pytest.mark.parametrize("count", [2, 3, 5])
    def test_both_parts_of_an_automatic_split_have_boxes(self, tmp_path, count):
        from cvlab.experiments.detection.data import dataset

        for number in range(6):
            folder = write_photos(
                tmp_path / str(number), {"train": 30}, lambda _, k, number=number: k in range(number, number + count)
            )
            splits = dataset.load("boxes", tmp_path, str(folder), 0.1).splits
            assert len(splits["val"]) == 3
            assert any(sample.has_boxes for sample in splits["val"])
            assert any(sample.has_boxes for sample in splits["train"])

    @pytest.mark.parametrize("change", ["annotation", "photo", "added"])
    def test_the_digest_depends_on_the_data(self, tmp_path, change):
        from cvlab.experiments.detection.data import dataset

        folder = write_photos(tmp_path / "own", {"train": 4, "val": 2})
        before = dataset.load("boxes", tmp_path, str(folder)).digest()
        assert dataset.load("boxes", tmp_path, str(folder)).digest() == before
        if change == "annotation":
            (folder / "labels" / "train" / "0.txt").write_text("0 0.5 0.5 0.4 0.5\n")
        elif change == "photo":
            (folder / "images" / "train" / "0.png").write_bytes((folder / "images" / "train" / "1.png").read_bytes())
        else:
            (folder / "images" / "train" / "9.png").write_bytes((folder / "images" / "train" / "1.png").read_bytes())
            (folder / "labels" / "train" / "9.txt").write_text("0 0.5 0.5 0.4 0.5\n")
        assert dataset.load("boxes", tmp_path, str(folder)).digest() != before
