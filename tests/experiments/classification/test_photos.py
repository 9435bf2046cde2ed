"""From a folder of photos to a trained classifier, its errors, and its predictions for new photos."""

import csv
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from cvlab.config import loading
from cvlab.data import datasets
from cvlab.experiments.classification.data import scenes10
from tests import photo_sets
from tests.conftest import REAL_DATA, weights_digest

CLASSES = ("circle", "ring", "square")
FAST = ("model.views=2", "duration={steps: 12}", "batch_size=8", "threads=1")


def read_rows(path):
    """Return the rows of a table of predictions."""
    return list(csv.DictReader(io.StringIO(path.read_text())))


def scene_photos(root, count, data_root, first=0):
    """Write photos of three classes of scenes10, with a folder for each class."""
    dataset = datasets.get("scenes10").load(data_root)
    for label, name in enumerate(CLASSES):
        folder = root / name
        folder.mkdir(parents=True)
        indices = (dataset.train_labels == label).nonzero()[first : first + count, 0].tolist()
        for k in indices:
            Image.fromarray(dataset.train_images[k].numpy()).resize((64, 48)).save(folder / f"{k}.png")
    return root


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data_root):
    """Train on photos once, and return the folder that contains `photos` and `runs`."""
    import os

    from cvlab.cli import main

    base = tmp_path_factory.mktemp("trained")
    scene_photos(base / "photos", 10, data_root)
    before, environment = Path.cwd(), dict(os.environ)
    os.chdir(base)
    os.environ |= {"CVLAB_DATA": str(base / "data"), "CVLAB_OFFLINE": "1"}
    try:
        arguments = ["train", "photos", "data.path=photos", "data.test_fraction=0.2", *FAST, "-q"]
        assert main.run_command_line(arguments) == 0
    finally:
        os.chdir(before)
        os.environ.clear()
        os.environ.update(environment)
    return base


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    """Return a copy of the trained run in the runs folder of the test."""
    path = next(trained.glob("runs/2*"))
    copied = Path(shutil.copytree(path, tmp_path / "runs" / path.name))
    monkeypatch.setenv("CVLAB_DATA", str(trained / "data"))
    return copied


def test_the_run_contains_its_predictions_and_plots(run):
    summary = json.loads((run / "summary.json").read_text())
    for split, count in (("val", 6), ("test", 6)):
        rows = read_rows(run / f"predictions-{split}.csv")
        assert len(rows) == count
        assert {row["label"] for row in rows} == set(CLASSES)
        accuracy = sum(row["correct"] == "1" for row in rows) / count
        assert summary["metrics"][f"{split}_accuracy"] == pytest.approx(accuracy)
        document = json.loads((run / f"evaluation-{split}.json").read_text())
        assert sum(map(sum, document["confusion"])) == count
        assert (run / "plots" / f"{split}_confusion.png").is_file()
        assert (run / "plots" / f"{split}_reliability.png").is_file()
    page = (run / "report.html").read_text()
    assert "val_confusion" in page or "confusion" in page
    assert set(summary["class_metrics"]) >= {f"val_recall/{name}" for name in CLASSES}


def test_classify_agrees_with_eval(run, trained, cvlab):
    rows = {row["image"]: row for row in read_rows(run / "predictions-test.csv")}
    paths = [trained / "photos" / name for name in rows]
    code, out, err = cvlab("classify", *paths, "--model", "latest", "--top", 3, "--json")
    assert code == 0, err
    for path, result in zip(paths, json.loads(out)["results"], strict=True):
        row = rows[path.relative_to(trained / "photos").as_posix()]
        assert result["label"] == row["prediction"]
        assert result["score"] == pytest.approx(float(row["probability_1"]), abs=1e-5)


@pytest.mark.parametrize("name", ["latest", "photos", "path"])
def test_a_run_can_be_given_by_name_path_or_latest(run, trained, cvlab, name):
    photo = next((trained / "photos" / "ring").iterdir())
    assert cvlab("classify", photo, "--model", "latest")[0] == 0  # this run becomes `latest`
    name = str(run) if name == "path" else name
    code, out, err = cvlab("classify", photo, "--model", name, "--json")
    assert code == 0, err
    assert json.loads(out)["results"][0]["label"] in CLASSES


