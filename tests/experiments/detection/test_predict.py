"""`cvlab detect`: on photos, with weights of a run or bundled ones, and on a validation split."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from cvlab.data import photos
from cvlab.experiments.detection import inference
from tests.experiments.detection.short_run import train


class TestDetect:
    def test_photos_with_the_weights_of_a_run(self, cvlab, tmp_path):
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

    def test_proposals_are_drawn(self, cvlab):
        trained = train(cvlab, "model={name: faster_rcnn, width: 8, hidden: 8}")
        words = ("sample", "--model", "faster_rcnn", "--weights", trained["run"], "--explain", "proposals", "--json")
        code, out, err = cvlab("detect", *words)
        assert code == 0, err
        found = json.loads(out)
        sheet = photos.load(Path(found["run"]) / found["results"][0]["explained"])
        assert sheet.width > sheet.height
        assert sheet.getpixel((sheet.width // 2, 5)) == (255, 255, 255)

    def test_a_one_stage_detector_has_no_proposals(self, cvlab):
        trained = train(cvlab)
        code, _, err = cvlab("detect", "sample", "--weights", trained["run"], "--explain", "proposals")
        assert code == 2
        assert "no first stage" in err
        code, _, err = cvlab("detect", "sample", "--model", "faster_rcnn", "--weights", trained["run"])
        assert code == 2
        assert "is no faster_rcnn" in err

    def test_no_detection_is_no_error(self, cvlab):
        trained = train(cvlab)
        code, out, _ = cvlab("detect", "sample", "--weights", trained["run"], "--conf", "1", "--json")
        assert code == 0
        assert json.loads(out)["results"][0]["objects"] == []

    def test_without_photos_it_is_evaluated_on_its_validation_split(self, cvlab):
        trained = train(cvlab)
        code, out, err = cvlab("detect", "--weights", trained["run"], "--json")
        assert code == 0, err
        found = json.loads(out)
        assert found["metrics"]["num_photos"] == 8
        assert "map50" in found["metrics"]
        assert photos.load(Path(found["run"]) / "images" / "sheet.png").width == 4 * 480
        assert (Path(found["run"]) / "plots" / "precision_recall.png").is_file()

    @pytest.mark.parametrize("model", inference.BUNDLED_DETECTORS)
    def test_bundled_weights_detect_objects(self, cvlab, model):
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
    def test_errors(self, cvlab, words, code, says):
        from safetensors.torch import save_file

        Path("text.safetensors").write_text("nothing of the kind")
        save_file({"a": torch.zeros(1)}, "other.safetensors")
        Path("folder").mkdir()
        got, _, err = cvlab("detect", *words)
        assert got == code, err
        assert says in err, err
        assert "Traceback" not in err, err
