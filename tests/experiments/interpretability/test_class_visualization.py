"""The class visualization command."""

import json
import signal

import pytest
import torch
from PIL import Image

from cvlab.data import photo_paths, photos
from cvlab.engine import image_optimizer
from cvlab.experiments.interpretability import config, visualization_targets
from cvlab.models import pretrained
from cvlab.ops import visualize
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


def test_optimization_starts_from_a_photo(cvlab, tmp_path):
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
def test_an_interrupted_run_resumes_bitwise_identically(cvlab, tmp_path, monkeypatch, kind, targets):
    args = ("classvis", *SHORT, "--target", targets, f"parametrization={kind}", "jitter_px=4", "--json")
    uninterrupted = json.loads(cvlab(*args)[1])
    optimization_steps = image_optimizer.optimization_steps

    def interrupt_step_3(*arguments):
        for k, losses in enumerate(optimization_steps(*arguments)):
            if k == 3:
                signal.raise_signal(signal.SIGTERM)
            yield losses

    monkeypatch.setattr(image_optimizer, "optimization_steps", interrupt_step_3)
    code, out, _ = cvlab(*args)
    assert code == 143
    assert "at step 4" in json.loads(out)["error"]["message"]
    monkeypatch.setattr(image_optimizer, "optimization_steps", optimization_steps)
    code, out, err = cvlab("resume", "latest", "--json")
    assert code == 0
    assert "4 of 8 steps are done" in err
    resumed = json.loads(out)
    for row in uninterrupted["results"]:
        expected, actual = ((tmp_path / run["run"] / row["image"]).read_bytes() for run in (uninterrupted, resumed))
        assert expected == actual
    assert {k: v for k, v in uninterrupted["metrics"].items() if "seconds" not in k} == {
        k: v for k, v in resumed["metrics"].items() if "seconds" not in k
    }


def test_split_channels():
    assert config.split_channels("blocks.4:17") == ("blocks.4", (17,))
    assert config.split_channels("conv:0-2,1,7") == ("conv", (0, 1, 2, 7))
    for text in ("blocks.4", "blocks.4:", ":3", "blocks.4:a", "blocks.4:3-1", "blocks.4:0-64"):
        with pytest.raises(ValueError, match="channels"):
            config.split_channels(text)


def test_similarity_of_gram_matrices():
    features = torch.rand(1, 4, 6, 6).expand(2, -1, -1, -1)
    first, second = torch.tensor([0]), torch.tensor([1])
    assert float(visualize.gram_similarity(features, first, second)) == pytest.approx(1)
    flipped = torch.stack([features[0], features[1].flip(1, 2)])
    assert float(visualize.gram_similarity(flipped, first, second)) == pytest.approx(1), "positions are irrelevant"
    separate = torch.zeros(2, 2, 6, 6)
    separate[0, 0, :3], separate[1, 1, :3] = 1, 1
    assert float(visualize.gram_similarity(separate, first, second)) == pytest.approx(0)


def test_images_of_a_channel_that_differ(cvlab, tmp_path):
    short = ("steps=6", "frames=1", "lr=0.06", "blur=0", "gray=0", "contrast=0", "threads=1", "--json")
    runs = []
    for weight in (200, 0):
        args = ("--channel", "blocks.0:3", "--diversity", "2", f"diversity_weight={weight}")
        code, out, err = cvlab("classvis", *args, *short)
        assert code == 0, err
        runs.append(json.loads(out))
    result, baseline = runs
    assert result["metrics"]["diversity"] > 1.1 * baseline["metrics"]["diversity"]
    assert [row["channel"] for row in result["results"]] == ["blocks.0:3"] * 2
    folder = tmp_path / result["run"]
    targets = visualization_targets.ChannelTargets(pretrained.build(), "blocks.0:3", 2, torch.device("cpu"))
    frames = [folder / "images" / "frames" / f"{name}-000000.png" for name in targets.names]
    before = targets.describe(torch.stack([photos.to_tensor(photos.load(path)) for path in frames]))
    for row, start in zip(baseline["results"], before, strict=True):
        assert row["response"] > start["response"] + 0.1
    assert photos.load(folder / result["results"][0]["grid"]).width > 2 * 224


def test_a_channel_does_not_depend_on_later_layers():
    model = pretrained.build()
    targets = visualization_targets.ChannelTargets(model, "blocks.1:3", 1, torch.device("cpu"))
    parameters = {name for name, _ in targets.extractor.module.named_parameters()}
    assert any(name.startswith("blocks.1") for name in parameters)
    assert not any(name.startswith(("blocks.2", "conv_head", "classifier")) for name in parameters)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--channel", "block.4:0"), "did you mean 'blocks.4'?"),
        (("--channel", "blocks.4:112"), "its channels are 0 to 111"),
        (("--channel", "classifier:3"), "gives no map"),
        (("--channel", "blocks.4:0", "--target", "tick"), "--channel and --target are both given"),
        (("--channel", "blocks.4:0", "targets=[tick]"), "channel is visualized instead of classes"),
        (("--channel", "blocks.4:0-40", "--diversity", "2"), "82 images: at most 64"),
        (("--channel", "blocks.4:0", "second_model=efficientnet_lite2"), "second_model evaluates images of classes"),
        (("targets=[]",), "give at least one class"),
    ],
)
def test_invalid_channels_are_rejected(cvlab, tmp_path, args, message):
    code, _, err = cvlab("classvis", *args)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_a_second_model_needs_the_same_classes(cvlab, tmp_path):
    tiny = ("data={name: scenes10, num_train: 40}", "batch_size=20", "duration={steps: 2}", "evaluate_test=false")
    assert cvlab("train", "quickstart", *tiny, "expect=[]", "threads=1", "-q")[0] == 0
    arguments = ("--model", "latest", "--target", "ring", "--steps", "2", "frames=1", "threads=1")
    code, _, err = cvlab("classvis", *arguments, "second_model=efficientnet_lite0", "--dry-run")
    assert code == 2
    assert "second_model efficientnet_lite0 has other classes than" in err
    code, out, err = cvlab("classvis", *arguments, "second_model=latest", "--json")
    assert code == 0, err
    assert json.loads(out)["metrics"]["second_top5"] in (0, 1)
