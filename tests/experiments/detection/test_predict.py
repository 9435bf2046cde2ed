"""`cvlab detect`: on photos, with weights of a run or bundled weights, and on a validation split."""

import csv
import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from cvlab.data import photos
from cvlab.data.scenes.render import SHAPES
from cvlab.errors import DataError
from cvlab.experiments.detection import evaluation, inference
from cvlab.experiments.detection.data import augment
from cvlab.experiments.detection.data.dataset import DetectionSample
from cvlab.experiments.detection.models import yolov3_tiny
from cvlab.experiments.detection.models.yolov3_tiny import COCO_CLASSES
from cvlab.ops.average_precision import Detections
from cvlab.runs.results import PhotoResult
from cvlab.runs.run_dir import RunDir
from tests.experiments.detection.short_run import train


class TestDetect:
    def test_photos_with_the_weights_of_a_run(self, cvlab, tmp_path):
        run_result = train(cvlab)
        Image.new("RGB", (90, 40), "green").save("plain.png")
        args = ("plain.png", "sample", "--weights", run_result["run"], "--conf", "0")
        code, out, err = cvlab("detect", *args, "--save-json", "--save-txt", "--save-xml", "--json")
        assert code == 0, err
        assert "yolo_fpn" in err, err
        report = json.loads(out)
        row = report["results"][0]
        assert row["width"] == 90
        assert len(row["objects"]) > 0
        item = row["objects"][0]
        left, top, right, bottom = item["box_xyxy"]
        assert 0 <= left <= right <= 90
        assert 0 <= top <= bottom <= 40
        assert 0 <= item["score"] <= 1
        scores = [item["score"] for item in row["objects"]]
        assert scores == sorted(scores, reverse=True)
        run = Path(report["run"])
        assert photos.load(run / row["picture"]).size == (90, 40)
        assert len((run / row["txt"]).read_text().splitlines()) == len(row["objects"])
        detections = json.loads((run / "boxes" / "detections.json").read_text())
        assert len(detections) == sum(len(report["objects"]) for report in report["results"])
        assert [record["score"] for record in detections[: len(scores)]] == [round(score, 6) for score in scores]
        assert (run / "boxes" / "classes.txt").read_text().split() == sorted({*SHAPES}, key=list(SHAPES).index)
        assert (run / row["xml"]).read_text().count("<object>") == len(row["objects"])

    def test_proposals_are_drawn(self, cvlab):
        run_result = train(cvlab, "model={name: faster_rcnn, width: 8, hidden: 8}")
        args = ("sample", "--model", "faster_rcnn", "--weights", run_result["run"], "--explain", "proposals", "--json")
        code, out, err = cvlab("detect", *args)
        assert code == 0, err
        result = json.loads(out)
        sheet = photos.load(Path(result["run"]) / result["results"][0]["explained"])
        assert sheet.width > sheet.height
        assert sheet.getpixel((sheet.width // 2, 5)) == (255, 255, 255)

    def test_a_one_stage_detector_has_no_proposals(self, cvlab):
        run_result = train(cvlab)
        code, _, err = cvlab("detect", "sample", "--weights", run_result["run"], "--explain", "proposals")
        assert code == 2
        assert "no first stage" in err
        code, _, err = cvlab("detect", "sample", "--model", "faster_rcnn", "--weights", run_result["run"])
        assert code == 2
        assert "is no faster_rcnn" in err

    def test_no_detection_is_not_an_error(self, cvlab):
        run_result = train(cvlab)
        code, out, _ = cvlab("detect", "sample", "--weights", run_result["run"], "--conf", "1", "--json")
        assert code == 0
        assert json.loads(out)["results"][0]["objects"] == []

    def test_without_photos_the_validation_split_is_evaluated(self, cvlab):
        run_result = train(cvlab)
        code, out, err = cvlab("detect", "--weights", run_result["run"], "--json")
        assert code == 0, err
        result = json.loads(out)
        assert result["metrics"]["num_photos"] == 8
        assert "map50" in result["metrics"]
        assert photos.load(Path(result["run"]) / "images" / "sheet.png").width == 4 * 480
        assert (Path(result["run"]) / "plots" / "precision_recall.png").is_file()

    @pytest.mark.parametrize("model", inference.BUNDLED_DETECTORS)
    def test_bundled_weights_detect_objects(self, cvlab, model):
        code, out, err = cvlab("detect", "sample", "--model", model, "--conf", "0.01", "--json")
        assert code == 0, err
        assert f"({inference.BUNDLED_DETECTORS[model].photos}, bundled weights)" in err
        assert {item["label"] for item in json.loads(out)["results"][0]["objects"]} >= {"person"}

    @pytest.mark.parametrize(
        ("args", "code", "message"),
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
    def test_errors(self, cvlab, args, code, message):
        from safetensors.torch import save_file

        Path("text.safetensors").write_text("not a weights file")
        save_file({"a": torch.zeros(1)}, "other.safetensors")
        Path("folder").mkdir()
        actual, _, err = cvlab("detect", *args)
        assert actual == code, err
        assert message in err, err
        assert "Traceback" not in err, err


class TestClasses:
    def test_only_the_given_classes_are_detected(self, cvlab):
        run_result = train(cvlab)
        args = ("sample", "--weights", run_result["run"], "--conf", "0", "--json")
        unfiltered = json.loads(cvlab("detect", *args)[1])
        code, out, err = cvlab("detect", *args, "--class", "circle, star")
        assert code == 0, err
        result = json.loads(out)
        expected = [item for item in unfiltered["results"][0]["objects"] if item["label"] in ("circle", "star")]
        assert result["results"][0]["objects"] == expected
        assert set(result["class_counts"]) <= {"circle", "star"}

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (("--class", "circle,stra"), "unknown class 'stra'; did you mean 'star'?"),
            (("--class", "circle,"), "--class circle,: an empty name"),
            (("--class", ""), "an empty name"),
        ],
    )
    def test_an_unknown_class_is_rejected_before_a_photo_is_read(self, cvlab, monkeypatch, args, message):
        run_result = train(cvlab)
        monkeypatch.setattr(photos, "load", lambda path: pytest.fail("a photo was read"))
        code, _, err = cvlab("detect", "sample", "--weights", run_result["run"], *args)
        assert code == 2
        assert message in err
        assert "Traceback" not in err

    def test_filters_and_tiles_require_photos(self, cvlab):
        for args in (("--class", "circle"), ("--tile", "auto")):
            code, _, err = cvlab("detect", *args)
            assert code == 2
            assert "is for photos and videos" in err

    def test_the_counts_are_in_the_last_line_and_in_the_summary(self, cvlab, monkeypatch):
        def predict(images, *_):
            labels = [0, 1, 1] if images[0].width == 90 else [1]
            return [
                Detections(torch.ones(len(labels), 4), torch.ones(len(labels)), torch.tensor(labels)) for _ in images
            ]

        loaded = inference.LoadedDetector("an artificial detector", ("cat", "dog"), 0, 64, predict)
        monkeypatch.setattr(inference, "load_detector", lambda *_, **__: loaded)
        for name, width in (("a.png", 90), ("b.png", 90), ("c.png", 30)):
            Image.new("RGB", (width, 40)).save(name)
        code, out, _ = cvlab("detect", "a.png", "b.png", "c.png", "batch_size=1")
        assert code == 0
        assert out.splitlines()[-1] == "7 objects in 3 photos: dog 5, cat 2"
        summary = json.loads(Path("runs/latest/summary.json").read_text())
        assert summary["class_counts"] == {"dog": 5, "cat": 2}
        _, out, _ = cvlab("detect", "c.png")
        assert out.splitlines()[-1] == "1 object in 1 photo: dog 1"


class TestTablesAndCrops:
    BOXES = torch.tensor(
        [[10.2, 5.0, 40.0, 20.0], [0.0, 0.0, 90.0, 40.0], [89.9, 39.9, 90.0, 40.0], [5.0, 5.0, 5.0, 5.0]]
    )

    @pytest.fixture
    def result(self, cvlab, monkeypatch):
        classes = ("person", "../=cmd|'x'", "???")
        labels, scores = torch.tensor([0, 1, 2, 0]), torch.tensor([0.9, 0.8, 0.7, 0.6])
        predict = lambda images, *_: [Detections(self.BOXES, scores, labels) for _ in images]  # noqa: E731
        loaded = inference.LoadedDetector("an artificial detector", classes, 0, 64, predict)
        monkeypatch.setattr(inference, "load_detector", lambda *_, **__: loaded)
        Path("x").mkdir()
        for name in ("a.png", "x/a.png"):
            Image.new("RGB", (90, 40), "green").save(name)
        code, out, err = cvlab("detect", "a.png", "x/a.png", "--save-csv", "--save-crop", "--json")
        assert code == 0, err
        return json.loads(out)

    def test_a_row_for_each_object(self, result):
        text = (Path(result["run"]) / "boxes/detections.csv").read_text()
        rows = list(csv.reader(io.StringIO(text)))
        assert rows[0] == ["image", "class", "score", "x1", "y1", "x2", "y2"]
        assert rows[1] == ["a.png", "person", "0.9", "10.2", "5.0", "40.0", "20.0"]
        assert len(rows) == 9
        assert {row[0] for row in rows[1:]} == {"a.png", "x/a.png"}
        assert not any(cell.startswith("=") for row in rows for cell in row)

    def test_crops_are_saved_in_a_folder_for_each_class(self, result):
        run = Path(result["run"])
        crops = [item["crop"] for row in result["results"] for item in row["objects"]]
        assert crops[0] == "crops/person/a-1.jpg"
        assert len({*crops}) == 8
        assert sorted(str(path.relative_to(run)) for path in (run / "crops").rglob("*.jpg")) == sorted(crops)
        assert {path.name for path in (run / "crops").iterdir()} == {"person", "cmd_x", "class"}
        assert [photos.load(run / name).size for name in crops[:4]] == [(30, 15), (90, 40), (1, 1), (1, 1)]
        assert photos.load(run / crops[0]).getpixel((5, 5)) == pytest.approx((0, 128, 0), abs=3)


def detector(classes):
    return inference.LoadedDetector("a detector", classes, 0, 64, lambda *_: [])


def result(path, label="dog", count=1):
    objects = [{"label": label, "score": 0.5, "box_xyxy": [1.0, 2.0, 11.0, 22.0]}] * count
    return PhotoResult(str(path), {"objects": objects, "width": 60, "height": 40})


@pytest.mark.parametrize(
    ("names", "image_ids", "file_names"),
    [
        (["000000000139.jpg", "000000000285.jpg"], [139, 285], ["000000000139.jpg", "000000000285.jpg"]),
        (["a.jpg", "7.jpg"], [1, 2], ["a.jpg", "7.jpg"]),
        (["x/a.jpg", "y/a.jpg", "b.jpg"], [1, 2, 3], ["x/a.jpg", "y/a.jpg", "b.jpg"]),
        (["x/7.jpg", "y/7.jpg"], [1, 2], ["x/7.jpg", "y/7.jpg"]),
        (["7.jpg", "007.png"], [1, 2], ["7.jpg", "007.png"]),
    ],
)
def test_results_can_be_evaluated_with_the_tools_of_coco(tmp_path, names, image_ids, file_names):
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    results = [result(tmp_path / name) for name in names]
    inference.save_coco(detector(("cat", "dog")), results, run, ["json", "coco"])
    detections = json.loads((run.path / "boxes/detections.json").read_text())
    assert [record["image_id"] for record in detections] == image_ids
    assert [record["file_name"] for record in detections] == file_names
    assert detections[0] == {
        "image_id": image_ids[0],
        "category_id": 2,
        "bbox": [1, 2, 10, 20],
        "score": 0.5,
        "file_name": file_names[0],
    }
    content = json.loads((run.path / "boxes/dataset.json").read_text())
    assert [image["id"] for image in content["images"]] == image_ids
    assert [image["file_name"] for image in content["images"]] == file_names
    faster_coco_eval = pytest.importorskip("faster_coco_eval")
    coco_gt = faster_coco_eval.COCO(content)
    coco_dt = coco_gt.loadRes(detections)
    coco_eval = faster_coco_eval.COCOeval_faster(coco_gt, coco_dt, "bbox", print_function=lambda *_: None)
    coco_eval.evaluate()
    coco_eval.accumulate()
    coco_eval.summarize()
    assert coco_eval.stats[0] == pytest.approx(1)


def test_category_ids_equal_those_of_coco(tmp_path):
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    results = [result(tmp_path / f"{name}.jpg", name) for name in ("person", "stop sign", "bench", "toothbrush")]
    inference.save_coco(detector(COCO_CLASSES), results, run, ["json"])
    detections = json.loads((run.path / "boxes/detections.json").read_text())
    assert [record["category_id"] for record in detections] == [1, 13, 15, 90]
    assert not (run.path / "boxes/dataset.json").exists()


def test_the_numpy_code_of_the_guide_transforms_photos_and_boxes():
    text = (Path(__file__).parents[3] / "docs/guides/export.md").read_text()
    code = text.partition('```python title="letterbox.py"\n')[2].partition("```")[0]
    namespace = {}
    exec(code, namespace)
    for width, height in ((90, 40), (41, 77), (64, 64), (301, 200), (7, 500)):
        noise = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        photo = Image.fromarray(noise.numpy())
        transform = augment.whole_photo(width, height, 64)
        image, scale, shift = namespace["letterbox"](photo, 64)
        assert torch.equal(torch.from_numpy(image[0]), photos.to_tensor(transform.render(photo)))
        boxes = torch.tensor([[1.0, 2.0, 60.0, 50.0], [10.0, 5.0, 30.0, 60.0]])
        expected = transform.inverse_transform_boxes(boxes)
        torch.testing.assert_close(torch.from_numpy(namespace["to_photo"](boxes.numpy(), scale, shift)), expected)


def test_category_ids_of_both_spellings_of_coco_classes():
    official = {darknet: name for name, darknet in yolov3_tiny.DARKNET_NAMES.items()}
    assert set(official) <= set(COCO_CLASSES)
    names = tuple(official.get(name, name) for name in COCO_CLASSES)
    for classes in (COCO_CLASSES, names):
        ids = dict(zip(classes, inference.category_ids(classes), strict=True))
        assert (ids["person"], ids["stop sign"], ids["couch" if classes is names else "sofa"]) == (1, 13, 63)
        assert ids["toothbrush"] == 90
    assert list(inference.category_ids(("couch", "tv"))) == [1, 2]


def test_the_score_threshold_maximizes_the_f_score():
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30], [40, 40, 50, 50]])
    sample = DetectionSample(Path("x.png"), boxes, torch.zeros(3).long(), torch.zeros(3).bool())
    false_positives = boxes + 100
    scores = torch.tensor([0.72, 0.62, 0.32, 0.52, 0.42, 0.22])  # three right, three wrong detections
    detections = Detections(torch.cat([boxes, false_positives]), scores, torch.zeros(6).long())
    f_scores = {}
    for threshold in evaluation.THRESHOLDS:
        is_above = scores >= threshold
        num_correct, num_detections = int(is_above[:3].sum()), int(is_above.sum())
        precision, recall = num_correct / max(num_detections, 1), num_correct / 3
        f_scores[threshold] = 1.25 * precision * recall / max(0.25 * precision + recall, 1e-9)
    best = max(f_scores, key=lambda threshold: f_scores[threshold])
    assert evaluation.best_score_threshold([detections], [sample]) == best == 0.55
    empty = DetectionSample(Path("x.png"), torch.zeros(0, 4), torch.zeros(0).long(), torch.zeros(0).bool())
    assert evaluation.best_score_threshold([detections], [empty]) is None