def test_commands_on_photos_accept_a_run(run, trained, cvlab):
    photo = next((trained / "photos" / "circle").iterdir())
    for arguments in (
        ("saliency", photo),
        ("saliency", photo, "--method", "gradcam"),
        ("attack", photo, "--target", "Ring"),
        ("classvis", "--target", "ring", "--steps", "2"),
    ):
        code, _, err = cvlab(*arguments, "--model", run.name)
        assert code in (0, 3), err
        assert "ImageNet" not in err
    code, out, err = cvlab("dream", photo, "--octaves", "1", "--steps", "1", "--model", run.name, "--json")
    assert code == 0, err
    assert json.loads(out)["results"][0]["layer"] == "trunk.blocks.4"
    code, _, err = cvlab("dream", photo, "--layer", "blocks.4", "--model", run.name)
    assert code == 2
    assert "unknown layer 'blocks.4'; did you mean 'trunk.blocks.4'?" in err


def test_eval_repeats_the_metrics_and_export_succeeds(run, cvlab):
    summary = json.loads((run / "summary.json").read_text())
    code, out, err = cvlab("eval", "latest", "--json")
    assert code == 0, err
    metrics = json.loads(out)["metrics"]
    assert metrics == pytest.approx({name: (summary["metrics"] | summary["class_metrics"])[name] for name in metrics})
    assert "val_recall/ring" in metrics
    code, out, _ = cvlab("eval", "latest")
    headers = [number for number, line in enumerate(out.splitlines()) if line.startswith("class ")]
    assert len(headers) == 2
    assert out.splitlines()[headers[0]].split() == ["class", "precision", "recall", "f1"]
    assert {line.split()[0] for line in out.splitlines()[headers[1] + 2 :] if line} == set(CLASSES)
    code, out, err = cvlab("export", "latest", "--to", "safetensors", "--json")
    assert code == 0, err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--model", "nosuch"), "unknown model"),
        (("--model", "latest", "--weights", "w.pth"), "its own weights"),
        (("--model", "./nosuch"), "no run"),
    ],
)
def test_an_invalid_model_gives_a_one_line_error(run, trained, cvlab, arguments, text):
    photo = next((trained / "photos" / "circle").iterdir())
    code, _, err = cvlab("classify", photo, *arguments)
    assert code == 2
    assert text in err
    assert len(err.strip().splitlines()) == 1


def test_a_run_without_a_classifier_gives_a_one_line_error(run, trained, cvlab):
    photo = next((trained / "photos" / "circle").iterdir())
    assert cvlab("classify", photo)[0] == 0
    other = next(path for path in run.parent.glob("2*") if "classify_photos" in path.name)
    code, _, err = cvlab("classify", photo, "--model", other.name)
    assert code == 2
    assert "no classifier" in err
    code, _, err = cvlab("classify", photo, "--model", "latest", "--target", "x")
    assert code == 2


@pytest.mark.parametrize(
    ("config", "hint"),
    [
        ("yolo_scenes", "`cvlab saliency --model 20260101-000000-other-abcd --box 1` explains a box"),
        ("caption_scenes", "`cvlab caption --weights 20260101-000000-other-abcd` uses it"),
    ],
)
def test_the_error_for_a_detector_or_captioner_suggests_the_right_command(tmp_path, cvlab, config, hint):
    path = tmp_path / "runs" / "20260101-000000-other-abcd"
    path.mkdir(parents=True)
    (path / "config.yaml").write_text((loading.shipped_folder() / f"{config}.yaml").read_text())
    for verb in ("classify", "saliency"):
        code, _, err = cvlab(verb, "sample", "--model", path)
        assert code == 2
        assert hint in err
        assert len(err.strip().splitlines()) == 1


def test_an_unknown_class_gives_a_one_line_error(run, trained, cvlab):
    photo = next((trained / "photos" / "circle").iterdir())
    code, _, err = cvlab("attack", photo, "--target", "rign", "--model", "latest")
    assert code == 2
    assert "did you mean 'ring'?" in err


