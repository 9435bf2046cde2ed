"""Style transfer: scales, memory, regions, the command, resuming."""

import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image

from cvlab.config import loading
from cvlab.data import photo_paths, photos
from cvlab.engine import image_optimizer, memory, update_rules
from cvlab.experiments.style import transfer as style_transfer
from cvlab.experiments.style.sample_painting import sample_painting
from cvlab.ops import style
from tests.models.random_models import squeezenet

SHORT = ("size=48", "steps=6", "preview_every=3", "expect=[]", "threads=1")


class TestScales:
    @pytest.mark.parametrize(("size", "count"), [(192, 1), (320, 1), (321, 2), (512, 2), (1024, 3), (2048, 4)])
    def test_the_number_of_scales_depends_on_the_size(self, size, count):
        result = style_transfer.make_scales(size, size * 3 // 4, None, 200)
        assert len(result) == count
        assert (result[-1].width, result[-1].end) == (size, 200)
        assert [scale.start for scale in result] == [0, *(scale.end for scale in result[:-1])]
        assert all(a.end - a.start >= b.end - b.start for a, b in itertools.pairwise(result))

    def test_fewer_steps_than_scales(self):
        result = style_transfer.make_scales(512, 512, 5, 2)
        assert [(scale.width, scale.start, scale.end) for scale in result] == [(256, 0, 1), (512, 1, 2)]


def test_an_image_that_needs_too_much_memory_is_rejected_with_the_size_that_fits(cvlab, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 300_000_000)
    code, _, err = cvlab("style", "sample", "whirls", "size=2048", "--dry-run")
    assert code == 2
    assert "0.3 GB are free" in err
    max_size = int(err.rsplit("size=", 1)[1].split()[0])
    assert 200 < max_size < 1024
    assert "Traceback" not in err
    assert cvlab("style", "sample", "whirls", f"size={max_size}", "--dry-run")[0] == 0
    assert cvlab("style", "sample", "whirls", f"size={max_size + 16}", "--dry-run")[0] == 2


def test_bundled_painting_is_deterministic():
    sample_painting.cache_clear()
    first = np.asarray(sample_painting())
    sample_painting.cache_clear()
    assert np.array_equal(first, np.asarray(sample_painting()))
    assert first.std() > 40


def run_style(cvlab, *args):
    code, out, err = cvlab("style", *args, *SHORT, "--json")
    assert code == 0, err
    return json.loads(out)


class TestCommand:
    def test_saved_files(self, cvlab, tmp_path):
        result = run_style(cvlab, "sample", "whirls")
        images = tmp_path / "runs" / result["run"].split("/")[-1] / "images"
        assert photos.load(images / "style.png").size == (41, 48)
        assert sorted(path.name for path in (images / "frames").iterdir()) == ["000000.png", "000003.png", "000006.png"]
        assert (images / "preview.png").read_bytes() == (images / "frames" / "000006.png").read_bytes()
        with Image.open(images / "style.gif") as animation:
            assert animation.n_frames == 3
        assert photos.load(images / "style-panel.png").width > 3 * 450, "all tiles are enlarged to one height"
        row = result["results"][0]
        assert row["style_loss_reduction"] == result["metrics"]["style_loss_reduction"] > 1
        assert 0 < row["ssim"] < 1
        rows = [json.loads(line) for line in (images.parent / "metrics.jsonl").read_text().splitlines()]
        assert {"step", "loss", "content_loss", "style_loss", "tv_loss"} <= rows[-1].keys()

    def test_the_loss_is_the_sum_of_its_parts(self, cvlab, tmp_path):
        result = run_style(cvlab, "sample", "whirls")
        metrics = result["metrics"]
        parts = ("content_loss", "style_loss", "tv_loss")
        assert metrics["loss"] == pytest.approx(sum(metrics[key] for key in parts))

    def test_the_initial_style_loss_of_every_layer_equals_its_weight(self):
        transfer = style_transfer.prepare(loading.load("style", ["size=96", "scales=1"]).config)
        losses = transfer.objective(image_optimizer.ImageState(transfer.initial_values()))
        assert float(losses["style_loss"]) == pytest.approx(4 * 2000, rel=1e-3)
        assert float(losses["content_loss"]) == pytest.approx(0, abs=1e-3)

    def test_keep_colors(self, cvlab, tmp_path):
        result = run_style(cvlab, "sample", "whirls", "--keep-colors")
        image = photos.to_tensor(photos.load(tmp_path / "runs" / result["run"].split("/")[-1] / "images/style.png"))
        photo = photos.to_tensor(
            photos.load(photo_paths.find_images(["sample"])[0]).resize((41, 48), Image.Resampling.BICUBIC)
        )
        chroma = image - style.luminance(image), photo - style.luminance(photo)
        assert float((chroma[0] - chroma[1]).abs().median()) < 0.01

    def test_several_styles_with_weights(self, cvlab, tmp_path):
        Image.effect_noise((64, 64), 90).convert("RGB").save("noise.png")
        first_only = run_style(cvlab, "sample", "whirls", "noise.png", "--mix", "1,1e-9")
        single = run_style(cvlab, "sample", "whirls")
        assert first_only["metrics"]["style_loss"] == pytest.approx(single["metrics"]["style_loss"], rel=1e-2)
        mixed = run_style(cvlab, "sample", "whirls", "noise.png", "--mix", "0.5,0.5")
        assert abs(mixed["metrics"]["style_loss"] / single["metrics"]["style_loss"] - 1) > 1e-2

    def test_regions_change_only_their_part_of_the_image(self, cvlab, tmp_path):
        mask = np.zeros((600, 512), np.uint8)
        mask[:, :200] = 255
        Image.fromarray(mask).save("left.png")
        code, out, err = cvlab(
            *("style", "sample", "whirls", "--mask", "left.png", "size=96", "steps=30", "scales=1"),
            *("content_weight=3000", "expect=[]", "threads=1", "--json"),
        )
        assert code == 0, err
        path = tmp_path / "runs" / json.loads(out)["run"].split("/")[-1] / "images/style.png"
        image = photos.to_tensor(photos.load(path))
        photo = photos.to_tensor(
            photos.load(photo_paths.find_images(["sample"])[0]).resize((82, 96), Image.Resampling.BICUBIC)
        )
        changed = (image - photo).abs().mean(0).mean(0)  # by column
        assert changed[:25].mean() > 1.5 * changed[45:].mean()

    @pytest.mark.parametrize("kind", ["content", "noise"])
    def test_texture_and_noise(self, cvlab, kind):
        args = ("content=null", "init=noise") if kind == "noise" else ("init=noise",)
        code, out, err = cvlab("run", "style", *args, *SHORT, "--json")
        assert code == 0, err
        metrics = json.loads(out)["metrics"]
        assert metrics["style_loss_reduction"] > 1
        assert ("ssim" in metrics) == (kind == "content")

    def test_normalized_pixels(self, cvlab):
        args = ("space=normalized", "lr=0.2", "scaling=absolute", "tv_weight=0.01")
        code, out, err = cvlab("run", "style", *SHORT, *args, "--json")
        assert code == 0, err
        assert json.loads(out)["metrics"]["style_loss_reduction"] > 1.1

    @pytest.mark.parametrize("kind", ["adam", "scales", "chroma"])
    def test_an_interrupted_run_resumes_bitwise_identically(self, cvlab, tmp_path, monkeypatch, kind):
        args = {"scales": ("scales=2",), "adam": (), "chroma": ("scales=2", "space=ycbcr")}[kind]
        arguments = ("run", "style", *SHORT, *args, "seed=1", "--json")
        uninterrupted = json.loads(cvlab(*arguments)[1])
        stop_if_set = image_optimizer._ImageOptimizer._stop_if_set

        def interrupt_step_4(optimizer, stop):
            if optimizer.step == 4:
                optimizer.checkpointer.save()
                raise KeyboardInterrupt
            stop_if_set(optimizer, stop)

        monkeypatch.setattr(image_optimizer._ImageOptimizer, "_stop_if_set", interrupt_step_4)
        cvlab(*arguments)
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)
        code, out, err = cvlab("resume", "latest", "--json")
        assert code == 0, err
        assert "resumed" in err, err
        resumed = json.loads(out)
        folders = [tmp_path / "runs" / result["run"].split("/")[-1] / "images" for result in (uninterrupted, resumed)]
        assert folders[0] != folders[1]
        assert (folders[0] / "style.png").read_bytes() == (folders[1] / "style.png").read_bytes()
        assert (folders[0] / "style.gif").read_bytes() == (folders[1] / "style.gif").read_bytes()


