"""Attacks: the steps, the bounds on the file that is written, and the commands on photos."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cvlab.data import photos
from cvlab.models import pretrained
from cvlab.ops import attacks
from cvlab.ops.resample import EvalTransform


@pytest.fixture
def two(tmp_path):
    """Two small photos cut from the one that comes along, of odd sizes."""
    whole = photos.load(photos.find_images(["sample"])[0])
    whole.crop((100, 40, 400, 300)).save(tmp_path / "wide.png")
    whole.crop((150, 0, 390, 331)).save(tmp_path / "tall.png")
    return [tmp_path / "wide.png", tmp_path / "tall.png"]


def test_steps():
    torch.manual_seed(0)
    x, g = torch.full((3, 5, 5), 0.5), torch.randn(3, 5, 5)
    moved = attacks.l2_step(x, g, 0.1)
    assert (moved - x).norm().item() == pytest.approx(0.1, rel=1e-4)
    assert ((moved - x) * g).sum() < 0
    assert attacks.l2_step(x, torch.zeros_like(g), 0.1).equal(x)
    far = x
    for _ in range(5):
        far = attacks.linf_step(far, g, x, alpha=0.1, eps=0.25)
    torch.testing.assert_close(far, x - 0.25 * g.sign())
    assert attacks.linf_step(x, g, x, 9.0, 9.0).aminmax() == (0, 1)


def test_objective_and_verdict():
    scores, classes = torch.tensor([[1.0, 2.0, 0.0], [5.0, 1.0, 1.0]]), torch.tensor([1, 1])
    assert attacks.attack_loss(scores, classes, targeted=True).tolist() == [-2, -1]
    assert attacks.attack_loss(scores, classes, targeted=False).tolist() == [2, 1]
    assert attacks.attack_succeeded(scores, classes, targeted=True).tolist() == [True, False]
    assert attacks.attack_succeeded(scores, classes, targeted=False).tolist() == [False, True]


def test_distances():
    a, b = torch.zeros(3, 4, 4), torch.zeros(3, 4, 4)
    b[0, 1, 2] = 4 / 255
    found = attacks.distances(a, b)
    assert found["linf_255"] == pytest.approx(4)
    assert found["l2"] == pytest.approx(4 / 255)
    assert found["psnr_db"] == pytest.approx(10 * np.log10(48 * (255 / 4) ** 2))
    assert attacks.distances(a, a)["psnr_db"] == float("inf")


def judged(path, frame=None):
    """Classify a file by the long way, without any of the attack's own code."""
    model = pretrained.build()
    with Image.open(path) as image:
        view = (frame or model.transform)(image.convert("RGB"))
    with torch.inference_mode():
        return model.classes[int(model.module(photos.to_tensor(view)[None]).argmax())]


@pytest.mark.parametrize(
    "options", [[], ["--size", "model"], ["--method", "pgd", "--eps", "4"], ["batch_size=1", "precision=auto"]]
)
def test_the_written_file_is_taken_for_an_ostrich(two, cvlab, tmp_path, options):
    code, out, err = cvlab("attack", "--target", "ostrich", *two, *options, "--json")
    assert code == 0, err
    found = json.loads(out)
    for path, row in zip(two, found["results"], strict=True):
        made = tmp_path / found["run"] / row["attacked"]
        assert row["success"]
        assert row["label"] == "ostrich"
        assert row["target_after"] > row["target_before"]
        is_view = "model" in options
        assert judged(made, EvalTransform(224, 224) if is_view else None) == "ostrich"
        before = photos.load(path)
        before = pretrained.build().transform(before) if is_view else before
        change = np.asarray(photos.load(made), int) - np.asarray(before, int)
        assert np.abs(change).max() == round(row["linf_255"]) > 0
        assert row["l2_photo"] == pytest.approx(np.sqrt((change**2).sum()) / 255, rel=1e-4)
        if "pgd" in options:
            assert row["linf_255"] <= 4.001
        assert (tmp_path / found["run"] / row["panel"]).is_file()


def test_away_from_what_it_sees(two, cvlab):
    code, out, _ = cvlab("attack", two[0], "--json", "--then", "saliency")
    row = json.loads(out)["results"][0]
    assert code == 0
    assert row["label"] != row["before"]["label"]
    assert "target" not in row
    assert "saliency" in row


def test_what_is_the_target_already_is_left_alone(two, cvlab, tmp_path):
    _, out, _ = cvlab("classify", two[0], "--json")
    label = json.loads(out)["results"][0]["label"]
    code, out, _ = cvlab("attack", "--target", label, *two[:1], "--json")
    found = json.loads(out)
    row = found["results"][0]
    assert code == 3
    assert row["already"]
    assert row["steps"] == 0
    assert row["linf_255"] == 0
    assert "success_rate" not in found["metrics"]
    assert found["metrics"]["num_attacked"] == 0


