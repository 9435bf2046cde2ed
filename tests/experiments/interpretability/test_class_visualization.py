"""The class visualization command."""

import json
import signal

import pytest
from PIL import Image

from cvlab.data import photo_paths, photos
from cvlab.engine import image_optimizer
from cvlab.models import pretrained
from cvlab.reports import images

SHORT = ("--target", "tick,9", "steps=8", "frames=2", "expect=[]", "threads=1")


def test_saved_files(cvlab, tmp_path, monkeypatch):
    sheets = {}
    draw_sheet = images.frames_sheet
    monkeypatch.setattr(
        images, "frames_sheet", lambda title, frames: sheets.update({title: frames}) or draw_sheet(title, frames)
    )
    code, out, err = cvlab("classvis", *SHORT, "--json")
    assert code == 0, err
    result = json.loads(out)
    run = tmp_path / result["run"]
    assert [row["target"] for row in result["results"]] == ["tick", "ostrich"]
    for row in result["results"]:
        for key in ("image", "animation"):
            with Image.open(run / row[key]) as image:
                assert image.size == (224, 224)
                assert key != "animation" or image.n_frames >= 2
        frames = sheets[f"class visualization of {row['target']} by efficientnet_lite0"]
        assert [step for step, _ in frames] == [0, 4, 8]
        assert frames[-1][1].tobytes() == photos.load(run / row["image"]).tobytes()
        assert photos.load(run / row["frames"]).width > 3 * 224
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 1


def test_starts_from_a_photo(cvlab, tmp_path):
    for kind in ("fourier", "pixels"):
        args = ("classvis", "sample", "--init", "image", "--target", "tick", "steps=1", "frames=1", "lr=1e-6")
        code, out, err = cvlab(*args, f"parametrization={kind}", "expect=[]", "--json")
        assert code == 0, err
        result = json.loads(out)
        image = photos.load(tmp_path / result["run"] / result["results"][0]["image"])
        view = pretrained.build().transform(photos.load(photo_paths.find_images(["sample"])[0]))
        difference = (photos.to_tensor(image) - photos.to_tensor(view)).abs().max()
        assert difference <= 6 / 255


@pytest.mark.parametrize(("kind", "targets"), [("fourier", "tick,9"), ("pixels", "tick")])
def test_interrupted_run_resumes_bit_for_bit(cvlab, tmp_path, monkeypatch, kind, targets):
    args = ("classvis", *SHORT, "--target", targets, f"parametrization={kind}", "jitter_px=4", "--json")
    uninterrupted = json.loads(cvlab(*args)[1])
    real = image_optimizer.optimization_steps

    def interrupting(*arguments):
        for k, losses in enumerate(real(*arguments)):
            if k == 3:
                signal.raise_signal(signal.SIGTERM)
            yield losses

    monkeypatch.setattr(image_optimizer, "optimization_steps", interrupting)
    code, out, _ = cvlab(*args)
    assert code == 143
    assert "at step 4" in json.loads(out)["error"]["message"]
    monkeypatch.setattr(image_optimizer, "optimization_steps", real)
    code, out, err = cvlab("resume", "latest", "--json")
    assert code == 0
    assert "4 of 8 steps are done" in err
    resumed = json.loads(out)
    for row in uninterrupted["results"]:
        one, other = ((tmp_path / run["run"] / row["image"]).read_bytes() for run in (uninterrupted, resumed))
        assert one == other
    assert {k: v for k, v in uninterrupted["metrics"].items() if "seconds" not in k} == {
        k: v for k, v in resumed["metrics"].items() if "seconds" not in k
    }
