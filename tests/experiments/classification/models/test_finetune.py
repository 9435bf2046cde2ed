"""Fine-tuning of networks of timm and torchvision: pretrained weights, frozen stages, learning rates by depth."""

import json

import pytest
import torch

from cvlab import _compat
from cvlab.engine import optimizers
from cvlab.errors import ConfigError, DataError
from cvlab.experiments.classification.models import finetune
from cvlab.models import pretrained, zoo
from tests.experiments.classification.test_photos import read_rows, scene_photos

NAMES = ("timm:resnet10t", "timm:test_vit", "timm:mobilenetv3_small_050", "torchvision:squeezenet1_1")


def build(name, **arguments):
    """Build a model for three classes from a file with pretrained weights."""
    library, _, model_name = name.partition(":")
    builder = finetune.timm_model if library == "timm" else finetune.torchvision_model
    return builder(model_name, num_classes=3, **arguments)


@pytest.fixture
def weights_file(tmp_path):
    """Return a function that writes random weights of a model with ImageNet's classes, and returns the path."""

    def write(name):
        library, _, model_name = name.partition(":")
        torch.manual_seed(1)
        model = (
            zoo.build_timm(model_name, num_classes=None)
            if library == "timm"
            else zoo.build_torchvision(model_name, num_classes=1000)
        )
        for buffer in model.buffers():
            if buffer.is_floating_point():
                torch.nn.init.uniform_(buffer, 0.5, 1.5)
        path = tmp_path / f"{model_name}.pth"
        torch.save(model.state_dict(), path)
        return str(path)

    return write


@pytest.mark.parametrize("name", NAMES)
def test_all_weights_except_the_classifier_are_pretrained(name, weights_file):
    file = weights_file(name)
    pretrained_weights, loaded = torch.load(file, weights_only=True), build(name, weights=file).state_dict()
    different = [key for key, value in loaded.items() if not torch.equal(value, pretrained_weights[key])]
    different = [key for key in different if loaded[key].is_floating_point()]
    classifier = finetune._classifiers(build(name))
    assert different
    assert all(key.startswith(classifier) for key in different), different
    size = pretrained.preprocessing(name).transform.size_px
    assert build(name, weights=file).eval()(torch.rand(2, 3, size, size)).shape == (2, 3)


@pytest.mark.parametrize("name", NAMES)
def test_frozen_stages_do_not_change(name, weights_file):
    model = build(name, weights=weights_file(name), freeze=2).train()
    groups = finetune._stages(build(name), finetune._classifiers(model))
    frozen = [stage for group in groups[:2] for stage in group]
    root_parameters = [key for key, _ in model.named_parameters(recurse=False)]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    size = pretrained.preprocessing(name).transform.size_px
    model(torch.rand(4, 3, size, size)).square().sum().backward()
    optimizer.step()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed
    assert not [
        key for key in changed if key in root_parameters or key.startswith(tuple(f"{stage}." for stage in frozen))
    ]
    assert any(key.startswith(finetune._classifiers(model)) for key in changed)


def test_everything_but_the_classifier_can_be_frozen(weights_file):
    count = len(finetune._stages(build("timm:test_vit"), ("head",)))
    model = build("timm:test_vit", freeze=count)
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    assert trained == {"head.weight", "head.bias"}
    with pytest.raises(
        ConfigError, match=rf"model.freeze {count + 1}: timm:test_vit has {count} stages; at most {count}"
    ):
        build("timm:test_vit", freeze=count + 1)


@pytest.mark.parametrize("name", NAMES)
def test_the_learning_rate_of_each_stage_is_a_fraction_of_the_next_one(name):
    model = build(name, layer_decay=0.5)
    optimizer = optimizers.build_optimizer("adamw", model, {"lr": 1.0})
    rate_of = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    groups = finetune._stages(model, finetune._classifiers(model))
    assert len(rate_of) == len(list(model.parameters()))
    for key, parameter in model.named_parameters():
        inside = [k for k, group in enumerate(groups) for stage in group if key.startswith(f"{stage}.")]
        depth = len(groups) - inside[0] if inside else None
        if key.startswith(finetune._classifiers(model)):
            depth = 0
        elif "." not in key:  # position embeddings
            depth = len(groups)
        assert rate_of[id(parameter)] == pytest.approx(0.5**depth), key


