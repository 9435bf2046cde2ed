"""Style transfer: losses against slow twins, memory, layers, regions, scales, the command, resuming."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from cvlab.data import photos
from cvlab.engine import image_optimizer, memory
from cvlab.errors import ConfigError
from cvlab.experiments.style import transfer as style_transfer
from cvlab.experiments.style.sample_painting import sample_painting
from cvlab.models import features, pretrained
from cvlab.ops import style

SHORT = ("size=48", "steps=6", "preview_every=3", "expect=[]", "threads=1")


def slow_gram(features_, mask):
    c, h, w = features_.shape
    found = torch.zeros(c, c, dtype=features_.dtype)
    for i in range(h):
        for j in range(w):
            found += mask[i, j] * torch.outer(features_[:, i, j], features_[:, i, j])
    return found / (c * mask.sum())


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 4, 5), (7, 2, 9)])
class TestLosses:
    def test_gram_is_the_mean_of_outer_products(self, shape):
        torch.manual_seed(0)
        x = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(style.gram_matrix(x), slow_gram(x, torch.ones(shape[1:]).double()))
        mask = torch.rand(shape[1:], dtype=torch.float64)
        torch.testing.assert_close(style.gram_matrix(x, mask), slow_gram(x, mask))

    def test_gradients(self, shape):
        torch.manual_seed(0)
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        wanted = torch.randn(shape, dtype=torch.float64)
        mask = torch.rand(shape[1:], dtype=torch.float64)
        theirs = style.gram_matrix(wanted)
        assert torch.autograd.gradcheck(lambda t: style.content_loss(t, wanted), x)
        assert torch.autograd.gradcheck(lambda t: style.style_loss(t, theirs), x)
        assert torch.autograd.gradcheck(lambda t: style.style_loss(t, theirs, mask), x)
        assert torch.autograd.gradcheck(style.tv_loss, x)

    def test_values(self, shape):
        torch.manual_seed(0)
        x, y = torch.randn(2, *shape, dtype=torch.float64)
        pairs = zip(x.flatten().tolist(), y.flatten().tolist(), strict=True)
        assert float(style.content_loss(x, y)) == pytest.approx(sum((a - b) ** 2 for a, b in pairs))
        c, h, w = shape
        across = sum(float(x[k, i, j + 1] - x[k, i, j]) ** 2 for k in range(c) for i in range(h) for j in range(w - 1))
        down = sum(float(x[k, i + 1, j] - x[k, i, j]) ** 2 for k in range(c) for i in range(h - 1) for j in range(w))
        assert float(style.tv_loss(x)) == pytest.approx(across + down)


def test_a_gram_matrix_does_not_see_the_order_of_cells():
    x = torch.randn(4, 6, 6)
    shuffled = x.flatten(1)[:, torch.randperm(36)].view(4, 6, 6)
    torch.testing.assert_close(style.gram_matrix(x), style.gram_matrix(shuffled))
    assert not torch.allclose(style.gram_matrix(x), style.gram_matrix(x.flip(0)))


def test_ssim_by_hand():
    torch.manual_seed(0)
    x, y = torch.rand(2, 1, 11, 11, dtype=torch.float64)
    line = np.exp(-0.5 * ((np.arange(11) - 5) / 1.5) ** 2)
    window = np.outer(line, line) / line.sum() ** 2
    a, b = x[0].numpy(), y[0].numpy()
    ma, mb = (window * a).sum(), (window * b).sum()
    va, vb, cab = (window * a * a).sum() - ma**2, (window * b * b).sum() - mb**2, (window * a * b).sum() - ma * mb
    wanted = (2 * ma * mb + 1e-4) * (2 * cab + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))
    assert style.ssim(x, y) == pytest.approx(wanted)


def test_psnr():
    x = torch.zeros(3, 4, 4)
    assert style.psnr_db(x, x + 0.1) == pytest.approx(20.0, abs=1e-5)
    assert style.psnr_db(x, x) == math.inf


def test_brightness_with_other_colours_keeps_the_brightness():
    torch.manual_seed(0)
    brightness, colours = 0.4 + 0.2 * torch.rand(1, 5, 5), 0.4 + 0.2 * torch.rand(3, 5, 5)
    torch.testing.assert_close(style.luminance(style.transfer_color(brightness, colours)), brightness)
    own = style.transfer_color(style.luminance(colours), colours)
    torch.testing.assert_close(own, colours)


class TestMemory:
    def test_of_a_machine_and_of_its_container(self, tmp_path):
        (tmp_path / "meminfo").write_text("MemTotal: 99 kB\nMemAvailable:   2000 kB\n")
        cpu = torch.device("cpu")
        assert memory.free_bytes(cpu, tmp_path, tmp_path / "none") == 2000 * 1024
        (tmp_path / "memory.max").write_text("500000\n")
        (tmp_path / "memory.current").write_text("100000\n")
        assert memory.free_bytes(cpu, tmp_path, tmp_path) == 400_000
        (tmp_path / "memory.max").write_text("max\n")
        assert memory.free_bytes(cpu, tmp_path, tmp_path) == 2000 * 1024
        assert memory.free_bytes(cpu, tmp_path / "none", tmp_path / "none") is None

    def test_a_picture_that_is_too_large_is_refused_with_the_size_that_fits(self, cvlab, monkeypatch):
        monkeypatch.setattr(memory, "free_bytes", lambda device: 300_000_000)
        code, _, err = cvlab("style", "sample", "whirls", "size=2048", "--dry-run")
        assert code == 2
        assert "0.3 GB are free" in err
        fits = int(err.rsplit("size=", 1)[1].split()[0])
        assert 200 < fits < 1024
        assert "Traceback" not in err
        assert cvlab("style", "sample", "whirls", f"size={fits}", "--dry-run")[0] == 0
        assert cvlab("style", "sample", "whirls", f"size={fits + 16}", "--dry-run")[0] == 2

    def test_the_estimate_grows_with_the_pixels(self):
        net = pretrained.build()

        def estimate(layer, height):
            extractor, parameters = features.FeatureExtractor(net, [layer]), net.module.parameters()
            return memory.estimate_activation_bytes(extractor, parameters, height, 256, torch.device("cpu"))

        shallow, deep = estimate("blocks.0", 256), estimate("blocks.5", 256)
        assert 256 * 256 * 100 < shallow < deep
        assert estimate("blocks.5", 512) == pytest.approx(2 * deep)


class TestFeatures:
    def test_are_those_of_the_whole_net(self):
        net = pretrained.build()
        found = {}
        hook = net.module.model.blocks[3].register_forward_hook(lambda m, i, o: found.update(whole=o))
        picture = torch.rand(3, 64, 96)
        with torch.no_grad():
            net.module(picture[None].contiguous(memory_format=torch.channels_last))
        hook.remove()
        mine = features.FeatureExtractor(net, ["blocks.3", "blocks.1"])(picture)
        assert list(mine) == ["blocks.1", "blocks.3"] or list(mine) == ["blocks.3", "blocks.1"]
        torch.testing.assert_close(mine["blocks.3"], found["whole"][0])

    def test_nothing_below_the_deepest_layer_is_computed(self):
        net = pretrained.build()
        calls = []
        leaves = [module for module in net.module.model.blocks[4].modules() if not list(module.children())]
        hooks = [module.register_forward_hook(lambda m, i, o: calls.append(1)) for module in leaves]
        features.FeatureExtractor(net, ["blocks.3"])(torch.rand(3, 64, 64))
        assert not calls
        features.FeatureExtractor(net, ["blocks.5"])(torch.rand(3, 64, 64))
        assert calls
        for hook in hooks:
            hook.remove()
        assert not any(module._forward_hooks for module in net.module.modules())

    def test_a_layer_that_is_not_there(self):
        with pytest.raises(ConfigError, match=r"unknown layer 'blocks\.9'.*blocks\.6"):
            features.FeatureExtractor(pretrained.build(), ["blocks.9"])

    def test_a_layer_that_gives_no_map(self):
        with pytest.raises(ConfigError, match=r"'classifier'.*no map"):
            features.FeatureExtractor(pretrained.build(), ["classifier"])(torch.rand(3, 64, 64))

    def test_an_activation_in_place_does_not_change_what_was_kept(self, tmp_path):
        net = squeezenet("1_1", tmp_path)
        picture = torch.rand(3, 64, 64)
        kept = features.FeatureExtractor(net, ["features.0", "features.3"])(picture)["features.0"]
        assert float(kept.min()) < 0  # before the ReLU that follows
        alone = features.FeatureExtractor(net, ["features.0"])(picture)["features.0"]
        torch.testing.assert_close(kept, alone)

    @pytest.mark.parametrize("name", ["timm:resnet18", "torchvision:mobilenet_v3_small", "torchvision:squeezenet1_0"])
    def test_default_layers_of_any_family(self, name, tmp_path):
        net = random_net(name, tmp_path)
        layers = features.default_style_layers(net)
        maps = features.FeatureExtractor(net, [*layers.style, layers.content])(torch.rand(3, 128, 128))
        heights = [maps[key].shape[1] for key in layers.style]
        assert len(heights) >= 3
        assert heights == sorted(heights, reverse=True)
        assert len(set(heights)) >= 3


def random_net(name, folder):
    from cvlab.models import zoo

    prefix, _, rest = name.partition(":")
    torch.manual_seed(0)
    net = zoo.build_timm(rest, num_classes=None) if prefix == "timm" else zoo.build_torchvision(rest, num_classes=1000)
    torch.save(net.state_dict(), folder / "weights.pth")
    return pretrained.build(name, str(folder / "weights.pth"))


def squeezenet(version, folder):
    return random_net(f"torchvision:squeezenet{version}", folder)


class TestScales:
    @pytest.mark.parametrize(("size", "count"), [(192, 1), (320, 1), (321, 2), (512, 2), (1024, 3), (2048, 4)])
    def test_as_many_as_the_picture_needs(self, size, count):
        found = style_transfer.make_scales(size, size * 3 // 4, None, 200)
        assert len(found) == count
        assert (found[-1].width, found[-1].end) == (size, 200)
        assert [scale.start for scale in found] == [0, *(scale.end for scale in found[:-1])]
        assert all(a.end - a.start >= b.end - b.start for a, b in itertools.pairwise(found))

    def test_fewer_steps_than_scales(self):
        found = style_transfer.make_scales(512, 512, 5, 2)
        assert [(scale.width, scale.start, scale.end) for scale in found] == [(256, 0, 1), (512, 1, 2)]


def test_bundled_painting_is_deterministic():
    sample_painting.cache_clear()
    first = np.asarray(sample_painting())
    sample_painting.cache_clear()
    assert np.array_equal(first, np.asarray(sample_painting()))
    assert first.std() > 40


def paint(cvlab, *words):
    code, out, err = cvlab("style", *words, *SHORT, "--json")
    assert code == 0, err
    return json.loads(out)


class TestCommand:
    def test_picture_previews_panel_and_animation(self, cvlab, tmp_path):
        found = paint(cvlab, "sample", "whirls")
        images = tmp_path / "runs" / found["run"].split("/")[-1] / "images"
        assert photos.load(images / "style.png").size == (41, 48)
        assert sorted(path.name for path in (images / "frames").iterdir()) == ["000000.png", "000003.png", "000006.png"]
        assert (images / "preview.png").read_bytes() == (images / "frames" / "000006.png").read_bytes()
        with Image.open(images / "style.gif") as animation:
            assert animation.n_frames == 3
        assert photos.load(images / "style-panel.png").width > 400
        row = found["results"][0]
        assert row["style_loss_reduction"] == found["metrics"]["style_loss_reduction"] > 1
        assert 0 < row["ssim"] < 1
        rows = [json.loads(line) for line in (images.parent / "metrics.jsonl").read_text().splitlines()]
        assert {"step", "loss", "content_loss", "style_loss", "tv_loss"} <= rows[-1].keys()

    def test_losses_of_the_file_can_be_found_again(self, cvlab, tmp_path):
        found = paint(cvlab, "sample", "whirls")
        metrics = found["metrics"]
        parts = ("content_loss", "style_loss", "tv_loss")
        assert metrics["loss"] == pytest.approx(sum(metrics[key] for key in parts))

    def test_style_starts_at_its_weight_in_every_layer(self):
        from cvlab.config import loading
        from cvlab.experiments.style import transfer as style_transfer

        transfer = style_transfer.prepare(loading.load("style", ["size=96", "scales=1"]).config)
        losses = transfer.objective(image_optimizer.ImageState([transfer.initial_values()]))
        assert float(losses["style_loss"]) == pytest.approx(4 * 2000, rel=1e-3)
        assert float(losses["content_loss"]) == pytest.approx(0, abs=1e-3)

    def test_keep_colors(self, cvlab, tmp_path):
        found = paint(cvlab, "sample", "whirls", "--keep-colors")
        picture = photos.to_tensor(photos.load(tmp_path / "runs" / found["run"].split("/")[-1] / "images/style.png"))
        photo = photos.to_tensor(
            photos.load(photos.find_images(["sample"])[0]).resize((41, 48), Image.Resampling.BICUBIC)
        )
        hue = picture - style.luminance(picture), photo - style.luminance(photo)
        assert float((hue[0] - hue[1]).abs().median()) < 0.01

    def test_several_styles_with_weights(self, cvlab, tmp_path):
        Image.effect_noise((64, 64), 90).convert("RGB").save("noise.png")
        one = paint(cvlab, "sample", "whirls", "noise.png", "--mix", "1,1e-9")
        two = paint(cvlab, "sample", "whirls")
        assert one["metrics"]["style_loss"] == pytest.approx(two["metrics"]["style_loss"], rel=1e-2)
        three = paint(cvlab, "sample", "whirls", "noise.png", "--mix", "0.5,0.5")
        assert abs(three["metrics"]["style_loss"] / two["metrics"]["style_loss"] - 1) > 1e-2

    def test_regions_change_their_own_part_only(self, cvlab, tmp_path):
        mask = np.zeros((600, 512), np.uint8)
        mask[:, :200] = 255
        Image.fromarray(mask).save("left.png")
        code, out, err = cvlab(
            *("style", "sample", "whirls", "--mask", "left.png", "size=96", "steps=30", "scales=1"),
            *("content_weight=3000", "expect=[]", "threads=1", "--json"),
        )
        assert code == 0, err
        path = tmp_path / "runs" / json.loads(out)["run"].split("/")[-1] / "images/style.png"
        picture = photos.to_tensor(photos.load(path))
        photo = photos.to_tensor(
            photos.load(photos.find_images(["sample"])[0]).resize((82, 96), Image.Resampling.BICUBIC)
        )
        changed = (picture - photo).abs().mean(0).mean(0)  # by column
        assert changed[:25].mean() > 1.5 * changed[45:].mean()

    @pytest.mark.parametrize("kind", ["content", "noise"])
    def test_texture_and_noise(self, cvlab, kind):
        words = ("content=null", "init=noise") if kind == "noise" else ("init=noise",)
        code, out, err = cvlab("run", "style", *words, *SHORT, "--json")
        assert code == 0, err
        metrics = json.loads(out)["metrics"]
        assert metrics["style_loss_reduction"] > 1
        assert ("ssim" in metrics) == (kind == "content")

    def test_normalised_pixels(self, cvlab):
        words = ("space=normalized", "lr=0.2", "scaling=absolute", "tv_weight=0.01")
        code, out, err = cvlab("run", "style", *SHORT, *words, "--json")
        assert code == 0, err
        assert json.loads(out)["metrics"]["style_loss_reduction"] > 1.1

    @pytest.mark.parametrize("kind", ["adam", "scales"])
    def test_stopped_and_resumed_it_ends_with_the_same_bits(self, cvlab, tmp_path, monkeypatch, kind):
        words = {"scales": ("scales=2",), "adam": ()}[kind]
        arguments = ("run", "style", *SHORT, *words, "seed=1", "--json")
        whole = json.loads(cvlab(*arguments)[1])
        real = image_optimizer._ImageOptimizer._stop_if_set

        def stopping(optimizer, stop):
            if optimizer.step == 4:
                optimizer.checkpointer.save()
                raise KeyboardInterrupt
            real(optimizer, stop)

        monkeypatch.setattr(image_optimizer._ImageOptimizer, "_stop_if_set", stopping)
        cvlab(*arguments)
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)
        code, out, err = cvlab("resume", "latest", "--json")
        assert code == 0, err
        assert "resumed" in err, err
        again = json.loads(out)
        folders = [tmp_path / "runs" / found["run"].split("/")[-1] / "images" for found in (whole, again)]
        assert folders[0] != folders[1]
        assert (folders[0] / "style.png").read_bytes() == (folders[1] / "style.png").read_bytes()
        assert (folders[0] / "style.gif").read_bytes() == (folders[1] / "style.gif").read_bytes()


class TestRefusals:
    @pytest.mark.parametrize(
        ("words", "code", "says"),
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
    def test_in_one_line(self, cvlab, words, code, says):
        Image.new("L", (512, 600)).save("black.png")
        Image.new("L", (600, 200), 255).save("wide.png")
        got, out, err = cvlab("style", *words)
        assert got == code, err
        assert says in err, err
        assert "Traceback" not in err
        assert not out

    def test_a_preset_whose_weights_are_not_there_says_how_to_get_them(self, cvlab, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        code, _, err = cvlab("style", "sample", "whirls", "--preset", "scream")
        assert code == 4
        assert "models fetch" in err


@pytest.mark.parametrize("preset", ["composition_vii", "scream", "starry_night"])
def test_the_courses_presets_run_with_weights_from_a_file(cvlab, tmp_path, preset):
    squeezenet("1_1", tmp_path)
    code, out, err = cvlab(
        *("style", "sample", "whirls", "--preset", preset, "--weights", "weights.pth", "size=48", "steps=3"),
        *("style_size=48", "expect=[]", "--json"),
    )
    assert code == 0, err
    assert json.loads(out)["metrics"]["width"] == 48  # the shorter side


def test_inversion_writes_a_picture_for_each_layer(cvlab, tmp_path):
    code, out, err = cvlab(
        "run", "feature_inversion", "layers=[blocks.0,blocks.2]", "steps=30", "expect=[psnr_db/blocks.0>=12]", "--json"
    )
    assert code == 0, err
    found = json.loads(out)
    rows = found["results"]
    assert [row["layer"] for row in rows] == ["blocks.0", "blocks.2"]
    assert found["metrics"]["psnr_db_first"] == found["metrics"]["psnr_db/blocks.0"] > found["metrics"]["psnr_db_last"]
    for row in rows:
        picture = photos.load(tmp_path / "runs" / found["run"].split("/")[-1] / row["image"])
        assert picture.size == (224, 224)


def test_inversion_refuses_a_layer_twice(cvlab):
    code, _, err = cvlab("run", "feature_inversion", "layers=[blocks.0,blocks.0]")
    assert code == 2
    assert "each once" in err
