"""Curves, plots and comparisons, created from run directories alone."""

import itertools
import json
from pathlib import Path

import pytest

from cvlab.errors import RunDirError
from cvlab.reports import compare, curves, metrics, plots, tables
from cvlab.runs.run_dir import RunDir

INFO = {"val_accuracy": {"unit": "fraction", "better": "higher"}}
PNG = b"\x89PNG"


def make_run(path, lr=0.1, rows=50, summary=True):
    path.mkdir(parents=True)
    with RunDir(path).locked() as run:
        run.write_text("config.yaml", f"experiment: classify\nname: {path.name}\noptimizer: {{name: sgd, lr: {lr}}}\n")
        for step in range(1, rows + 1):
            run.append({"step": step, "epoch": step / 10, "seconds": 0.1, "lr": lr, "train_loss": 1 / step})
        run.append({"step": rows, "val_accuracy": 0.5})
        if summary:
            run.write_json(
                "summary.json",
                {"metrics": {"val_accuracy": 0.5}, "metric_info": INFO, "experiment": "classify", "data": "x"},
            )
        run.set_status("done" if summary else "interrupted")
    return path


def test_long_curves_are_thinned_and_keep_their_ends():
    rows = ({"step": k, "loss": float(k)} for k in range(1, 100_001))
    xs, ys = curves.thin(rows)["loss"]
    assert curves.MAX_POINTS <= len(xs) <= 2 * curves.MAX_POINTS
    assert xs[0] == 1
    assert xs[-1] == 100_000
    assert xs == ys
    gaps = {b - a for a, b in itertools.pairwise(xs[:-1])}
    assert len(gaps) == 1


def test_curves_skip_missing_and_non_numeric_values():
    rows = [{"step": 1, "loss": None, "name": "x"}, {"step": 2, "loss": 2.0}, {"loss": 3.0}]
    assert curves.thin(rows) == {"loss": ([2], [2.0])}


def test_plots_of_a_run(tmp_path):
    path = make_run(tmp_path / "a")
    files = plots.plot_run(RunDir(path))
    assert {p.name for p in files} == {"loss.png", "accuracy.png", "lr.png"}
    assert all(p.read_bytes()[:4] == PNG for p in files)


def test_a_run_without_metrics_has_no_plots(tmp_path):
    (tmp_path / "a").mkdir()
    assert plots.plot_run(RunDir(tmp_path / "a")) == []
    assert plots.draw_comparison({"a": tmp_path / "a"})[:4] == PNG


def test_a_comparison_lists_only_differences(tmp_path):
    runs = compare.labels([make_run(tmp_path / "a", 0.1), make_run(tmp_path / "b", 0.2, summary=False)])
    comparison = compare.compare(runs)
    assert comparison["differences"] == {"optimizer.lr": [0.1, 0.2]}
    assert comparison["metrics"]["val_accuracy"] == [0.5, 0.5]
    assert comparison["metrics"]["train_loss"] == [None, 1 / 50]
    assert [run["status"] for run in comparison["runs"]] == ["done", "interrupted"]
    assert compare.to_csv(comparison).splitlines()[:2] == ["kind,name,a,b", "config,optimizer.lr,0.1,0.2"]
    assert plots.draw_comparison(runs)[:4] == PNG
    json.dumps(comparison)


def test_labels_are_short_if_they_are_unique(tmp_path):
    first, second = tmp_path / "20260101-000000-a-1111", tmp_path / "20260101-000001-a-2222"
    assert list(compare.labels([first, second])) == ["a-1111", "a-2222"]
    same_name = tmp_path / "x" / "20260101-000000-a-1111"
    assert list(compare.labels([first, same_name])) == [str(first), str(same_name)]