def test_the_score_threshold_agrees_with_confusion_matrices():
    generator = torch.Generator().manual_seed(0)

    def random_boxes(count):
        corner = torch.rand(count, 2, generator=generator) * 30
        return torch.cat([corner, corner + 5 + torch.rand(count, 2, generator=generator) * 20], 1)

    detections, samples = [], []
    for _ in range(12):
        boxes, labels = random_boxes(6), torch.randint(3, (6,), generator=generator)
        difficult, crowd = (torch.rand(2, 6, generator=generator) < 0.2).unbind()
        samples.append(DetectionSample(Path("x.png"), boxes, labels, difficult, crowd))
        detected_boxes = torch.cat([boxes + torch.randn(6, 4, generator=generator), random_boxes(10)])
        detected_labels = torch.cat([labels, torch.randint(3, (10,), generator=generator)])
        scores = torch.cat([torch.rand(6, generator=generator), torch.rand(10, generator=generator) * 0.6])
        detections.append(Detections(detected_boxes, scores, detected_labels))
    f_scores = {}
    for threshold in evaluation.THRESHOLDS:
        matrix = evaluation.confusion_matrix(detections, samples, 3, threshold)
        num_boxes, num_detections = matrix[:-1].sum().item(), matrix[:, :-1].sum().item()
        f_scores[threshold] = 1.25 * matrix.diagonal().sum().item() / max(0.25 * num_boxes + num_detections, 1)
    expected = max(f_scores, key=lambda threshold: f_scores[threshold])
    assert 0.05 < expected < 0.9
    assert evaluation.best_score_threshold(detections, samples) == expected


def test_a_detector_of_user_photos_names_the_command_that_evaluates_it(tmp_path):
    loaded = inference.LoadedDetector("d", ("a",), 1, 64, lambda *_: [], trained_on="boxes")
    with pytest.raises(DataError, match="photos of your own") as error:
        evaluation.evaluate_on_validation(loaded, None, 8, 0.5)
    assert "cvlab eval" in error.value.hint


def test_the_official_names_of_coco_select_its_classes(cvlab):
    code, _, err = cvlab("detect", "sample", "--class", "couch,tv", "--dry-run")
    assert code == 0, err
