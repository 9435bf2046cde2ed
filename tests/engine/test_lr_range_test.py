"""The learning-rate range test: suggestions on known curves, divergence, the command and its run directory."""

import itertools
import json
import math

import pytest
import torch
from torch import nn

from cvlab.engine import lr_range_test
from cvlab.engine.lr_range_test import RangeTest, Suggestions
from cvlab.engine.task import TrainTask
from cvlab.errors import DivergedError
from tests.tiny import settings

SMALL = ("data.num_train=200", "batch_size=20", "device=cpu", "threads=1")


def range_test_of(function, steps=100):
    rates = lr_range_test.exponential_rates(1e-6, 10, steps)
    losses = [function(math.log10(rate)) for rate in rates]
    return RangeTest(rates, losses, losses, False)


def build_task(config, loss_fn):
    model = nn.Linear(2, 1, bias=False)
    nn.init.ones_(model.weight)
    return TrainTask(model, loss_fn, lambda step: step, 10, 8, lambda _: {}, "val", config.compute_context())


def run(config, loss_fn, rates):
    steps = []
    result = lr_range_test.run(config, build_task(config, loss_fn), rates, lambda *values: steps.append(values))
    assert [values[2] for values in steps] == result.losses
    return result


def quadratic(model, _batch):
    return {"loss": model.weight.square().sum()}


def test_rates_have_a_constant_ratio():
    rates = lr_range_test.exponential_rates(1e-4, 1.0, 5)
    assert rates == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1.0])


def test_suggestions_on_a_known_curve():
    def loss(x):  # falls from lr 1e-4, fastest at 1e-3, to its minimum at 1e-2, then rises
        return 2 - math.tanh(2 * (x + 3)) + (0.5 * (x + 2) ** 2 if x > -2 else 0.0)

    suggestions = lr_range_test.suggest(range_test_of(loss))
    assert math.log10(suggestions.steepest) == pytest.approx(-3, abs=0.1)
    assert math.log10(suggestions.minimum_tenth) == pytest.approx(-3, abs=0.2)
    assert suggestions.valley < 1e-2


@pytest.mark.parametrize("function", [lambda x: 1.0, lambda x: x], ids=["flat", "rising"])
def test_without_descent_there_is_no_suggestion(function):
    assert lr_range_test.suggest(range_test_of(function)) == Suggestions()


def test_smoothing_keeps_a_line_and_is_symmetric():
    line = [2.0 * k for k in range(40)]
    assert lr_range_test.smooth(line, 2.0)[10:30] == pytest.approx(line[10:30])
    peak = [float(k == 20) for k in range(41)]
    smoothed = lr_range_test.smooth(peak, 2.0)
    assert smoothed == pytest.approx(smoothed[::-1])
    assert smoothed.index(max(smoothed)) == 20


def test_the_test_stops_when_the_loss_grows():
    config = settings("sgd", clip_norm=None)
    rates = lr_range_test.exponential_rates(1e-3, 100, 100)
    result = run(config, quadratic, rates)
    assert result.has_diverged
    assert 10 < len(result.losses) < 100
    assert all(map(math.isfinite, result.losses))
    assert lr_range_test.suggest(result).minimum_tenth < 1.0


def test_the_test_stops_at_a_loss_that_is_not_finite():
    def loss_fn(model, batch):
        return {"loss": model.weight.sum() * (math.nan if batch >= 12 else 1.0)}

    result = run(settings("sgd", clip_norm=None), loss_fn, lr_range_test.exponential_rates(1e-6, 1e-3, 50))
    assert (len(result.losses), result.has_diverged) == (12, True)
    with pytest.raises(DivergedError, match="before the first update"):
        run(settings("sgd"), lambda model, _: {"loss": model.weight.sum() * math.nan}, [1e-3] * 20)


def test_the_updates_have_the_learning_rates_of_the_test():
    weights = []

    def loss_fn(model, _batch):
        weights.append(model.weight.detach().clone())
        return {"loss": model.weight.sum()}

    rates = lr_range_test.exponential_rates(1e-4, 1e-2, 20)
    config = settings("sgd", clip_norm=None)
    plain = config.optimizer.model_copy(update={"momentum": 0.0})
    run(config.model_copy(update={"optimizer": plain}), loss_fn, rates)
    updates = [float((a - b)[0, 0]) for a, b in itertools.pairwise(weights)]
    assert updates == pytest.approx(rates[:-1], rel=1e-2)


