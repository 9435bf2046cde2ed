"""Training, evaluating and using detectors: on the built-in scenes, from a file, stopped and resumed, on photos."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from cvlab.data import photos
from cvlab.experiments.detection import inference
from cvlab.experiments.detection.models import registry as detector_registry
from cvlab.experiments.detection.models.base import padded
from cvlab.experiments.detection.models.yolo_fpn import YoloFpn
from tests.conftest import weights_digest

SHORT = (
    *("data.num_train=6", "size=64", "views=2", "batch_size=4", "duration={steps: 4}", "expect=[]", "log_every=1"),
    *("evaluate_test=false", "threads=1"),
)


def train(cvlab, *words, name="yolo_scenes"):
    code, out, err = cvlab("train", name, *SHORT, *words, "--json")
    assert code == 0, err
    return json.loads(out)


def test_padding():
    made = padded([torch.ones(2, 4), torch.zeros(0, 4)], [torch.tensor([1, 0]), torch.tensor([], dtype=torch.int64)])
    assert made.boxes_xyxy.shape == (2, 2, 4)
    assert made.labels.tolist() == [[1, 0], [-1, -1]]
    assert padded([torch.zeros(0, 4)], [torch.tensor([]).long()]).labels.tolist() == [[-1]]


class TestYoloFpn:
    def test_shapes_and_no_object(self):
        torch.manual_seed(0)
        net = YoloFpn([4, 6, 8], 3, width=8)
        maps = [torch.randn(2, c, s, s) for c, s in ((4, 8), (6, 4), (8, 2))]
        scores, boxes_xyxy, points = net(maps)
        assert scores.shape == (2, 84, 3)
        assert boxes_xyxy.shape == (2, 84, 4)
        assert points.shape == (84, 3)
        assert scores.sigmoid().mean().item() < 0.01
        assert bool((boxes_xyxy[..., 2:] > boxes_xyxy[..., :2]).all())
        losses = net.losses(
            (scores, boxes_xyxy, points), padded([torch.zeros(0, 4)] * 2, [torch.zeros(0).long()] * 2), 64
        )
        losses["loss"].backward()
        assert bool(torch.isfinite(losses["loss"]))
        assert losses["box_loss"].item() == 0

    def test_what_is_right_costs_little_and_is_found(self):
        net = YoloFpn([4, 6, 8], 3, width=8)
        maps = [torch.randn(1, c, s, s) for c, s in ((4, 8), (6, 4), (8, 2))]
        _, _, points = net(maps)
        wanted = torch.tensor([[8.0, 8, 40, 40]])
        scores = torch.full((1, 84, 3), -12.0)
        inside = (points[:, :2] > 8).all(1) & (points[:, :2] < 40).all(1)
        scores[0, inside, 2] = 12.0
        perfect = (scores, wanted.expand(1, 84, 4).clone(), points)
        targets = padded([wanted], [torch.tensor([2])])
        losses = net.losses(perfect, targets, 64)
        wrong = net.losses(perfect, padded([wanted], [torch.tensor([1])]), 64)
        assert float(losses["box_loss"]) < 1e-5
        assert float(wrong["class_loss"]) > 5 * float(losses["class_loss"])
        found = net.detections(perfect, 64, 0.5, 0.6, 10)[0]
        assert found.boxes_xyxy.tolist() == wanted.tolist()
        assert found.labels.tolist() == [2]

    def test_a_teacher_s_doubt_is_learned(self):
        net = YoloFpn([4, 6, 8], 3, width=8)
        maps = [torch.randn(1, c, s, s) for c, s in ((4, 8), (6, 4), (8, 2))]
        wanted, label = torch.tensor([[8.0, 8, 40, 40]]), torch.tensor([1])
        doubtful = padded([wanted], [label], [torch.tensor([0.25])])
        assert doubtful.confidence.tolist() == [[0.25]]
        assert padded([wanted], [label]).confidence.tolist() == [[1.0]]
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
        for _ in range(150):
            optimizer.zero_grad()
            net.losses(net(maps), doubtful, 64)["loss"].backward()
            optimizer.step()
        found = net.detections(net(maps), 64, 0.01, 0.6, 10)[0]
        assert int(found.labels[0]) == 1
        assert 0.15 < found.scores[0].item() < 0.35

    def test_it_learns_a_few_pictures(self, cvlab):
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


class TestTraining:
    def test_metrics_and_weights_in_a_file_of_their_own(self, cvlab):
        found = train(cvlab)
        assert {"val_map50", "map50", "map50_95", "ap50/star", "train_loss"} <= found["metrics"].keys()
        made = detector_registry.load(Path(found["run"]) / "detector.safetensors", torch.device("cpu"))
        assert made.about.size_px == 64
        assert len(made.about.classes) == 10
        assert made.about.trained_on == "scenes"
        summary = json.loads((Path(found["run"]) / "summary.json").read_text())
        assert summary["map_rule"] == "voc"
        assert summary["confidence_floor"] == 0.001

    def test_stopped_and_resumed_it_ends_with_the_same_weights(self, stopped_and_resumed):
        whole, again = stopped_and_resumed("yolo_scenes", *SHORT, "save_seconds=0")
        assert weights_digest(whole) == weights_digest(again)
        assert whole["run"] != again["run"]

    def test_eval_draws_curves_and_confusions(self, cvlab):
        found = train(cvlab)
        code, out, err = cvlab("eval", found["run"], "--split", "val", "--json")
        assert code == 0, err
        assert json.loads(out)["metrics"]["val_map50"] == pytest.approx(found["metrics"]["map50"], abs=1e-6)
        for name in ("val_precision_recall.png", "val_confusion.png"):
            assert photos.load(Path(found["run"]) / "plots" / name).width > 300

    def test_views_that_would_not_fit_are_refused_with_the_number_that_does(self, cvlab, monkeypatch):
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
            (("data.num_train=9999",), "has 480 photos"),
            (("model.name=yolo_fpm",), "did you mean 'yolo_fpn'"),
            (("expect=[ap51/star>0]",), "no metric"),
            (("data.name=boxes",), "goes with a path"),
        ],
    )
    def test_refusals(self, cvlab, words, says):
        code, _, err = cvlab("train", "yolo_scenes", *words, "--dry-run")
        assert code == 2, err
        assert says in err, err


class TestDetect:
    def test_a_run_s_detector_on_photos(self, cvlab, tmp_path):
        trained = train(cvlab)
        Image.new("RGB", (90, 40), "green").save("plain.png")
        words = ("plain.png", "sample", "--weights", trained["run"], "--conf", "0")
        code, out, err = cvlab("detect", *words, "--save-json", "--save-txt", "--save-xml", "--json")
        assert code == 0, err
        assert "yolo_fpn" in err, err
        found = json.loads(out)
        row = found["results"][0]
        assert row["width"] == 90
        assert len(row["objects"]) > 0
        thing = row["objects"][0]
        left, top, right, bottom = thing["box_xyxy"]
        assert 0 <= left <= right <= 90
        assert 0 <= top <= bottom <= 40
        assert 0 <= thing["score"] <= 1
        scores = [thing["score"] for thing in row["objects"]]
        assert scores == sorted(scores, reverse=True)
        run = Path(found["run"])
        assert photos.load(run / row["picture"]).size == (90, 40)
        assert len((run / row["txt"]).read_text().splitlines()) == len(row["objects"])
        assert len(json.loads((run / "boxes" / "detections.json").read_text())["images"]) == 2
        assert (run / row["xml"]).read_text().count("<object>") == len(row["objects"])

    def test_what_a_first_stage_proposes_is_drawn(self, cvlab):
        trained = train(cvlab, "model={name: faster_rcnn, width: 8, hidden: 8}")
        words = ("sample", "--model", "faster_rcnn", "--weights", trained["run"], "--explain", "proposals", "--json")
        code, out, err = cvlab("detect", *words)
        assert code == 0, err
        found = json.loads(out)
        sheet = photos.load(Path(found["run"]) / found["results"][0]["explained"])
        assert sheet.width > sheet.height
        assert sheet.getpixel((sheet.width // 2, 5)) == (255, 255, 255)

    def test_only_two_stages_propose(self, cvlab):
        trained = train(cvlab)
        code, _, err = cvlab("detect", "sample", "--weights", trained["run"], "--explain", "proposals")
        assert code == 2
        assert "no first stage" in err
        code, _, err = cvlab("detect", "sample", "--model", "faster_rcnn", "--weights", trained["run"])
        assert code == 2
        assert "is no faster_rcnn" in err

    def test_nothing_found_is_no_error(self, cvlab):
        trained = train(cvlab)
        code, out, _ = cvlab("detect", "sample", "--weights", trained["run"], "--conf", "1", "--json")
        assert code == 0
        assert json.loads(out)["results"][0]["objects"] == []

    def test_without_photos_it_is_judged_by_its_validation_set(self, cvlab):
        trained = train(cvlab)
        code, out, err = cvlab("detect", "--weights", trained["run"], "--json")
        assert code == 0, err
        found = json.loads(out)
        assert found["metrics"]["num_photos"] == 120
        assert "map50" in found["metrics"]
        assert photos.load(Path(found["run"]) / "images" / "sheet.png").width == 4 * 320
        assert (Path(found["run"]) / "plots" / "precision_recall.png").is_file()

    @pytest.mark.parametrize("model", inference.COMING_ALONG)
    def test_what_comes_along_looks_at_photos(self, cvlab, model):
        code, out, err = cvlab("detect", "sample", "--model", model, "--conf", "0.01", "--json")
        assert code == 0, err
        assert model in err.replace("yolo_fpn", "yolo"), err
        assert {thing["label"] for thing in json.loads(out)["results"][0]["objects"]} >= {"person"}

    @pytest.mark.parametrize(
        ("words", "code", "says"),
        [
            (("none.jpg",), 4, "no such file"),
            (("sample", "--weights", "none.safetensors"), 4, "no such file"),
            (("sample", "--weights", "text.safetensors"), 4, "not a detector that can be read"),
            (("sample", "--weights", "other.safetensors"), 4, "does not say what it is"),
            (("sample", "--weights", "folder"), 4, "this run has no detector.safetensors"),
            (("sample", "--conf", "2"), 2, "conf"),
            (("sample", "--model", "yolo9"), 2, "model"),
        ],
    )
    def test_refusals(self, cvlab, words, code, says):
        from safetensors.torch import save_file

        Path("text.safetensors").write_text("nothing of the kind")
        save_file({"a": torch.zeros(1)}, "other.safetensors")
        Path("folder").mkdir()
        got, _, err = cvlab("detect", *words)
        assert got == code, err
        assert says in err, err
        assert "Traceback" not in err, err
