"""The benchmarks return the documented keys; the numbers depend on the machine and are not tested."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cvlab.bench import machine, profiler, steps, training
from cvlab.cli import bench
from cvlab.config import loading
from cvlab.engine import loop

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
    result = json.loads(out)
    assert code == 0, err
    assert [len(row["seconds"]) for row in result["loops"]] == [2, 2, 2]
    assert result["loops"][0]["loop"] == "fit"
    assert all(row["images_per_second"] > 0 for row in result["loops"])
    assert result["fit_against_bare"] > 0
    code, out, _ = cvlab("bench", "engine", file, "--rounds", 1, "--steps", 1)
    assert code == 0
    assert "float32, contiguous" in out
    assert training.REFERENCE in loading.shipped_names(), "the default configuration of the benchmark"


def test_profile(file, cvlab):
    code, out, err = cvlab("bench", "profile", file, "--steps", 2, "--json")
    shares = json.loads(out)["shares"]
    assert code == 0, err
    assert sum(shares.values()) == pytest.approx(1)
    assert {"convolution", "normalization", "activation", "pooling", "data", "optimizer"} <= set(shares)
    assert all(share > 0 for share in shares.values())


def test_configurations_that_cannot_be_measured_are_rejected(cvlab):
    code, _, err = cvlab("bench", "engine", "cifar_optimizers")
    assert code == 2
    assert "not a training run of a classifier" in err
    assert cvlab("bench", "engine", "nosuch")[0] == 2


@pytest.fixture
def quick(monkeypatch):
    """Keep the measurements short."""
    monkeypatch.setattr(machine, "MATRIX", 64)
    monkeypatch.setattr(machine, "COPIED_FLOATS", 1000)
    monkeypatch.setattr(steps, "MAX_SECONDS", 0.01)


def test_all_shipped_configurations_are_measured_unless_too_slow(cvlab, monkeypatch, tmp_path, quick):
    names = ["quickstart", "cifar_optimizers", "cifar_bn", "cifar_fc_overfit_3", "attack"]
    monkeypatch.setattr(loading, "shipped_names", lambda: names)
    monkeypatch.setattr(steps, "_estimated_floor", lambda loaded, _: 20.0 * loaded.source.name.startswith("cifar_bn"))
    code, out, err = cvlab("bench", "--rounds", 1, "--out", tmp_path / "a.json", "--json")
    result = json.loads(out)
    assert code == 0, err
    assert json.loads((tmp_path / "a.json").read_text()) == result
    assert result["machine"]["product_gflops"]["float32"] > 0
    assert result["machine"]["copy_gb_per_second"] > 0
    assert [row["config"] for row in result["rows"]] == ["quickstart", "cifar_fc_overfit_3"]
    assert result["not_measured"] == [
        {"config": "cifar_bn", "reason": "a step takes 20 s or more; raise --seconds, or name it"}
    ]
    for row in result["rows"]:
        floor = max(row["flop_seconds"], row["byte_seconds"])
        assert row["share"] == pytest.approx(floor / row["step_seconds"])
        assert row["bound"] == ("FLOPs" if floor == row["flop_seconds"] else "bytes")
        assert row["timed_steps"] >= 1
    code, out, _ = cvlab("bench", "cifar_bn", "--rounds", 1)  # a configuration that is named is measured
    assert code == 0
    assert "cifar_bn" in out  # in the table, or in a list if the table is too wide
    assert "not measured" not in out


@pytest.mark.parametrize("name", ["yolo_fruit", "caption_flickr8k_lstm", "photos"])
def test_the_final_epochs_have_a_separate_row(name, quick):
    overrides = {
        "yolo_fruit": ["batch_size=2", "size=64", "finetune_epochs=2"],
        "caption_flickr8k_lstm": ["batch_size=2", "size=64", "reward_epochs=2"],
        "photos": ["batch_size=2", "model.finetune_epochs=2", "model.views=1"],
    }
    loaded = loading.load(name, overrides[name])
    rows = list(steps.measure(name, loaded, steps.Rates(1, "cpu"), 1.0))
    assert [row.phase for row in rows] == ["", loaded.config.final_phase[0]]
    assert rows[0].flops < rows[1].flops


def test_flops_are_the_sum_over_the_layers(quick):
    """Three convolutions and a linear layer: forward, two products backward; no input gradient in the first."""
    row = steps.run(("quickstart",), 1, 1.0, "cpu")["rows"][0]
    convolutions = [3 * 16 * 9 * 32**2, 16 * 32 * 9 * 16**2, 32 * 64 * 9 * 8**2]
    products = 3 * (sum(convolutions) + 64 * 16 * 10) - convolutions[0]
    assert row["flops"] == 2 * products * row["items"]


@pytest.mark.parametrize(("cell", "gates"), [("rnn", 1), ("lstm", 4)])
def test_flops_of_recurrent_layers_are_the_sum_over_their_matrices(cell, gates):
    module = {"rnn": nn.RNN, "lstm": nn.LSTM}[cell](5, 7)
    x, *state = (torch.randn(n, 2, size, requires_grad=True) for n, size in ((3, 5), (1, 7), (1, 7)))
    with FlopCounterMode(display=False, custom_mapping=steps.FUSED) as counter:
        module(x, state[0] if cell == "rnn" else tuple(state))[0].sum().backward()
    assert counter.get_total_flops() == 3 * 2 * (3 * 2) * gates * 7 * (5 + 7)


def test_flops_of_attention():
    query = torch.randn(2, 3, 4, 8, requires_grad=True)
    with FlopCounterMode(display=False, custom_mapping=steps.FUSED) as counter:
        F.scaled_dot_product_attention(query, query, query).sum().backward()
    forward = 2 * 2 * 3 * 2 * 4 * 4 * 8
    assert counter.get_total_flops() in (3 * forward, 3.5 * forward)  # 3.5 if the backward pass recomputes the scores


def test_bytes_of_a_linear_layer():
    model = nn.Linear(10, 3, bias=False)
    saved = steps.SavedTensors(SimpleNamespace(loss_fn=lambda model, batch: {"loss": model(batch).sum()}))
    state = loop.TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), ema_decay=0.9)
    saved.loss_fn(model, torch.randn(4, 10))["loss"].backward()
    state.optimizer.step()
    assert saved.bytes == 4 * 10 * 4  # the input; the weight is not counted
    weights = 3 * 10 * 4
    assert steps.min_bytes(state, saved.bytes) == (6 + 2 + 2) * weights + 2 * saved.bytes


def test_comparison(cvlab, tmp_path):
    row = {"config": "c", "phase": "", "precision": "float32", "items": 10, "step_seconds": 1.0, "share": 0.5}
    machine_info = {"host": "h", "cpu": "p", "gpu": None, "threads": 2, "torch": "2", "copy_gb_per_second": 4.0}
    a = {"machine": machine_info | {"product_gflops": {"float32": 10.0}}, "rows": [row, row | {"phase": "finetune"}]}
    b = {
        "machine": machine_info | {"product_gflops": {"float32": 20.0, "bfloat16": 9.0}, "threads": 4},
        "rows": [row | {"items": 20, "step_seconds": 3.0, "precision": "bfloat16"}, row | {"config": "d"}],
    }
    for name, document in (("a.json", a), ("b.json", b)):
        (tmp_path / name).write_text(json.dumps(document))
    code, out, _ = cvlab("bench", "compare", tmp_path / "a.json", tmp_path / "b.json", "--json")
    comparison = json.loads(out)
    assert code == 0
    assert [row["ratio"] for row in comparison["rows"]] == [pytest.approx(1.5)]
    assert comparison["differences"] == {"threads": [2, 4]}
    assert comparison["rates"] == {"products, float32": 2.0, "copies": 1.0}
    assert (comparison["only_a"], comparison["only_b"]) == (["c finetune"], ["d"])
    _, out, _ = cvlab("bench", "compare", tmp_path / "a.json", tmp_path / "b.json")
    assert "the machines differ in threads: 2, 4" in out
    assert "c (float32, bfloat16)" in out
    assert "only in a.json: c finetune" in out


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"machine": {}, "rows": [{"config": "c"}]}', "\udcff"])
def test_comparing_files_that_are_not_results_is_an_error(text, cvlab, tmp_path):
    (tmp_path / "a.json").write_bytes(text.encode(errors="surrogateescape"))
    code, _, err = cvlab("bench", "compare", tmp_path / "a.json", tmp_path / "a.json")
    assert code == 4
    assert err.startswith("error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cifar_optimizers",), "does not train a model by itself"),
        (("nosuch",), "unknown configuration 'nosuch'"),
        (("profil",), "unknown command 'profil'; did you mean 'profile'?"),
        (("cifar_bn", "--out", "nosuch/a.json"), "no folder nosuch"),
    ],
)
def test_steps_that_cannot_be_measured(arguments, message, cvlab):
    code, _, err = cvlab("bench", *arguments)
    assert code == 2
    assert message in err


def test_distances_with_two_one_and_no_loops(cvlab):
    code, out, err = cvlab("bench", "knn", "--test", 3, "--train", 4, "--rounds", 1, "--json")
    loops = json.loads(out)["loops"]
    assert code == 0, err
    assert [row["loop"] for row in loops] == ["two loops", "one loop", "no loops", "torch.cdist"]
    assert all(row["seconds"] > 0 for row in loops)
    assert all(row["largest_error"] < 0.01 for row in loops[:3])  # cdist itself is less exact for few vectors


def test_kinds_of_profiled_operations():
    class Event:
        def __init__(self, name, parent=None):
            self.name, self.cpu_parent = name, parent

    step = Event("Optimizer.step#Muon.step")
    assert profiler.kind_of(Event("aten::mm", step)) == "optimizer"
    assert profiler.kind_of(Event("aten::flip", Event("aten::x", Event(profiler.DATA)))) == "data"
    assert profiler.kind_of(Event("aten::mkldnn_convolution")) == "convolution"
    assert profiler.kind_of(Event("aten::native_batch_norm_backward")) == "normalization"
    assert profiler.kind_of(Event("aten::add")) == "everything else"


def test_the_subcommands_of_bench():
    assert {command.name for command in bench.app.registered_commands} == {
        *("steps", "compare", "engine", "profile", "processes", "knn"),
    }
