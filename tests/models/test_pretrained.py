"""Pretrained models: the bundled one, others with weights from files, and rejected files."""

import hashlib

import pytest
import torch
from torch import nn

from cvlab import _compat
from cvlab.data import imagenet, photo_paths, photos
from cvlab.errors import ConfigError, DataError
from cvlab.models import names, nanodet, pretrained, weights
from cvlab.models.efficientnet import EfficientNetLite
from cvlab.storage import download
from tests.fake_cifar import send, server
from tests.models.random_models import random_model


def test_bundled_model_classifies_a_photo():
    model = pretrained.build()
    view = photos.to_tensor(model.transform(photos.load(photo_paths.find_images(["sample"])[0])))[None]
    with torch.inference_mode():
        p = model.probabilities(view)[0]
    top = [model.classes[k] for k in p.topk(5).indices]
    assert "academic gown" in top
    assert "military uniform" in top
    assert len(model.classes) == 1000
    assert p.sum().item() == pytest.approx(1, abs=1e-5)
    assert (model.transform.size_px, model.transform.resize_px, model.transform.filter) == (224, 256, "bicubic")


def test_random_numbers_do_not_depend_on_the_cache():
    random_numbers = []
    pretrained.build.cache_clear()
    for _ in range(2):
        torch.manual_seed(0)
        pretrained.build()
        random_numbers.append(torch.rand(3))
    assert torch.equal(*random_numbers)


def test_folded_batchnorm_keeps_the_logits():
    original = _compat.timm().create_model("tf_efficientnet_lite0").eval()
    state_dict = weights.read_state_dict(weights.path_by_pip())
    original.load_state_dict(dict(zip(original.state_dict(), state_dict.values(), strict=True)))
    folded = pretrained.fold_batchnorm(original.requires_grad_(False), 224)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in folded.modules())
    x = torch.rand(2, 3, 224, 224)
    torch.testing.assert_close(folded(x), original(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["efficientnet_lite0", names.NANODET])
def test_folding_keeps_the_logits_of_bundled_networks(name):
    pretrained.build.cache_clear()
    folded = pretrained.build(name).module.model
    original = EfficientNetLite(name) if name in names.BY_PIP else nanodet.CspBackbone()
    pretrained.load_weights(original, name)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in folded.modules())
    x = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(folded(x), original.eval()(x), rtol=1e-3, atol=1e-3)


def test_folding_is_skipped_if_it_changes_the_logits():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.last = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)
            self.norm.running_mean.fill_(2.0)

        def forward(self, x):
            return self.last(self.first(self.norm(x))).mean((2, 3))

    model = Odd().eval().requires_grad_(False)
    assert pretrained.fold_batchnorm(model, 8) is model


@pytest.mark.parametrize(
    "name", ["torchvision:squeezenet1_0", "torchvision:resnet18", "timm:resnet10t", "timm:vit_tiny_patch16_224"]
)
def test_other_models_load_weights_from_a_file(name, tmp_path):
    prefix, _, model_name = name.partition(":")
    torch.manual_seed(0)
    build = _compat.timm().create_model if prefix == "timm" else _compat.torchvision().models.get_model
    original = build(model_name)
    torch.save(
        {"state_dict": {f"module.{key}": value for key, value in original.state_dict().items()}}, tmp_path / "w.pth"
    )
    model = pretrained.build(name, str(tmp_path / "w.pth"))
    x = torch.rand(2, 3, model.transform.size_px, model.transform.size_px)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in _normalization(prefix, model_name))
    torch.testing.assert_close(model.module(x), original.eval()((x - mean) / std), rtol=1e-3, atol=1e-3)
    assert model.classes == imagenet.labels()


def _normalization(prefix, name):
    if prefix == "timm":
        config = _compat.timm().get_pretrained_cfg(name)
        return config.mean, config.std
    transform = _compat.torchvision().models.get_model_weights(name).DEFAULT.transforms()
    return transform.mean, transform.std