class TestErrors:
    @pytest.mark.parametrize(
        ("args", "code", "text"),
        [
            ((), 2, "no photo is named"),
            (("sample",), 2, "no style is named"),
            (("sample", "none.jpg"), 4, "none.jpg: no such file"),
            (("sample", "whirls", "--mask", "none.png"), 4, "none.png: no such file"),
            (("sample", "whirls", "--preset", "sketsch"), 2, "did you mean 'sketch'"),
            (("sample", "whirls", "--mix", "1;2"), 2, "not numbers"),
            (("sample", "whirls", "--mix", "1,2"), 2, "mix has 2 weights for 1 styles"),
            (("sample", "whirls", "--style-mask", "black.png"), 2, "1 style_masks for 0 masks"),
            (("sample", "whirls", "--mask", "black.png"), 4, "black.png: the mask is empty"),
            (("sample", "whirls", "--mask", "wide.png"), 4, "give it the shape of its image"),
            (("sample", "whirls", "whirls", "--mask", "wide.png"), 2, "1 masks for 2 styles"),
            (("sample", "whirls", "content_layer=blocks.77"), 2, "unknown layer 'blocks.77'"),
            (("sample", "whirls", "style_weights=[1,2]"), 2, "2 style_weights for 4 style layers"),
            (("sample", "whirls", "--size", "4"), 2, "size"),
            (("sample", "whirls", "--init", "content", "content=null"), 2, "without a photo"),
        ],
    )
    def test_errors_are_one_line(self, cvlab, args, code, text):
        Image.new("L", (512, 600)).save("black.png")
        Image.new("L", (600, 200), 255).save("wide.png")
        actual, out, err = cvlab("style", *args)
        assert actual == code, err
        assert text in err, err
        assert "Traceback" not in err
        assert not out

    def test_a_preset_without_weights_suggests_the_command_that_fetches_them(self, cvlab, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        code, _, err = cvlab("style", "sample", "whirls", "--preset", "scream")
        assert code == 4
        assert "models fetch" in err


@pytest.mark.parametrize("preset", ["composition_vii", "scream", "starry_night"])
def test_course_presets_with_weights_from_a_file(cvlab, tmp_path, preset):
    squeezenet("1_1", tmp_path)
    code, out, err = cvlab(
        *("style", "sample", "whirls", "--preset", preset, "--weights", "weights.pth", "size=48", "steps=3"),
        *("style_size=48", "expect=[]", "--json"),
    )
    assert code == 0, err
    assert json.loads(out)["metrics"]["width"] == 48  # the shorter side


def test_course_settings_are_plain_adam_on_normalized_pixels(tmp_path):
    """The result is bitwise identical to a loop without scales, color spaces and image states."""
    model = squeezenet("1_1", tmp_path)
    overrides = [f"weights={tmp_path}/weights.pth", "size=40", "style_size=40", "steps=20", "threads=1", "device=cpu"]
    transfer = style_transfer.prepare(loading.load("style_starry_night", overrides).config)
    state = image_optimizer.ImageState(transfer.initial_values())
    steps = image_optimizer.optimization_steps(state, transfer.objective, transfer.update)
    for _ in range(20):
        next(steps)

    target = transfer.target(transfer.scales[-1])
    scale, shift = model.module.scale[0], model.module.shift[0]
    pixels = transfer.initial_image(transfer.scales[-1]) * scale + shift
    adam = {}
    for step in range(20):
        pixels.requires_grad_(True)
        maps = transfer.targets.features((pixels - shift) / scale)
        losses = [
            weight * style.style_loss(maps[name], target.regions[0].gram_matrices[name])
            for name, weight in target.style_weights.items()
        ]
        content_loss = 0.06 * style.content_loss(maps["features.3"], target.content_features)
        loss = content_loss + torch.stack(losses).sum() + 0.02 * style.tv_loss(pixels)
        gradient = torch.autograd.grad(loss, pixels)[0]
        pixels, adam = update_rules.adam(pixels.detach(), gradient, adam, 0.1 if step >= 18 else 3.0)
        pixels = pixels.clamp(-1.5, 1.5) if step < 19 else pixels
    assert state.tensors[0].equal(pixels)


def test_chroma_is_optimized_at_half_the_resolution():
    overrides = ["space=ycbcr", "size=47", "steps=4", "scales=2", "threads=1"]
    transfer = style_transfer.prepare(loading.load("style", overrides).config)
    state = image_optimizer.ImageState(transfer.initial_values())
    steps = image_optimizer.optimization_steps(state, transfer.objective, transfer.update)
    shapes = [[tuple(tensor.shape) for tensor in state.tensors]]
    while state.step < 4:
        next(steps)
        shapes.append([tuple(tensor.shape) for tensor in state.tensors])
    assert shapes[0] == [(1, 24, 20), (2, 12, 10)]
    assert shapes[-1] == [(1, 47, 40), (2, 24, 20)]
    assert sum(tensor.numel() for tensor in state.tensors) == transfer.num_parameters()
    assert transfer.to_image(state.tensors).size == (40, 47)
