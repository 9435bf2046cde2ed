"""Parallel coordinates of the trials of a sweep, and the importance of its keys on the page."""

import json

import pytest

from cvlab.reports import html, parallel
from cvlab.reports.parallel import BOTTOM, HEIGHT, TOP

IMPORTANCE = {"metric": "val_accuracy", "goal": "maximize", "log_keys": ["lr"]}


def trial(number, value, status="done", **keys):
    return {"trial": f"{number:03d}", "status": status, "metrics": {}, "keys": keys, "value": value}


def test_values_lie_on_their_axes_and_the_best_is_drawn_last():
    rows = [
        trial(0, 0.9, lr=1e-1, bn=True),
        trial(1, 0.5, lr=1e-3, bn=False),
        trial(2, 0.7, "pruned", lr=1e-2, bn=True),
    ]
    chart = parallel.chart([*rows, trial(3, None, lr=1.0, bn=True)], IMPORTANCE)
    assert [axis.name for axis in chart.axes] == ["lr", "bn", "val_accuracy"]
    assert [line.text.partition(":")[0] for line in chart.lines] == ["001", "002", "000"]
    assert [line.color for line in chart.lines] == [0, 2, 5]
    assert chart.lines[1].text == "002: lr 0.01, bn true, val_accuracy 0.7, stopped early"
    assert [line.is_stopped for line in chart.lines] == [False, True, False]
    assert chart.num_missing == 1
    heights = [float(line.path.split()[0].split(",")[1]) for line in chart.lines]
    assert heights == [HEIGHT - BOTTOM, (HEIGHT - BOTTOM + TOP) / 2, TOP], "evenly spaced on a logarithmic axis"
    assert [tick.text for tick in chart.axes[0].ticks] == ["0.001", "0.01", "0.1"]
    assert [tick.text for tick in chart.axes[1].ticks] == ["false", "true"]
    minimized = parallel.chart(rows, {**IMPORTANCE, "goal": "minimize"})
    assert [line.text.partition(":")[0] for line in minimized.lines] == ["000", "002", "001"]


@pytest.mark.parametrize(
    "rows",
    [[], [trial(0, 0.5, lr=1)], [trial(0, 0.5), trial(1, 0.6)], [3, None, {"keys": 3}], [trial(0, 10**400, lr=1)] * 2],
)
def test_less_than_two_trials_have_no_chart(rows):
    assert parallel.chart(rows, {}) is None


def test_unusual_values_are_drawn():
    rows = [trial(k, 0.5, lr=-1.0, x="<b>", n=[1, {"name": "sgd"}], m=None, long="y" * 99) for k in range(3)]
    chart = parallel.chart(rows, IMPORTANCE)
    assert len(chart.lines) == 3
    assert all(len(tick.text) <= parallel.MAX_LABEL for axis in chart.axes for tick in axis.ticks)


def test_a_sweep_has_the_chart_and_the_importance_on_its_page(tmp_path):
    (tmp_path / "config.yaml").write_text("experiment: sweep\n")
    rows = [trial(k, 0.1 * k, lr=10.0**-k, x="<b>") for k in range(4)]
    shares = {"trials": 12, "method": "m", "explained": 0.9, "p": 0.01, "keys": {"lr": 0.75, "x": 0.25}}
    summary = {"experiment": "sweep", "status": "done", "trials": rows, "importance": {**IMPORTANCE, **shares}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    page = html.run_page(tmp_path)
    assert page.count("<polyline") == 4
    assert "lr 0.01, x &lt;b&gt;, val_accuracy 0.2" in page
    assert '<td class="number">75%</td>' in page
    assert "m, 12 trials; 0.9 of the variance explained, p = 0.01" in page
    summary["importance"] = {**IMPORTANCE, "trials": 3, "reason": "3 trials have the metric", "after": "epoch 1"}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert "importance of keys for val_accuracy after epoch 1: 3 trials have the metric" in html.run_page(tmp_path)
