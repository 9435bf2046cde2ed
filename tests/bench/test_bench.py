"""The measurements have the form that they promise; what they measure is this machine's own affair."""

import json

import pytest

from cvlab.bench import machine, profiler, training
from cvlab.cli import bench
from cvlab.config import loading
from cvlab.experiments.classification import throughput

TEXT = """experiment: classify
data: {name: scenes10}
model: {name: whiten_net, widths: [8, 8], activation: silu}
optimizer: {name: muon, lr: 0.1}
batch_size: 16
duration: {steps: 4}
augment: {flip: alternating, translate_px: 1, cutout_px: 4}
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "b.yaml").write_text(TEXT)
    return "b.yaml"


def test_engine(file, cvlab):
    code, out, err = cvlab("bench", "engine", file, "--rounds", 2, "--steps", 2, "--json")
    found = json.loads(out)
    assert code == 0, err
    assert [len(row["seconds"]) for row in found["loops"]] == [2, 2, 2]
    assert found["loops"][0]["loop"] == "fit"
    assert all(row["images_per_second"] > 0 for row in found["loops"])
    assert found["fit_against_bare"] > 0
    code, out, _ = cvlab("bench", "engine", file, "--rounds", 1, "--steps", 1)
    assert code == 0
    assert "float32, contiguous" in out
    assert training.REFERENCE in loading.shipped_names(), "what is measured unless a configuration is named"


def test_profile(file, cvlab):
    code, out, err = cvlab("bench", "profile", file, "--steps", 2, "--json")
    found = json.loads(out)["shares"]
    assert code == 0, err
    assert sum(found.values()) == pytest.approx(1)
    assert {"convolution", "normalization", "activation", "pooling", "data", "optimizer"} <= set(found)
    assert all(share > 0 for share in found.values())


def test_what_cannot_be_measured(cvlab):
    code, _, err = cvlab("bench", "engine", "cifar_optimizers")
    assert code == 2
    assert "not a training run of a classifier" in err
    assert cvlab("bench", "engine", "nosuch")[0] == 2


def test_the_whole(cvlab, monkeypatch):
    monkeypatch.setattr(machine, "MATRIX", 64)
    monkeypatch.setattr(machine, "COPIED_FLOATS", 1000)
    monkeypatch.setattr(throughput, "MEASURED_SECONDS", 0.01)
    monkeypatch.setattr(loading, "shipped_names", lambda: ["quickstart", "cifar_optimizers", "cifar_bn"])
    code, out, err = cvlab("bench", "--rounds", 1, "--json")
    found = json.loads(out)
    assert code == 0, err
    assert found["machine"]["product_gflops"]["float32"] > 0
    assert found["machine"]["copy_gb_per_second"] > 0
    assert [row["config"] for row in found["configs"]] == ["quickstart", "cifar_bn"]
    code, out, _ = cvlab("bench", "--rounds", 1)
    assert code == 0
    assert "share of convolutions" in out


def test_flops_of_an_image_are_those_of_its_layers(monkeypatch):
    """Three convolutions and a linear layer, forward and twice backward, the first without its input's gradient."""
    monkeypatch.setattr(throughput, "MEASURED_SECONDS", 0.01)
    machine = {"convolution_gflops": {"float32": 1.0, "bfloat16": 1.0}}
    row = training.every_config(machine, "cpu", ("quickstart",))[0]
    convolutions = [3 * 16 * 9 * 32**2, 16 * 32 * 9 * 16**2, 32 * 64 * 9 * 8**2]
    products = 3 * (sum(convolutions) + 64 * 16 * 10) - convolutions[0]
    assert row["mflop_per_image"] == pytest.approx(2 * products / 1e6)
    assert row["share"] == pytest.approx(row["gflop_per_second"])


def test_what_a_profile_counts_as_what():
    class Event:
        def __init__(self, name, parent=None):
            self.name, self.cpu_parent = name, parent

    step = Event("Optimizer.step#Muon.step")
    assert profiler.kind_of(Event("aten::mm", step)) == "optimizer"
    assert profiler.kind_of(Event("aten::flip", Event("aten::x", Event(profiler.DATA)))) == "data"
    assert profiler.kind_of(Event("aten::mkldnn_convolution")) == "convolution"
    assert profiler.kind_of(Event("aten::native_batch_norm_backward")) == "normalization"
    assert profiler.kind_of(Event("aten::add")) == "everything else"


def test_the_command_has_all_of_them():
    assert {command.name for command in bench.app.registered_commands} == {"engine", "profile", "processes"}