@pytest.mark.parametrize(
    "change",
    [
        {"classes": ["a"]},
        {"mean": [0.5, 0.5]},
        {"std": [0.0, 1.0, 1.0]},
        {"transform": {"size_px": 10**9, "resize_px": 10**9}},
        {"transform": {"size_px": "x"}},
        {"transform": None},
        {"classes": [1, 2, 3]},
    ],
)
def test_a_modified_classifier_file_gives_a_one_line_error(run, trained, cvlab, change):
    path = run / "classifier.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    code, _, err = cvlab("classify", next((trained / "photos" / "circle").iterdir()), "--model", "latest")
    assert code == 5
    assert "classifier.json" in err
    assert len(err.strip().splitlines()) == 1


def test_expectations_on_class_metrics(trained, cvlab, monkeypatch):
    monkeypatch.setenv("CVLAB_DATA", str(trained / "data"))
    rules = "expect=['val_recall/ring >= 0', 'val_f1/circle <= 1']"
    code, out, err = cvlab("train", "photos", f"data.path={trained / 'photos'}", *FAST, rules, "--json")
    assert code == 0, err
    assert [verdict["met"] for verdict in json.loads(out)["expect"]] == [True, True]
    code, _, err = cvlab("train", "photos", f"data.path={trained / 'photos'}", *FAST, "expect=['val_recal/ring > 0']")
    assert code == 2
    assert "val_recall" in err


def test_an_interrupted_run_ends_with_the_same_weights(stopped_and_resumed, tmp_path, data_root):
    scene_photos(tmp_path / "photos", 6, data_root)
    arguments = ("photos", "data.path=photos", "duration={epochs: 3}", "model.finetune_epochs=2", "batch_size=8")
    uninterrupted, resumed = stopped_and_resumed(
        *arguments, "model.views=2", "model.trainable_stages=1", "save_seconds=0"
    )
    assert weights_digest(uninterrupted) == weights_digest(resumed)
    assert uninterrupted["metrics"]["val_loss"] == resumed["metrics"]["val_loss"]


@pytest.mark.parametrize("change", ["changed", "removed", "added"])
def test_changed_photos_are_named(tmp_path, data_root, cvlab, monkeypatch, change):
    from cvlab.engine import trainer
    from cvlab.errors import StoppedError

    scene_photos(tmp_path / "photos", 5, data_root)
    between_steps = trainer.Trainer._between_steps

    def stop(session, step, save_due):
        between_steps(session, step, save_due)
        raise StoppedError("stopped for a test", "", 130)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_between_steps", stop)
        assert cvlab("train", "photos", "data.path=photos", *FAST, "log_every=1", "save_seconds=0")[0] == 130
    photo = sorted((tmp_path / "photos" / "circle").iterdir())[1]
    if change == "added":
        photo = photo.with_name("new.png")
    if change == "removed":
        photo.unlink()
    else:
        Image.new("RGB", (30, 30), "red").save(photo)
    code, _, err = cvlab("resume", "latest")
    assert code == 7
    assert photo.name in err
    assert change in err
    assert cvlab("resume", "latest", "--allow-changes")[0] in (0, 5)


def test_a_network_trained_from_scratch_on_photos(tmp_path, data_root, cvlab):
    scene_photos(tmp_path / "photos", 6, data_root)
    model = "model={name: deep_convnet, filters: [4], pools: [0]}"
    options = ("data.image_px=24", model, "augment={flip: true}", "duration={steps: 3}", "batch_size=8", "tta=flip")
    code, out, err = cvlab("train", "photos", "data.path=photos", *options, "--json")
    assert code == 0, err
    photo = next((tmp_path / "photos" / "ring").iterdir())
    code, out, err = cvlab("classify", photo, "--model", "latest", "--top", 3, "--json")
    assert code == 0, err
    assert torch.tensor([row["score"] for row in json.loads(out)["results"][0]["top"]]).sum() == pytest.approx(1)


