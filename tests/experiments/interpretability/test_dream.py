"""The dream command."""

import json

import pytest
import torch
from PIL import Image
from torch import nn

from cvlab.data import photos
from cvlab.engine import device
from cvlab.errors import ConfigError
from cvlab.experiments.interpretability import deep_dream
from cvlab.models import pretrained
from cvlab.ops import visualize
from cvlab.ops.resample import EvalTransform

SHORT = ("--layer", "blocks.2", "--octaves", "2", "--steps", "2", "--size", "96", "threads=1")


def test_octave_sizes():
    assert deep_dream.octave_sizes(400, 200, 3, 2.0) == [(100, 50), (200, 100), (400, 200)]
    assert deep_dream.octave_sizes(400, 180, 3, 2.0) == [(200, 90), (400, 180)]
    assert deep_dream.octave_sizes(20, 10, 4, 1.4) == [(20, 10)]


@pytest.mark.parametrize(("size", "expected"), [((100, 50), (40, 20)), ((30, 40), (30, 40)), ((1000, 3), (40, 1))])
def test_photos_are_downsampled_and_never_upsampled(size, expected):
    assert deep_dream.reduce_photo(Image.new("RGB", size), 40).size == expected


def test_multiscale_blur_amplifies_a_low_frequency():
    x = torch.arange(64.0)
    low, high = torch.sin(x * 2 * torch.pi / 16), torch.sin(x * torch.pi * 0.9)
    gradient = (low + 3 * high).expand(1, 64, 64)
    before, after = gradient[0, 32], visualize.multiscale_blur(gradient, 1.0)[0, 32]
    correlations = [float(torch.corrcoef(torch.stack([row, low]))[0, 1]) for row in (before, after)]
    assert correlations[0] < 0.4
    assert correlations[1] > 0.85


def test_the_response_of_the_layer_increases_and_a_run_resumes_bitwise_identically(
    two_photos, cvlab, tmp_path, monkeypatch
):
    code, out, err = cvlab("dream", *two_photos, *SHORT, "--json")
    assert code == 0, err
    uninterrupted = json.loads(out)
    assert uninterrupted["metrics"]["response_ratio"] > 1
    for row, size in zip(uninterrupted["results"], ((96, 83), (70, 96)), strict=True):
        assert photos.load(tmp_path / uninterrupted["run"] / row["dream"]).size == (row["width"], row["height"]) == size
        assert photos.load(tmp_path / uninterrupted["run"] / row["panel"]).width > size[0]
    dream, calls = deep_dream.Dreamer.dream, []

    def interrupt_second(self, photo, check_interrupt):
        calls.append(photo)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return dream(self, photo, check_interrupt)

    monkeypatch.setattr(deep_dream.Dreamer, "dream", interrupt_second)
    assert cvlab("dream", *two_photos, *SHORT)[0] == 130
    monkeypatch.setattr(deep_dream.Dreamer, "dream", dream)
    code, out, err = cvlab("resume", "latest", "--json")
    resumed = json.loads(out)
    assert code == 0
    assert "resumed: 1 of 2 photos are done" in err
    assert resumed["results"] == uninterrupted["results"]
    for row in uninterrupted["results"]:
        expected, actual = ((tmp_path / run["run"] / row["dream"]).read_bytes() for run in (uninterrupted, resumed))
        assert expected == actual


def test_a_channel_and_a_model_without_classifier(two_photos, cvlab):
    code, out, err = cvlab("dream", two_photos[0], *SHORT, "--layer", "blocks.2:5", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert "response_ratio" not in result["metrics"]
    assert result["results"][0]["response_after"] > result["results"][0]["response_before"]
    code, out, err = cvlab("dream", two_photos[0], *SHORT[2:], "--model", "nanodet_g", "--json")
    assert code == 0, err
    assert json.loads(out)["results"][0]["layer"] == "stages.2"


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["sample", "--layer", "block.3"], 2, "unknown layer 'block.3'; did you mean 'blocks.3'?"),
        (["sample", "--layer", "block", "--dry-run"], 2, "did you mean 'blocks'?"),
        (["sample", "--layer", "blocks.3:99999"], 2, "layer 'blocks.3' has no channel 99999; its channels are 0 to 79"),
        (["sample", "--layer", "blocks.3:x"], 2, "'blocks.3:x' is neither a layer"),
        (["sample", "--layer", "fc"], 2, "layer"),
        (["sample", "octave_scale=1"], 2, "octave_scale"),
        ([], 2, "no photo is named"),
        (["gone.jpg"], 4, "gone.jpg: no such file"),
    ],
)
def test_errors_are_one_line(cvlab, arguments, code, text):
    result, _, err = cvlab("dream", *arguments)
    assert result == code
    assert text in err.splitlines()[-1]
    assert len(err.splitlines()[-1]) < 300


class Branching(nn.Module):
    """A network that torch.fx cannot trace, and whose last layer accepts only images of 32 pixels."""

    num_classes = 5

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Conv2d(4, 4, 3, stride=4, padding=1)
        self.classifier = nn.Linear(4 * 4 * 4, 5)

    def forward(self, images):
        maps = self.first(images)
        if float(maps.detach().sum()) > 0:
            maps = maps + 0
        return self.classifier(self.second(self.second(maps)[:, :, ::1].repeat(1, 1, 4, 4)).flatten(1))


def test_a_network_with_a_fixed_input_size_is_computed_only_up_to_the_layer():
    module = pretrained.NormalizedModel(Branching(), (0.5,) * 3, (0.5,) * 3).eval()
    model = pretrained.PretrainedClassifier("branching", module, EvalTransform(32, 32, "bilinear"), ("a",) * 5)
    ctx = device.select_device("cpu", "float32")
    assert deep_dream.default_layer(model) == "second"
    extractor, _ = deep_dream.build_extractor("first", model, ctx)
    assert extractor.batch(torch.rand(1, 3, 96, 64))["first"].shape == (1, 4, 48, 32)
    extractor, _ = deep_dream.build_extractor("second", model, ctx)
    image = torch.rand(1, 3, 32, 32)
    outputs = []
    hook = module.model.second.register_forward_hook(lambda _module, _args, output: outputs.append(output))
    module(image)
    hook.remove()
    torch.testing.assert_close(extractor.batch(image)["second"], outputs[-1]), "the last of two calls"
    with pytest.raises(ConfigError, match="no map"):
        deep_dream.build_extractor("classifier", model, ctx)


def test_a_photo_that_is_too_small_is_reported_and_the_others_are_processed(cvlab, tmp_path):
    for name, size in (("tiny", (1, 1)), ("photo", (80, 60))):
        Image.effect_noise(size, 60).convert("RGB").save(tmp_path / f"{name}.png")
    tiny = ("data={name: scenes10, num_train: 40}", "batch_size=20", "duration={steps: 2}", "evaluate_test=false")
    model = "model={name: whiten_net, widths: [4], depth: 1}"
    assert cvlab("train", "quickstart", *tiny, model, "expect=[]", "threads=1", "-q")[0] == 0
    code, out, err = cvlab("dream", "photo.png", "tiny.png", "--model", "latest", "--steps", "2", "threads=1", "--json")
    assert code == 4, err
    assert [("error" in row) for row in json.loads(out)["results"]] == [False, True]
    assert "warning: tiny.png: 1 x 1 pixels do not fit" in err
