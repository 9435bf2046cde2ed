"""Universal perturbations and patches: the saved files have the reported metrics, also on held-out photos."""

import json
import signal

import numpy as np
import pytest
from PIL import Image

from cvlab.data import photo_paths, photos
from cvlab.models import pretrained


@pytest.fixture
def folder(tmp_path):
    photo = photos.load(photo_paths.find_images(["sample"])[0])
    (tmp_path / "photos").mkdir()
    for k in range(6):
        photo.crop((40 * k, 30 * k, 40 * k + 260, 30 * k + 240)).save(tmp_path / "photos" / f"{k}.png")
    return tmp_path / "photos"


def predict(inputs):
    return pretrained.build().probabilities(photos.to_batch(inputs)).argmax(1).tolist()


def test_the_saved_perturbation_has_the_reported_fooling_rates(cvlab, folder, tmp_path):
    options = ("--method", "universal", "--eps", "12", "steps=6", "batch_size=4", "alpha=4", "--json")
    code, out, err = cvlab("attack", folder, *options)
    assert code == 0, err
    result = json.loads(out)
    metrics = result["metrics"]
    assert (metrics["num_photos"], metrics["num_held_out"]) == (4, 2)
    perturbation = np.asarray(Image.open(tmp_path / result["run"] / result["results"][0]["image"]), int) - 128
    assert np.abs(perturbation).max() == metrics["linf_255"] <= 12
    transform = pretrained.build().transform
    inputs = [transform(photos.load(path)) for path in sorted(folder.iterdir())]
    attacked = [Image.fromarray((np.asarray(x) + perturbation).clip(0, 255).astype(np.uint8)) for x in inputs]
    num_fooled = sum(a != b for a, b in zip(predict(inputs), predict(attacked), strict=True))
    rates = 4 * metrics["fooling_rate"], 2 * metrics["held_out_fooling_rate"]
    assert sum(rates) == pytest.approx(num_fooled)
    assert 0 <= metrics["noise_fooling_rate"] <= 1
    assert "noise of its size fools" in result["headline"]
    assert (tmp_path / result["run"] / result["results"][0]["panel"]).is_file()


def test_a_patch_has_its_printed_size(cvlab, folder, tmp_path):
    options = ("--method", "patch", "steps=3", "batch_size=2", "placements=2", "size_mm=30", "dpi=150", "--json")
    code, out, err = cvlab("attack", folder, *options)
    assert code == 0, err
    result = json.loads(out)
    assert 0 <= result["metrics"]["held_out_success_rate"] <= 1
    with Image.open(tmp_path / result["run"] / result["results"][0]["image"]) as saved:
        assert saved.size == (177, 177)
        assert saved.info["dpi"] == pytest.approx((150, 150), abs=0.1)
        assert saved.getpixel((0, 0)) == (255, 255, 255)
        assert saved.getpixel((88, 88)) != (255, 255, 255)


def test_an_interrupted_attack_resumes_to_the_same_result(cvlab, folder, monkeypatch):
    from cvlab.engine import image_optimizer

    options = ("--method", "universal", "steps=3", "batch_size=2", "--json")
    _, out, _ = cvlab("attack", folder, *options)
    expected = json.loads(out)["metrics"]
    optimization_steps = image_optimizer.optimization_steps

    def raise_interrupt(*arguments):
        signal.raise_signal(signal.SIGINT)
        return optimization_steps(*arguments)

    monkeypatch.setattr(image_optimizer, "optimization_steps", raise_interrupt)
    code, _, err = cvlab("attack", folder, *options)
    assert code == 130
    assert "continue with `cvlab resume " in err
    monkeypatch.setattr(image_optimizer, "optimization_steps", optimization_steps)
    code, out, _ = cvlab("resume", "latest", "--json")
    assert code == 0
    resumed = json.loads(out)["metrics"]
    assert {**resumed, "seconds_of_steps": 0} == {**expected, "seconds_of_steps": 0}


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--method", "universal", "--survive", "crop"), 2, "survive has no effect with method universal"),
        (("--method", "patch", "--eps", "3"), 2, "eps"),
        (("--method", "patch", "--target", "tosater"), 2, "no class 'tosater'"),
        (("--method", "patch", "min_scale=0.6"), 2, "min_scale is larger than max_scale"),
        (("--method", "patch", "size_mm=1000", "dpi=1200"), 2, "more than 5000 pixels"),
        (("--method", "universal"), 4, "too few photos to attack: 1; name a folder with at least 4"),
    ],
)
def test_invalid_settings_are_rejected(cvlab, options, code, message):
    actual, _, err = cvlab("attack", "sample", *options)
    assert actual == code
    assert message in err.splitlines()[-1]