def test_frozen_parameters_and_accumulation_are_those_of_the_training_run():
    parts = []

    def loss_fn(model, part):
        parts.append(part)
        return {"loss": model(torch.ones(1, 2)).sum()}

    config = settings("sgd", clip_norm=None, freeze=("weight",), lr_factors={"bias": 0.5})
    plain = config.optimizer.model_copy(update={"momentum": 0.0})
    trained = TrainTask(
        *(nn.Linear(2, 1), loss_fn, lambda step: (2 * step, 2 * step + 1), 10, 8, lambda _: {}, "val"),
        config.compute_context(),
        split_batch=list,
    )
    weight, bias = trained.model.weight.detach().clone(), trained.model.bias.item()
    rates = lr_range_test.exponential_rates(1e-4, 1e-2, 20)
    lr_range_test.run(config.model_copy(update={"optimizer": plain}), trained, rates, lambda *_: None)
    assert parts == list(range(40))
    assert torch.equal(trained.model.weight, weight)
    assert bias - trained.model.bias.item() == pytest.approx(sum(rates) / 2, rel=1e-3)


def test_the_command_writes_a_reproducible_run(cvlab, tmp_path):
    arguments = ("lr", "quickstart", *SMALL, "--steps", 40, "--json")
    documents = [json.loads(cvlab(*arguments, "--seed", seed)[1]) for seed in (1, 1, 2)]
    first, same_seed, other_seed = (document["metrics"] for document in documents)
    assert documents[0]["ok"]
    assert first == same_seed != other_seed
    assert documents[0]["headline"] == f"optimizer.lr={first['minimum_tenth_lr']:.2g}"
    assert {"config.yaml", "plots/lr_range_test.png", "report.html", "summary.json"} <= set(documents[0]["files"])
    assert not any(name.endswith((".pt", ".safetensors")) for name in documents[0]["files"])
    run_dir = documents[0]["run"]
    repeated = json.loads(cvlab("run", f"{run_dir}/config.yaml", "--json")[1])
    assert repeated["metrics"] == first
    rows = [json.loads(line) for line in (tmp_path / run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, int(first["steps"]) + 1))
    assert "Find a learning rate" in cvlab("experiments")[1]


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("saliency",), 2, "saliency has no learning rate to find; give a configuration that trains"),
        (("cifar_bn_lr_sweep",), 2, "sweep has no learning rate"),
        (("cifar_60s",), 2, "comes in several variants; add profile=small"),
        (("quickstart", "--min", "1", "--max", "0.1"), 2, "min 1 is not below max 0.1"),
        (("quickstart", "--max", "1000"), 2, "max"),
        (("quickstart", "--min", "0"), 2, "min"),
        (("quickstart", "--steps", "3"), 2, "steps"),
        (("quickstart", "optimizr.lr=1"), 2, "did you mean 'optimizer'?"),
        (("quickstat",), 2, "did you mean 'quickstart'?"),
    ],
)
def test_errors_are_one_line(cvlab, arguments, code, text):
    exit_code, out, err = cvlab("lr", *arguments)
    assert (exit_code, out) == (code, "")
    assert text in err
    assert len([line for line in err.splitlines() if line.startswith("error:")]) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("yolo_scenes", "data={name: scenes, num_train: 4}", "size=64", "views=1", "batch_size=2"),
        ("caption_scenes", "data={name: scene_captions, num_train: 4}", "size=64", "min_word_count=1", "batch_size=2"),
        ("quickstart", "optimizer=muon", *SMALL),
    ],
)
def test_other_experiments_and_optimizers(cvlab, arguments):
    code, out, err = cvlab("lr", *arguments, "expect=[]", "expect_fallback=[]", "--steps", 20, "--json")
    assert code == 0, err
    document = json.loads(out)
    assert document["metrics"]["steps"] > 1
    assert "optimizer.lr=" in document["headline"] or "no suggestion" in document["headline"]
    if "optimizer=muon" in arguments and "optimizer" in document["headline"]:
        assert "optimizer.bias_lr=" in document["headline"]