def test_a_classifier_of_generated_images_classifies_photos(cvlab, tmp_path, data_root):
    overrides = ("data.num_train=200", "data.val_fraction=0.02", "duration={steps: 3}", "precision=auto")
    code, out, err = cvlab("train", "quickstart", *overrides, "expect=[]", "--json")
    assert code == 0, err
    run = Path(json.loads(out)["run"])
    dataset = scenes10.load(data_root)
    paths = []
    for k in range(10):
        Image.fromarray(dataset.test_images[k].numpy()).save(tmp_path / f"{k}.png")
        paths.append(tmp_path / f"{k}.png")
    code, out, err = cvlab("classify", *paths, "--model", "latest", "--json")
    assert code == 0, err
    rows = (read_rows(run / "predictions-test.csv"))[:10]
    for row, result in zip(rows, json.loads(out)["results"], strict=True):
        assert result["label"] == row["prediction"]
        assert result["score"] == pytest.approx(float(row["probability_1"]), abs=1e-5)


def test_evaluation_on_another_folder(run, trained, cvlab, tmp_path):
    rows = {row["image"]: row for row in read_rows(run / "predictions-test.csv")}
    for image in rows:
        (tmp_path / "more" / image).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(trained / "photos" / image, tmp_path / "more" / image)
    code, out, err = cvlab("eval", "latest", "--data", "folder:more", "--json")
    assert code == 0, err
    metrics = json.loads(out)["metrics"]
    run_metrics = json.loads((run / "summary.json").read_text())["metrics"]
    assert metrics["test_accuracy"] == pytest.approx(run_metrics["test_accuracy"])
    assert metrics["test_loss"] == pytest.approx(run_metrics["test_loss"], abs=1e-5)
    predictions = {row["image"]: row for row in read_rows(run / "predictions-more-test.csv")}
    for image, row in rows.items():
        assert predictions[image]["prediction"] == row["prediction"]
        assert float(predictions[image]["probability_1"]) == pytest.approx(float(row["probability_1"]), abs=1e-5)
    assert (run / "plots" / "more-test_confusion.png").is_file()
    assert json.loads((run / "eval.json").read_text())["data"] == "folder:more"


def test_a_folder_with_splits_and_one_with_a_single_class(run, trained, cvlab, tmp_path):
    for split in ("train", "val"):
        shutil.copytree(trained / "photos", tmp_path / "split" / split)
    code, out, err = cvlab("eval", "latest", "--data", "folder:split", "--json")
    assert code == 0, err
    assert {name.partition("_")[0] for name in json.loads(out)["metrics"]} == {"val"}
    code, out, err = cvlab("eval", "latest", "--data", "folder:split", "--split", "train", "--json")
    assert code == 0, err
    assert "train_accuracy" in json.loads(out)["metrics"]
    shutil.copytree(trained / "photos" / "ring", tmp_path / "single" / "ring")
    code, out, err = cvlab("eval", "latest", "--data", "folder:single", "--json")
    assert code == 0, err
    rows = read_rows(run / "predictions-single-test.csv")
    expected = sum(row["correct"] == "1" for row in rows) / len(rows)
    assert json.loads(out)["metrics"]["test_accuracy"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("data", "code", "text"),
    [
        ("folder:odd", 2, "knows no class 'rings'; did you mean 'ring'?"),
        ("folder:gone", 4, "gone: no such folder"),
        ("folder:", 2, "give --data folder:PATH"),
        ("cifar11", 2, "did you mean 'cifar10'?"),
        ("fruit", 2, "images with a class each are needed here"),
        ("scenes10", 2, "knows no class"),
    ],
)
def test_incompatible_data_gives_a_one_line_error(run, trained, cvlab, tmp_path, data, code, text):
    shutil.copytree(trained / "photos" / "ring", tmp_path / "odd" / "rings")
    actual, _, err = cvlab("eval", "latest", "--data", data)
    assert actual == code, err
    assert text in err
    assert len([line for line in err.splitlines() if line.startswith("error")]) == 1
    assert not list(run.glob("predictions-odd*"))


@pytest.mark.slow
@pytest.mark.realdata
def test_real_fruit(tmp_path, cvlab, monkeypatch):
    if not (Path(REAL_DATA or "/nowhere") / "VOC" / "fruit").is_dir():
        pytest.skip("CVLAB_DATA has no VOC/fruit")
    photo_sets.fruit(Path(REAL_DATA), tmp_path / "fruit")
    code, out, err = cvlab("train", "photos", "data.path=fruit", "--json")
    assert code == 0, err
    assert json.loads(out)["metrics"]["test_accuracy"] >= 0.97
