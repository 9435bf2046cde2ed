"""Colors of curves: the same for a metric in every chart, in plots and on pages."""

import io
import re

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from cvlab.reports import colors, fonts, html, plots, svg
from cvlab.runs.run_dir import RunDir


def drawn_figure(monkeypatch, draw):
    """Return the first figure that a function draws."""
    figures = []
    monkeypatch.setattr(plots, "to_png", lambda figure: figures.append(figure) or b"")
    draw()
    return figures[0]


def has_color(png, color):
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
    return (np.abs(pixels - np.array(to_rgb(color)) * 255).sum(-1) < 6).sum() > 20


@pytest.mark.parametrize("others", [[], ["lr"], ["box_loss", "class_loss"]])
def test_splits_have_their_colors_in_every_chart(others):
    styles = colors.of_metrics([*others, "test_loss", "val_loss", "train_loss"])
    assert [styles[f"{split}_loss"].color for split in ("train", "val", "test")] == [0, 1, 2]
    assert colors.of_metrics(["val_accuracy"])["val_accuracy"].color == 1
    assert len({(style.color, style.dash) for style in styles.values()}) == len(styles)


def test_a_second_metric_of_a_split_is_dashed():
    styles = colors.of_metrics(["val_accuracy", "best_val_accuracy"])
    assert {style.color for style in styles.values()} == {1}
    assert [style.dash for style in styles.values()] == [0, 1]


def test_many_series_differ():
    styles = colors.of_series([f"run {k}" for k in range(30)])
    assert len(set(styles.values())) == 30


def test_plots_and_pages_agree(tmp_path):
    path = tmp_path / "20261126-120000-x-0001"
    path.mkdir()
    (path / "config.yaml").write_text("experiment: classify\n")
    out = RunDir(path)
    out.set_status("done", experiment="classify")
    info = {name: {"unit": "", "better": "lower"} for name in ("train_loss", "val_loss")}
    out.write_json("summary.json", {"metrics": {"val_loss": 1.0}, "metric_info": info})
    for step in range(1, 5):
        out.append({"step": step, "val_loss": 1 / step, "train_loss": 2 / step})
    plots.plot_run(out)
    png = (path / "plots" / "loss.png").read_bytes()
    page = html.run_page(path)
    legend = dict(re.findall(r'<b class="c(\d) d0"></b>(\w+)', page))
    assert legend == {"1": "val_loss", "0": "train_loss"}
    for number in (0, 1):
        assert has_color(png, colors.LIGHT[number])
        assert f"--c{number}: {colors.LIGHT[number]};" in page
        assert f"--c{number}: {colors.DARK[number]};" in page
    assert not has_color(png, colors.LIGHT[2])


def test_runs_keep_their_colors_in_all_charts_of_a_comparison(tmp_path):
    for name, metrics in (("a", {"x": 1.0}), ("b", {"x": 2.0, "y": 1.0})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("experiment: classify\n")
        for step in (1, 2):
            RunDir(tmp_path / name).append({"step": step, **metrics})
    page = html.comparison_page({name: tmp_path / name for name in "ab"})
    assert set(re.findall(r'<b class="c(\d) d0"></b>(?:<a [^>]*>)?(\w)', page)) == {("0", "a"), ("1", "b")}


class TestAxes:
    @pytest.mark.parametrize("steps", [[1], [1, 2], [0, 1, 2, 3], [1, 40], [5, 12345]])
    def test_steps_are_whole_numbers(self, steps, monkeypatch):
        figure = drawn_figure(monkeypatch, lambda: plots.draw({"loss": (steps, [1.0] * len(steps))}, "loss", "run"))
        figure.canvas.draw()
        labels = [text.get_text() for text in figure.axes[0].get_xticklabels()]
        assert labels
        assert all("." not in text for text in labels)
        ticks = svg.ticks(list(map(float, steps)), is_whole=True)
        assert all(tick == int(tick) for tick in ticks)
        assert ticks[0] <= steps[0] <= steps[-1] <= ticks[-1]

    def test_a_constant_zero_has_an_axis_from_0_to_1(self, monkeypatch):
        figure = drawn_figure(monkeypatch, lambda: plots.draw({"loss": ([1, 2], [0.0, 0.0])}, "loss", "run"))
        assert figure.axes[0].get_ylim() == pytest.approx((-0.02, 1.02))
        ticks = svg.ticks([0.0, 0.0])
        assert (ticks[0], ticks[-1]) == (0, 1)

    def test_titles_name_the_metric_and_the_run(self, monkeypatch):
        figure = drawn_figure(monkeypatch, lambda: plots.draw({"loss": ([1, 2], [0.0, 1.0])}, "loss", "my-run"))
        assert figure.axes[0].get_title() == "loss: my-run"

    def test_names_are_not_formulas_and_have_no_missing_glyphs(self, bundled_font_only):
        assert plots.label("a$x^2$") == r"a\$x^2\$"
        assert plots.label("猫") == "\\u732b"
        figure = Figure()
        figure.subplots().set_title(plots.label("$\\alpha 猫"))
        plots.to_png(figure)

    def test_installed_fonts_are_used(self, only_fonts):
        stix = fonts.bundled_path().with_name("STIXGeneral.ttf")
        only_fonts(stix)
        character = "\u231a"  # a watch, which DejaVu Sans lacks
        assert plots.label(character) == character
        assert fonts.paths_for(character) == [fonts.bundled_path(), stix]
        figure = Figure()
        title = figure.subplots().set_title(character)
        plots.to_png(figure)  # a missing glyph would cause a warning, which is an error in tests
        assert title.get_fontfamily() == ["DejaVu Sans", "STIXGeneral"]
