"""Expectations on the metrics of a run and on the settings of a sweep."""

import math

import pytest

from cvlab.config import expectations
from cvlab.config.expectations import GroupedResult

METRICS = {"train_accuracy": 0.9, "val_accuracy": 0.4, "val_loss": math.nan}
SETTINGS = [
    GroupedResult({"lr": lr, "bn": bn, "filters": [8, 8], "name": name}, {"acc": acc, "loss": 1 - acc}, diverged)
    for lr, bn, name, acc, diverged in (
        (0.1, True, "x", 0.5, 0.0),
        (0.2, True, "y", 0.6, 0.0),
        (0.1, False, "x", 0.3, 0.5),
        (0.2, False, "y", 0.1, 0.0),
    )
] + [GroupedResult({"lr": 0.4, "bn": False, "name": "gone"}, {}, 1.0)]


def check(rule):
    return expectations.check_expectations([rule], METRICS, SETTINGS)[0]


@pytest.mark.parametrize(
    ("rule", "met"),
    [
        ("train_accuracy >= 0.9", True),
        ("train_accuracy > 0.9", False),
        ("val_accuracy < train_accuracy", True),
        ("0.3 < val_accuracy < 0.5", True),
        ("0.3 < val_accuracy < 0.4", False),
        ("val_loss < 100", False),  # no comparison with nan holds
        ("absent < 100", False),
        ("mean(acc, bn=true) == 0.55", True),
        ("spread(acc, bn=true) < spread(acc, bn=false, lr=0.1)", False),
        ("spread(acc, bn=true) < 0.11", True),
        ("max(acc, bn=true) > min(acc, bn=true)", True),
        ("max(acc) > 0", False),  # the last setting has no such metric
        ("mean(acc, name=x) == 0.4", True),
        ("mean(acc, filters=[8, 8], lr=0.2) == 0.35", True),
        ("mean(acc, bn=1) > 0", False),  # true is not 1
        ("share(acc > 0.4) == 0.4", True),
        ("share(acc > 0.4, bn=true) == 1", True),
        ("diverged(lr=0.4) == 1", True),
        ("diverged(bn=false) == 0.5", True),
        ("diverged() == 0.3", True),
        ("increasing(acc, lr, bn=true)", True),
        ("decreasing(acc, lr, bn=true)", False),
        ("increasing(loss, lr, name=x)", False),  # two values at the same lr have no order
        ("increasing(acc, name, bn=true)", False),  # text has no order
        ("mean(acc, bn=true, lr=0.1) < mean(acc, bn=true, lr=0.2) < 1", True),
    ],
)
def test_verdicts(rule, met):
    assert check(rule)["met"] is met, check(rule)


def test_values_in_a_verdict():
    assert check("train_accuracy > 0.95") == {"rule": "train_accuracy > 0.95", "measured": 0.9, "met": False}
    assert check("val_accuracy < train_accuracy")["values"] == [0.4, 0.9]
    assert check("max(acc) > 0")["measured"] is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train_accuracy", "not of the form"),
        ("train_accuracy > ", "not of the form"),
        ("1 < 2", "not of the form"),
        ("a => 3", "not of the form"),
        ("a > b c", "not of the form"),
        ("mena(acc) > 1", "unknown function 'mena'"),
        ("mean(acc, bn) > 1", "'bn' is not of the form key=value"),
        ("mean(acc)", "not of the form"),
        ("mean() > 1", "not of the form"),
        ("increasing(acc)", "takes a metric and a key"),
        ("increasing(acc, lr) > 0", "not of the form"),
        ("share(acc) > 0", "share takes a condition"),
        ("mean(acc, a=[1) > 0", "not of the form"),
        ("mean(acc, a={) > 0", "not of the form"),
        ("mean(acc, a='x) > 0", "not valid YAML"),
    ],
)
def test_a_malformed_rule_is_rejected(text, message):
    with pytest.raises(ValueError, match=message):
        expectations.parse(text)