def test_a_run_without_configuration(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(RunDirError, match=r"has no config\.yaml"):
        compare.compare({"a": tmp_path / "a"})


def test_numbers_of_tables():
    texts = [tables.number(v) for v in (None, True, 3, 12345, 0.123456, 12345.6, "x", [1, 2], 1e-5)]
    assert texts == ["-", "true", "3", "12,345", "0.1235", "12,346", "x", "[1, 2]", "1e-05"]
    assert tables.number(10.0) == "10"


def test_names_are_not_markup(capsys):
    tables.table("[red]t[/red]", ("[b]a[/b]",), [["[link=x]y[/link]"]])
    assert "[red]t[/red]" in (out := capsys.readouterr().out)
    assert "[link=x]y[/link]" in out


def test_photos_in_a_table(capsys):
    from cvlab.experiments.adversarial import experiments
    from cvlab.experiments.classification import experiments as classification_experiments

    result = {"label": "ostrich", "score": 0.99, "before": {"label": "tabby", "score": 0.8}, "success": True}
    result |= {"steps": 6, "l2": 1.5, "success_jpeg95": True, "success_jpeg85": False, "success_jpeg75": False}
    rows = [{"image": "/a/cat.jpg", **result}, {"image": f"/a/{'very' * 10}.jpg", "error": "bad"}]
    tables.show_photos(rows, experiments.COLUMNS, Path("runs/a"))
    out = capsys.readouterr().out
    assert "tabby 0.80" in out
    assert "ostrich 0.99" in out
    assert "not read" in out
    assert "veryveryver..eryvery.jpg" in out
    rows[0]["panel"] = "images/cat-panel.png"
    tables.show_photos(rows[:1], experiments.COLUMNS, Path("runs/a"))
    out = capsys.readouterr().out
    assert "true, false, false" in out
    assert "runs/a/images/cat-panel.png" in out
    top = [{"label": "tabby", "score": 0.8}, {"label": "lynx", "score": 0.1}]
    tables.show_photos([{"image": "cat.jpg", **top[0], "top": top}], classification_experiments.COLUMNS, Path("runs/a"))
    assert "lynx 0.10" in capsys.readouterr().out


def test_metrics_have_units_and_directions(tmp_path, capsys):
    runs = compare.labels([make_run(tmp_path / "a", 0.1), make_run(tmp_path / "b", 0.2)])
    comparison = compare.compare(runs)
    assert tables.metric_rows(comparison) == [("val_accuracy", "0.5", "0.5", "fraction", "higher")]
    tables.show_comparison(comparison)
    assert "higher" in capsys.readouterr().out


def test_the_headline_metrics_of_a_run():
    values = {"steps": 3, "train_accuracy": 0.9, "best_val_accuracy": 0.8, "val_accuracy": 0.7, "test_loss": 1.0}
    info = {name: {"better": "higher"} for name in values if name.endswith("accuracy")}
    assert metrics.headline(values, info) == ["val_accuracy", "train_accuracy"]
    rates = {"images_per_second": 99.0, **values}
    info = {name: {**row, "unit": "fraction"} for name, row in info.items()} | {
        "images_per_second": {"better": "higher"}
    }
    assert metrics.headline(rates, info) == ["val_accuracy", "train_accuracy"]
    assert metrics.headline({"trials": 2, "best": "x", "diverged": 0}, {}) == ["trials", "diverged"]


def test_families_of_curves():
    names = ["lr", "train_loss", "val_map50", "best_val_map50", "images_per_second", "box_loss"]
    groups = metrics.group(names)
    assert list(groups) == ["loss", "map50", "second", "lr"]
    assert groups["loss"] == ["train_loss", "box_loss"]
    assert [metrics.title(key, members) for key, members in groups.items()] == [
        "loss",
        "map50",
        "images_per_second",
        "learning rate",
    ]
    assert metrics.file_name("../x") == "plots/_x.png"


def test_a_table_without_wrapping_equals_that_of_rich():
    columns = ["run", "val_accuracy", "a long title", "n"]
    rows = [["a b", "0.5", "", "12"], ["x", "-", "text, and more of it", "3"], ["", "0.25", "-", "1,000"]]
    for cells in (rows, rows[:1], []):
        widths = tables._widths(columns, cells, 10**9)
        is_right = [tables._is_numeric([row[k] for row in cells]) for k in range(len(columns))]
        assert tables._fits(cells, widths)
        assert tables._lines(columns, cells, widths, is_right) == tables._wrapped_lines(
            columns, cells, widths, is_right
        )
