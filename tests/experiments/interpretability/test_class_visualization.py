"""Class visualization: the Fourier parametrization, the movements, and runs that are stopped."""

import json
import signal

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from cvlab.data import photos
from cvlab.engine import image_optimizer
from cvlab.models import pretrained
from cvlab.ops import visualize


def half(count):
    return torch.full((count,), 0.5)


def test_coefficients_and_pictures_are_the_same_thing():
    torch.manual_seed(0)
    pictures = torch.rand(2, 3, 16, 16) * 0.8 + 0.1
    spectrum = visualize.images_to_spectrum(pictures)
    assert spectrum.shape == visualize.spectrum_shape(2, 16)
    torch.testing.assert_close(visualize.spectrum_to_images(spectrum, 16), pictures, rtol=1e-4, atol=1e-4)


def test_a_band_leaves_the_fine_detail_out():
    torch.manual_seed(0)
    spectrum = torch.randn(visualize.spectrum_shape(1, 32))
    values = [
        visualize.spectrum_to_images(spectrum, 32, band).diff(dim=3).abs().mean().item() for band in (0.1, 0.4, 1.0)
    ]
    assert values[0] < 0.5 * values[1] < values[2]


def test_movements_of_nothing_change_nothing():
    x = torch.rand(2, 3, 12, 12)
    none = {"rotate_degrees": 0.0, "zoom": 0.0, "shift": 0.0}
    torch.testing.assert_close(visualize.random_affine(x, torch.rand, **none), x)
    torch.testing.assert_close(visualize.random_affine(x, half, rotate_degrees=90, zoom=0.5, shift=0.5), x)
    assert visualize.random_roll(x, half, 3).equal(x)
    torch.testing.assert_close(visualize.color_jitter(x, half, gray=0.0, contrast=0.0), x)


def test_movements_move():
    x = torch.rand(1, 3, 12, 12)
    turned = visualize.random_affine(
        x, lambda n: torch.tensor([1.0, 0.5, 0.5, 0.5]), rotate_degrees=90, zoom=0, shift=0
    )
    options = (x.rot90(1, (2, 3)), x.rot90(-1, (2, 3)))
    assert any(torch.allclose(turned, option, atol=1e-4) for option in options)
    low = visualize.random_roll(x, torch.zeros, 2)
    assert low.equal(torch.roll(x, (-2, -2), (2, 3)))
    grey = visualize.color_jitter(x, torch.ones, gray=1.0, contrast=0.0)
    torch.testing.assert_close(grey, x.mean(1, keepdim=True).expand_as(x))


def test_a_blur_is_torchvisions():
    from cvlab import _compat

    x = torch.rand(1, 3, 30, 30)
    wanted = _compat.torchvision().transforms.functional.gaussian_blur(x, 17, 2.0)
    torch.testing.assert_close(
        visualize.gaussian_blur(x, 2.0)[..., 10:20, 10:20], wanted[..., 10:20, 10:20], atol=1e-4, rtol=1e-3
    )
    flat = torch.full((1, 3, 9, 9), 0.3)
    torch.testing.assert_close(visualize.gaussian_blur(flat, 1.0), flat)


def test_adam_is_torchs():
    torch.manual_seed(0)
    start, target = torch.rand(3, 4), torch.rand(3, 4)
    theirs = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([theirs], lr=0.05)
    for _ in range(7):
        optimizer.zero_grad()
        F.mse_loss(theirs, target).backward()
        optimizer.step()
    pixels = image_optimizer.ImageState([start.clone()])
    steps = image_optimizer.optimization_steps(
        pixels, lambda p: {"loss": F.mse_loss(p.tensors[0], target)}, image_optimizer.adam(lambda step: 0.05)
    )
    for _ in range(7):
        next(steps)
    torch.testing.assert_close(pixels.tensors[0], theirs.detach())
    assert pixels.step == 7


def test_a_loss_that_is_not_finite_ends_it():
    from cvlab.errors import DivergedError

    pixels = image_optimizer.ImageState([torch.zeros(2)])
    steps = image_optimizer.optimization_steps(pixels, lambda p: {"loss": p.tensors[0].sum() / 0}, lambda p, g: None)
    with pytest.raises(DivergedError, match="not finite at step 0"):
        next(steps)
    assert pixels.tensors[0].equal(torch.zeros(2))


SHORT = ("--target", "tick,9", "steps=8", "frames=2", "expect=[]", "threads=1")


def test_pictures_strips_and_animations(cvlab, tmp_path):
    code, out, err = cvlab("classvis", *SHORT, "--json")
    assert code == 0, err
    found = json.loads(out)
    run = tmp_path / found["run"]
    assert [row["target"] for row in found["results"]] == ["tick", "ostrich"]
    for row in found["results"]:
        for key, size in (("image", (224, 224)), ("frames", (3 * 224, 224)), ("animation", (224, 224))):
            with Image.open(run / row[key]) as image:
                assert image.size == size
                assert key != "animation" or image.n_frames >= 2
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 1


def test_from_a_photo(cvlab, tmp_path):
    for kind in ("fourier", "pixels"):
        words = ("classvis", "sample", "--init", "image", "--target", "tick", "steps=1", "frames=1", "lr=1e-6")
        code, out, err = cvlab(*words, f"parametrization={kind}", "expect=[]", "--json")
        assert code == 0, err
        found = json.loads(out)
        made = photos.load(tmp_path / found["run"] / found["results"][0]["image"])
        view = pretrained.build().transform(photos.load(photos.find_images(["sample"])[0]))
        difference = (photos.to_tensor(made) - photos.to_tensor(view)).abs().max()
        assert difference <= 6 / 255


@pytest.mark.parametrize("kind", ["fourier", "pixels"])
def test_stopped_and_resumed_it_ends_with_the_same_bits(cvlab, tmp_path, monkeypatch, kind):
    words = ("classvis", *SHORT, f"parametrization={kind}", "jitter_px=4", "--json")
    whole = json.loads(cvlab(*words)[1])
    real = image_optimizer.optimization_steps

    def stopping(*arguments):
        for k, losses in enumerate(real(*arguments)):
            if k == 3:
                signal.raise_signal(signal.SIGTERM)
            yield losses

    monkeypatch.setattr(image_optimizer, "optimization_steps", stopping)
    code, out, _ = cvlab(*words)
    assert code == 143
    assert "after step 4" in json.loads(out)["error"]["message"]
    monkeypatch.setattr(image_optimizer, "optimization_steps", real)
    code, out, err = cvlab("resume", "latest", "--json")
    assert code == 0
    assert "4 of 8 steps are done" in err
    again = json.loads(out)
    for row in whole["results"]:
        one, other = ((tmp_path / run["run"] / row["image"]).read_bytes() for run in (whole, again))
        assert one == other
    assert {k: v for k, v in whole["metrics"].items() if "seconds" not in k} == {
        k: v for k, v in again["metrics"].items() if "seconds" not in k
    }