def test_one_bad_photo_and_the_others_go_on(two, cvlab, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"no photo")
    code, out, err = cvlab("classify", two[0], "bad.jpg", "gone.jpg", two[1], "--json")
    found = json.loads(out)
    assert code == 4
    assert not found["ok"]
    assert found["error"]["code"] == 4
    assert ["error" in row for row in found["results"]] == [False, True, True, False]
    assert "2 of 4 photos could not be read" in err
    assert found["metrics"]["num_photos"] == 2
    code, out, err = cvlab("classify", "bad.jpg")
    assert code == 4
    assert "bad.jpg: not a photo" in err.splitlines()[-1]
    code, out, err = cvlab("classify", "gone.jpg")
    assert code == 4
    assert not (tmp_path / "runs" / "latest" / "x").exists()


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["attack", "--target", "ostrch", "sample"], 2, "did you mean 'ostrich'"),
        (["attack", "--target", "crane", "sample"], 2, "134 crane"),
        (["attack", "--target", "ostrich", "sample", "--method", "cw"], 2, "method"),
        (["attack", "sample", "--method", "pgd", "--eps", "0.1"], 2, "eps"),
        (["saliency", "sample", "--class", "xyz"], 2, "no class 'xyz'"),
        (["classify", "--model", "timm:resnet5O", "sample"], 2, "did you mean 'resnet50'"),
        (["classify", "https://example.org/a.jpg"], 4, "not fetched"),
        (["classify", "nothing*.jpg"], 4, "matches no file"),
        (["classify"], 2, "no photo is named"),
        (["classify", "gone.jpg", "gone too.jpg"], 4, "gone.jpg: no such file"),
        (["classvis", "--init", "image"], 2, "init: image starts from exactly one photo, 0 are named"),
        (["attack", "sample", "--eps", "4"], 2, "eps: the method l2 has no such bound"),
        (["classvis", "--target", "tick,tock"], 2, "no class 'tock'"),
        (["classvis", "--target", "tick", "octaves=2", "parametrization=pixels"], 2, "octaves"),
        (["eval", "latest"], 2, "no weights to evaluate"),
    ],
)
def test_refusals_are_one_line_and_leave_nothing(cvlab, tmp_path, words, code, text):
    if words[0] == "eval":
        cvlab("classify", "sample")
    found, _, err = cvlab(*words)
    assert found == code
    assert text in err.splitlines()[-1]
    assert words[0] == "eval" or not (tmp_path / "runs").exists()


@pytest.mark.parametrize("method", ["gradient", "smoothgrad", "integrated_gradients", "gradcam"])
def test_saliency_writes_what_it_says(two, cvlab, tmp_path, method):
    code, out, err = cvlab(
        "saliency", *two, "--method", method, "samples=2", "--class", "9", "--objective", "loss", "--json"
    )
    found = json.loads(out)
    assert code in (0, 3), err
    for row in found["results"]:
        values = np.load(tmp_path / found["run"] / row["values"])
        assert values.shape == (224, 224)
        assert values.min() >= 0
        assert row["label"] == "ostrich"
        for key in ("map", "overlay", "panel"):
            assert photos.load(tmp_path / found["run"] / row[key]).size[0] >= 224
        assert photos.load(tmp_path / found["run"] / row["overlay"]).size == photos.load(Path(row["image"])).size


def test_folders_labels_and_dry_run(two, cvlab, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "wide.png").write_bytes(two[0].read_bytes())
    code, out, _ = cvlab("saliency", tmp_path, tmp_path / "sub", "--json")
    maps = [row["map"] for row in json.loads(out)["results"]]
    assert maps == ["images/tall-map.png", "images/wide-map.png", "images/wide-2-map.png"]
    before = sorted((tmp_path / "runs").iterdir())
    code, out, _ = cvlab("classify", tmp_path, "--dry-run", "--json")
    assert code == 0
    assert json.loads(out)["photos"] == 2
    assert sorted((tmp_path / "runs").iterdir()) == before


def test_a_stopped_run_goes_on_to_the_same_results(two, cvlab, tmp_path, monkeypatch):
    from cvlab.experiments.adversarial import attack

    arguments = ("--target", "ostrich", *two, "batch_size=1", "--method", "pgd", "threads=1")
    _, out, _ = cvlab("attack", *arguments, "--json")
    whole = json.loads(out)
    real = attack.Attack.__call__
    calls = []

    def once(self, batch, check_interrupt):
        calls.append(batch)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, batch, check_interrupt)

    monkeypatch.setattr(attack.Attack, "__call__", once)
    assert cvlab("attack", *arguments)[0] == 130
    monkeypatch.setattr(attack.Attack, "__call__", real)
    code, out, err = cvlab("resume", "latest", "--json")
    again = json.loads(out)
    assert code == 0
    assert "resumed: 1 of 2 photos are done" in err
    assert again["results"] == whole["results"]
    assert again["metrics"] == whole["metrics"]
    for row in whole["results"]:
        one, other = ((tmp_path / run["run"] / row["attacked"]).read_bytes() for run in (whole, again))
        assert one == other


def test_a_signal_stops_an_attack_between_two_steps(two, cvlab, monkeypatch):
    from cvlab.engine import image_optimizer

    real = image_optimizer.optimization_steps

    def stopping(*arguments):
        signal.raise_signal(signal.SIGINT)
        return real(*arguments)

    monkeypatch.setattr(image_optimizer, "optimization_steps", stopping)
    code, _, err = cvlab("attack", "--target", "ostrich", *two)
    assert code == 130
    assert "stopped by SIGINT after photo 0" in err
    monkeypatch.setattr(image_optimizer, "optimization_steps", real)
    code, out, _ = cvlab("resume", "latest", "--json")
    assert code == 0
    assert json.loads(out)["metrics"]["success_rate"] == 1
