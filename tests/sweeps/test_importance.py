"""Importance of keys: against a model that is refitted for each trial, and cases without a result."""

import math
import random

import numpy as np
import pytest

from cvlab.config import loading
from cvlab.sweeps import importance as measures
from cvlab.sweeps.config import SweepConfig
from cvlab.sweeps.importance import importance


def trials(count, metric, seed=0):
    """Return random settings and `metric(setting, generator)` of each."""
    generator = random.Random(seed)
    settings = [
        {
            "lr": 10 ** generator.uniform(-4, 0),
            "batch_size": generator.choice([16, 32, 64]),
            "batchnorm": generator.choice([True, False]),
            "noise": generator.random(),
        }
        for _ in range(count)
    ]
    return settings, [metric(setting, generator) for setting in settings]


def accuracy(setting, generator):
    """Return a metric that is best at a learning rate of 0.01, with a smaller effect of `batchnorm`, and noise."""
    log_lr = math.log10(setting["lr"]) + 2
    return 0.8 - 0.1 * log_lr**2 + 0.15 * setting["batchnorm"] + generator.gauss(0, 0.02)


def test_keys_are_ranked_by_their_effect():
    for seed in range(5):
        result = importance(*trials(20, accuracy, seed), ["lr"])
        assert list(result["keys"])[:2] == ["lr", "batchnorm"]
        assert result["keys"]["lr"] > 0.6
        assert result["keys"]["batchnorm"] > 0.1
        assert result["keys"]["noise"] < 0.05
        assert sum(result["keys"].values()) == pytest.approx(1)
        assert result["explained"] > 0.8
        assert result["p"] <= 0.05
        assert result["trials"] == 20


def test_left_out_errors_equal_those_of_refitted_models():
    settings, values = trials(12, accuracy)
    keys = list(settings[0])
    blocks = [measures._features([row[key] for row in settings], key == "lr") for key in keys]
    target = np.array(values) - np.mean(values)
    features, penalty, n = np.hstack(blocks), 0.3, len(values)
    model = measures._Ridge(features, penalty)
    weight = np.diag([0.0, *[penalty * n / 10] * features.shape[1]])

    def fitted_without(left_out):
        others = [i for i in range(n) if i != left_out]
        design = np.hstack([np.ones((n - 1, 1)), features[others]])
        return np.linalg.solve(design.T @ design + weight, design.T @ target[others])

    def error(i, row):
        return (target[i] - np.concatenate([[1.0], row]) @ fitted_without(i)) ** 2

    baseline = np.mean([error(i, features[i]) for i in range(n)])
    assert model.left_out_errors(target[:, None])[0] == pytest.approx(baseline)
    first = 0
    for block, increase in zip(blocks, model.increases(blocks, target), strict=True):
        columns = slice(first, first + block.shape[1])
        first += block.shape[1]
        replaced = []
        for i in range(n):
            for j in range(n):
                row = features[i].copy()
                row[columns] = features[j, columns]
                replaced += [error(i, row)] if i != j else []
        assert increase == pytest.approx(np.mean(replaced) - baseline)


def test_too_few_trials_and_trials_without_an_effect_have_a_reason():
    assert importance(*trials(11, accuracy), ["lr"])["reason"] == (
        "11 trials have the metric; 12 are needed for 4 key(s)"
    )
    assert importance([], [])["reason"].startswith("0 trials")
    assert importance([{"x": 1}] * 12, list(range(12)))["reason"] == "no key varies"
    settings = [{"x": k} for k in range(12)]
    assert importance(settings, [0.5] * 12)["reason"] == "the metric is the same in all trials"
    random_results = [importance(*trials(20, lambda _, generator: generator.gauss(0, 1), seed)) for seed in range(40)]
    accepted = [result for result in random_results if "keys" in result]
    assert len(accepted) <= 5  # 5 % are expected
    assert "better than chance (p = 0." in next(result["reason"] for result in random_results if "reason" in result)


def test_choices_may_have_any_type():
    blocks = [{"name": "sgd"}, {"name": "adam"}, None, (1, 2)]
    settings = [{"optimizer": blocks[k % 4], "lr": 1.0 + k % 3} for k in range(24)]
    result = importance(settings, [float(k % 4 == 1) for k in range(24)])
    assert result["keys"]["optimizer"] > 0.95


def test_varied_settings_of_a_sweep(tmp_path):
    text = "experiment: sweep\nbase: {from: quickstart}\ngrid: {optimizer.lr: [1e-3, 1e-2], batch_size: [50, 100]}\n"
    (tmp_path / "s.yaml").write_text(text + "zip: {reg: [0.0, 0.1], clip_norm: [1.0, 2.0]}\nseeds: [0, 1]\n")
    config = loading.load("s.yaml").config
    assert isinstance(config, SweepConfig)
    assert len(config.changes()) == len(config.trials()) == 16
    assert config.settings_of(config.changes()[0]) == {
        "optimizer.lr": 1e-3,
        "batch_size": 50,
        "reg + clip_norm": (0.0, 1.0),
    }
    assert config.log_keys() == ["optimizer.lr"]