def test_weights_of_another_network_give_a_one_line_error(weights_file, tmp_path):
    with pytest.raises(DataError, match=r"resnet10t\.pth: not the weights of timm:test_vit: lacks .*; check the name"):
        build("timm:test_vit", weights=weights_file("timm:resnet10t"))
    with pytest.raises(
        DataError, match=r"timm:resnet18: its weights are not on the disk; `cvlab models fetch timm:res"
    ):
        build("timm:resnet18", weights="auto")
    with pytest.raises(DataError, match="no such file"):
        build("timm:resnet18", weights=str(tmp_path / "gone.pth"))


def test_fetched_weights_are_found(weights_file, tmp_path, monkeypatch):
    monkeypatch.setenv("CVLAB_DATA", str(tmp_path / "data"))
    name = "timm:resnet10t"
    file = weights_file(name)
    tag = _compat.timm().get_pretrained_cfg("resnet10t").tag
    target = tmp_path / "data" / "weights" / f"resnet10t.{tag}.safetensors"
    target.parent.mkdir(parents=True)
    from safetensors.torch import save_file

    save_file(torch.load(file, weights_only=True), target)
    model = build(name, weights="auto")
    assert torch.equal(model.conv1[0].weight, torch.load(file, weights_only=True)["conv1.0.weight"])


def test_a_model_trained_on_photos_works_without_the_weights_file(weights_file, data_root, tmp_path, cvlab):
    name = "timm:test_vit"
    file = tmp_path / "test_vit.pth"
    weights_file(name)
    scene_photos(tmp_path / "photos", 8, data_root)
    model = "model={name: 'timm:test_vit', weights: test_vit.pth, freeze: 1, layer_decay: 0.7}"
    options = ("data.path=photos", model, "data.test_fraction=0.2", "duration={steps: 4}", "batch_size=4", "threads=1")
    code, _, err = cvlab("train", "photos", *options)
    assert code == 0, err
    (run,) = (tmp_path / "runs").glob("2*")
    metadata = json.loads((run / "classifier.json").read_text())
    expected = pretrained.preprocessing(name)
    assert metadata["mean"] == pytest.approx(expected.mean)
    assert metadata["std"] == pytest.approx(expected.std)
    assert metadata["transform"]["size_px"] == expected.transform.size_px
    file.unlink()
    rows = {row["image"]: row for row in read_rows(run / "predictions-test.csv")}
    code, out, err = cvlab("classify", *[f"photos/{image}" for image in rows], "--model", "latest", "--json")
    assert code == 0, err
    for row, result in zip(rows.values(), json.loads(out)["results"], strict=True):
        assert result["label"] == row["prediction"]
        assert result["score"] == pytest.approx(float(row["probability_1"]), abs=1e-5)
    assert cvlab("eval", "latest")[0] == 0
    assert cvlab("export", "latest", "--to", "safetensors")[0] == 0


def test_invalid_weights_leave_no_run(weights_file, data_root, tmp_path, cvlab):
    weights_file("timm:resnet10t")
    scene_photos(tmp_path / "photos", 4, data_root)
    model = "model={name: 'timm:test_vit', weights: resnet10t.pth}"
    code, _, err = cvlab("train", "photos", "data.path=photos", model, "batch_size=4")
    assert code == 4
    assert err.strip().splitlines()[-1].startswith("error: ")
    assert "not the weights of timm:test_vit" in err
    assert not (tmp_path / "runs").exists()


def test_the_image_size_is_determined_by_the_backbone(cvlab, tmp_path):
    code, _, err = cvlab("config", "photos", "data.image_px=64")
    assert code == 2
    assert "data.image_px: the images of model: pretrained have the size that its backbone takes" in err