@pytest.mark.parametrize(
    ("name", "error", "text"),
    [
        ("resnet50", ConfigError, "unknown model 'resnet50'"),
        ("timm:", ConfigError, "unknown model"),
        ("timm:resnet5O", ConfigError, "did you mean 'resnet50'"),
        ("torchvision:resnet19", ConfigError, "did you mean"),
        ("timm:resnet50", DataError, "not on the disk; `cvlab models fetch timm:resnet50`"),
        ("torchvision:resnet50", DataError, "`cvlab models fetch torchvision:resnet50` gets them"),
        ("torchvision:fcn_resnet50", ConfigError, "unknown torchvision model"),
    ],
)
def test_unknown_names_and_missing_weights(name, error, text, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(error, match=text):
        pretrained.build(name)


class Evil:
    def __reduce__(self):
        import os

        return os.system, ("touch canary",)


def test_damaged_weights_are_rejected(tmp_path):
    cases = {
        "text.pth": b"hello",
        "text.safetensors": b"hello",
        "empty.pth": b"",
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
    torch.save({"a": Evil()}, tmp_path / "evil.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pth")
    for name in [*cases, "evil.pth", "list.pth", "gone.pth"]:
        with pytest.raises(DataError, match=name) as error:
            weights.read_state_dict(tmp_path / name)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "canary").exists()
    for name in (None, "torchvision:resnet18"):
        with pytest.raises(DataError, match=r"other\.pth: not the weights"):
            pretrained.build(*([name] if name else [names.DEFAULT_MODEL]), str(tmp_path / "other.pth"))


def test_weights_are_fetched_and_verified(monkeypatch, tmp_path):
    model = _compat.torchvision().models.get_model("squeezenet1_0")
    torch.save(model.state_dict(), tmp_path / "w.pth")
    content = (tmp_path / "w.pth").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    monkeypatch.setenv("CVLAB_DATA", str(tmp_path / "data"))
    monkeypatch.delenv("CVLAB_OFFLINE")
    target = tmp_path / "data" / "weights" / f"squeezenet1_0-{digest[:8]}.pth"
    with server(lambda handler: send(handler, content)) as (url, _):
        monkeypatch.setattr(weights, "_source", lambda name: (f"{url}/{target.name}", target))
        monkeypatch.setattr(download, "published_size_and_sha256", lambda url: (len(content), None))
        assert weights.fetch("torchvision:squeezenet1_0") == target
    assert target.read_bytes() == content
    target.unlink()
    damaged = content[:-1] + b"!"
    with server(lambda handler: send(handler, damaged)) as (url, _), pytest.raises(DataError, match="sha256"):
        weights.fetch("torchvision:squeezenet1_0")
    assert not target.exists()
    assert weights.fetch("torchvision:squeezenet1_0", tmp_path / "w.pth") == target


def test_sources_of_weights():
    url, path = weights._source("torchvision:squeezenet1_1")
    assert url.startswith("https://download.pytorch.org/")
    assert path.name == "squeezenet1_1-b8a52dc0.pth"
    url, path = weights._source("timm:resnet50.a1_in1k")
    assert url == "https://huggingface.co/timm/resnet50.a1_in1k/resolve/main/model.safetensors"
    assert path.name == "resnet50.a1_in1k.safetensors"
    for name in ("efficientnet_lite0", "timm:resnet5O", "torchvision:x"):
        with pytest.raises(ConfigError):
            weights._source(name)


def test_nothing_is_fetched_offline(monkeypatch, tmp_path):
    monkeypatch.setenv("CVLAB_DATA", str(tmp_path))
    with pytest.raises(DataError, match="CVLAB_OFFLINE is set"):
        weights.fetch("torchvision:squeezenet1_1")


def test_size_and_checksum_published_by_a_server():
    def respond(handler):
        handler.send_response(302)
        handler.send_header("Location", "http://localhost:1/elsewhere")
        handler.send_header("X-Linked-Size", "123")
        handler.send_header("X-Linked-ETag", '"' + "ab" * 32 + '"')
        handler.end_headers()

    with server(respond) as (url, _):
        assert download.published_size_and_sha256(f"{url}/model.safetensors") == (123, "ab" * 32)


def test_classes_by_name_and_by_number():
    model = pretrained.build()
    assert model.class_index("ostrich") == 9
    two_classes = pretrained.PretrainedClassifier("mine", model.module, model.transform, ("class 0", "class 1"))
    assert two_classes.class_index("1") == 1
    with pytest.raises(ConfigError, match="2 classes: class 0, class 1"):
        two_classes.class_index("2")


WRAPPINGS = {
    "plain": lambda tensors: tensors,
    "state_dict": lambda tensors: {"epoch": 3, "state_dict": tensors, "optimizer": {"state": {}}},
    "model": lambda tensors: {"model": tensors},
    "model_state_dict": lambda tensors: {"model_state_dict": tensors, "loss": 0.5},
    "net": lambda tensors: {"net": tensors, "acc": 90.0, "epoch": 7},
    "nested": lambda tensors: {"state": 1, "model": {"state_dict": tensors}},
}
PREFIXES = ("", "module.", "_orig_mod.", "model.", "net.", "module._orig_mod.", "_orig_mod.module.", "model._orig_mod.")


@pytest.fixture(scope="module")
def squeezenet():
    from cvlab.models import zoo

    return zoo.build_torchvision("squeezenet1_1", num_classes=1000)


def _classify_noise(path):
    images = torch.rand((1, 3, 224, 224), generator=torch.Generator().manual_seed(0))
    pretrained.build.cache_clear()
    return pretrained.build("torchvision:squeezenet1_1", str(path)).probabilities(images)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_checkpoints_of_training_code_are_unwrapped(squeezenet, tmp_path, wrapping, prefix):
    from cvlab.models import weights

    expected = squeezenet.state_dict()
    tensors = {f"{prefix}{name}": tensor for name, tensor in expected.items()}
    if prefix:
        tensors["criterion.weight"] = torch.ones(3)  # belongs to another part of the training code
    torch.save(WRAPPINGS[wrapping](tensors), tmp_path / "a.pth")
    loaded = weights.match_names(weights.read_state_dict(tmp_path / "a.pth"), expected)
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("average", "weights_key"), [("state_dict_ema", "state_dict"), ("model_ema", "model"), ("ema", "model_state_dict")]
)
def test_the_moving_average_is_preferred_and_logged(squeezenet, tmp_path, capsys, average, weights_key):
    averaged = {name: tensor + 0.01 for name, tensor in squeezenet.state_dict().items()}
    last_weights = {f"module.{name}": tensor for name, tensor in squeezenet.state_dict().items()}
    torch.save(
        {weights_key: last_weights, average: {f"module.{k}": v for k, v in averaged.items()}}, tmp_path / "both.pth"
    )
    torch.save(averaged, tmp_path / "average.pth")
    assert torch.equal(_classify_noise(tmp_path / "both.pth"), _classify_noise(tmp_path / "average.pth"))
    assert f"both.pth: taking {average!r}, the moving average of the weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    "args", [("classify",), ("saliency",), ("attack",), ("classvis", "targets=[1]"), ("classify", "--dry-run")]
)
def test_a_model_without_a_classifier_is_rejected_with_a_one_line_error(cvlab, tmp_path, args):
    name = "timm:eva02_tiny_patch14_224"  # its weights are published without a classifier
    assert random_model(name, tmp_path).classes == ()
    photo = [] if args[0] == "classvis" else ["sample"]
    code, _, err = cvlab(args[0], *photo, *args[1:], f"model={name}", f"weights={tmp_path / 'weights.pth'}")
    assert code == 2, err
    line = f"model {name}: has no classifier, its outputs are features; name a model that classifies"
    assert line in err
    assert "Traceback" not in err
