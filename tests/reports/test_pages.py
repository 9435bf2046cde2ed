"""The pages about runs: self-contained, safe for any names, complete without a script, and served read-only."""

import base64
import html as entities
import http.client
import io
import json
import re
import threading
from html.parser import HTMLParser

import pytest
from PIL import Image, ImageColor

from cvlab import registry
from cvlab.api import serve
from cvlab.errors import DataError
from cvlab.reports import colors, embedded, html, index, svg
from cvlab.runs.run_dir import RunDir

COLUMNS = [
    {"name": "objects", "title": "objects"},
    {"name": "picture", "title": "picture", "is_file": True},
]
MARKUP_NAME = "<script>alert(1)</script>"


class PageParser(HTMLParser):
    """Collect all URLs that a page loads or links to, all its text, and its tags."""

    def __init__(self):
        super().__init__()
        self.urls, self.texts, self.tags = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.urls += [value for key, value in attributes if key in ("src", "href", "srcset", "action")]

    def handle_data(self, data):
        self.texts.append(data)


def parse_page(text):
    page = PageParser()
    page.feed(text)
    return page


def make_run(root, name="20261125-120000-x-0001", metrics=(), status="done", **summary):
    path = root / name
    (path / "images").mkdir(parents=True)
    (path / "config.yaml").write_text("experiment: classify\nseed: 3\noptimizer: {name: adam, lr: 0.01}\n")
    run = RunDir(path)
    run.set_status(status, experiment="classify", data="scenes10")
    run.write_json(
        "env.json", {"command": "cvlab train x", "provenance": {"seed": "command line", "optimizer.lr": "file"}}
    )
    run.write_json(
        "summary.json", {"experiment": "classify", "metrics": {"val_accuracy": 0.5}, "expect": [], **summary}
    )
    for row in metrics:
        run.append(row)
    return path


@pytest.fixture
def root(tmp_path):
    return tmp_path / "runs"


class TestRun:
    def test_a_page_shows_configuration_expectations_curves_and_images(self, root):
        rows = [{"step": k, "train_loss": 3 / (k + 1), "val_accuracy": 0.1 * k, "lr": 0.01} for k in range(5)]
        expectation = {"rule": "val_accuracy >= 0.9", "measured": 0.5, "met": False}
        result = {
            "image": "/photos/cat.png",
            "picture": "images/cat-boxes.png",
            "objects": [{"label": "cat", "score": 0.9}],
        }
        path = make_run(root, metrics=rows, expect=[expectation], results=[result], columns=COLUMNS)
        Image.new("RGB", (2000, 500), "red").save(path / "images" / "cat-boxes.png")
        Image.new("RGB", (20, 20), "blue").save(path / "images" / "other.png")
        page = parse_page(html.run_page(path))
        text = " ".join(page.texts)
        for fragment in (
            "val_accuracy >= 0.9",
            "not met",
            "cat 0.90",
            "command line",
            "cvlab train x",
            "learning rate",
            "0.4",
        ):
            assert fragment in text, fragment
        assert page.tags.count("svg") == 3
        assert page.tags.count("img") == 2
        assert all(url.startswith("data:") for url in page.urls)

    def test_names_are_escaped(self, root):
        path = make_run(
            root, metrics=[{"step": 1, MARKUP_NAME: 1.0, "../../x": 2.0}, {"step": 2, MARKUP_NAME: 2.0, "../../x": 2.0}]
        )
        (path / "config.yaml").write_text(json.dumps({"experiment": "classify", "name": MARKUP_NAME}))
        text = html.run_page(path)
        assert MARKUP_NAME not in text
        assert entities.escape(MARKUP_NAME) in text
        assert "../../x" in text
        assert parse_page(text).tags.count("script") == 1
        data = json.loads(entities.unescape(re.search(r'data-chart="([^"]*)"', text).group(1)))
        assert data["lines"][0]["name"] == MARKUP_NAME

    def test_an_image_outside_the_run_directory_is_left_out(self, root):
        secret = root / "secret.png"
        results = [{"image": "a", "picture": "../secret.png"}, {"image": "b", "picture": "images/broken.png"}]
        path = make_run(root, results=results, columns=COLUMNS)
        Image.new("RGB", (5, 5)).save(secret)
        (path / "images" / "broken.png").write_bytes(b"no picture")
        assert "img" not in parse_page(html.run_page(path)).tags

    def test_images_above_the_limit_are_counted(self, root, monkeypatch):
        monkeypatch.setattr(embedded, "MAX_IMAGES", 3)
        path = make_run(root)
        for k in range(5):
            Image.new("RGB", (8, 8), (k, 0, 0)).save(path / "images" / f"{k}.png")
        text = html.run_page(path)
        assert parse_page(text).tags.count("img") == 3
        assert "2 more images" in text

    @pytest.mark.parametrize("status", ["running", "failed", "interrupted"])
    def test_a_run_in_any_state_has_a_page(self, root, status):
        path = make_run(root, status=status)
        (path / "summary.json").unlink()
        assert "classify" in html.run_page(path)

    def test_curves_and_images_come_before_tables(self, root):
        path = make_run(root, metrics=[{"step": k, "train_loss": 1.0} for k in (1, 2)])
        Image.new("RGB", (8, 8)).save(path / "images" / "a.png")
        text = html.run_page(path)
        positions = [text.index(f"<h2>{title}</h2>") for title in ("Curves", "Images", "Metrics", "Configuration")]
        assert positions == sorted(positions)
        assert "<table" not in text[: text.index("<h2>Curves")]

    def test_the_same_image_is_shown_once(self, root):
        columns = [{"name": "panel", "title": "panel", "is_file": True}, *COLUMNS]
        columns += [{"name": "map", "title": "map", "is_file": True, "is_part": True}]
        result = {"image": "/photos/cat.png", "panel": "images/panel.png", "map": "images/map.png"}
        path = make_run(root, results=[result, result], columns=columns)
        for name, color in (("panel", "red"), ("map", "blue"), ("copy", "red"), ("preview", "lime"), ("else", "pink")):
            Image.new("RGB", (8, 8), color).save(path / "images" / f"{name}.png")
        text = html.run_page(path)
        assert re.findall(r"<figcaption>([^<]*)</figcaption>", text) == ["panel", "images/else.png"]
        assert "in the run directory: images/map.png" in text

    def test_a_part_is_shown_if_there_is_no_panel(self, root):
        columns = [{"name": "map", "title": "map", "is_file": True, "is_part": True}]
        path = make_run(root, results=[{"image": "/photos/cat.png", "map": "images/map.png"}], columns=columns)
        Image.new("RGB", (8, 8)).save(path / "images" / "map.png")
        assert "<figcaption>map</figcaption>" in html.run_page(path)

    def test_an_image_created_by_the_run_comes_first(self, root):
        columns = [{"name": "animation", "title": "animation", "is_file": True}]
        path = make_run(root, results=[{"image": "images/a.png", "animation": "images/a.gif"}], columns=columns)
        Image.new("RGB", (8, 8)).save(path / "images" / "a.png")
        Image.new("RGB", (8, 8)).save(path / "images" / "a.gif")
        text = html.run_page(path)
        assert re.findall(r"<figcaption>([^<]*)</figcaption>", text) == ["result", "animation"]

    def test_a_failed_run_shows_the_error_the_step_and_how_to_resume(self, root):
        path = make_run(root, status="failed")
        (path / "summary.json").unlink()
        out = RunDir(path)
        out.append_text("log.txt", "Traceback: line 7\n")
        out.set_status("failed", experiment="classify", step=7, total_steps=20, error="the loss is <nan>; lower lr")
        text = html.run_page(path)
        assert "<h2>Failed at step 7 of 20</h2>" in text
        assert "the loss is &lt;nan&gt;; lower lr" in text
        assert f"<code>cvlab resume {path.name}</code>" in text
        assert "<details open data-open>" in text
        assert "Traceback: line 7" in text
        assert "resume" not in html.run_page(make_run(root, "20261125-120000-y-0002"))

    def test_a_pruned_trial_does_not_suggest_resuming(self, root):
        path = make_run(root, status="interrupted")
        (path / "prune.txt").write_text("worse than the median\n")
        text = html.run_page(path)
        assert "<h2>Stopped early by the search</h2>" in text
        assert "worse than the median" in text
        assert "cvlab resume" not in text

    def test_a_sweep_links_its_trials(self, root):
        trials = [
            {"trial": "000-lr", "status": "done", "diverged": False, "metrics": {"val_loss": 1.25}, "seed": 0},
            {"trial": "001-gone", "status": "failed", "diverged": False, "metrics": {}, "seed": 1},
            {"trial": "../../other", "status": "done", "diverged": False, "metrics": {}, "seed": 1},
        ]
        path = make_run(root, trials=trials)
        make_run(path / "trials", "000-lr")
        make_run(root, "other")
        page = parse_page(html.run_page(path, html.Links(home="../index.html")))
        assert [url for url in page.urls if not url.startswith("data:")] == [
            "../index.html",
            "trials/000-lr/report.html",
        ]
        assert "1.25" in page.texts
        html.write_run(path / "trials" / "000-lr")
        trial = (path / "trials" / "000-lr" / "report.html").read_text()
        assert '<a href="../../report.html">sweep</a>' in trial


class TestComparison:
    @pytest.fixture
    def runs(self, root):
        info = {"val_accuracy": {"unit": "fraction", "better": "higher"}, "test_loss": {"better": "lower"}}
        for k, values in enumerate(((0.5, 1.0, 3), (0.75, 2.0, 4), (0.75, 3.0, 5))):
            metrics = dict(zip(("val_accuracy", "test_loss", "epochs"), values, strict=True))
            rows = [{"step": 1, "val_loss": k}, {"step": 2, "val_loss": k + 1.5}]
            path = make_run(root, f"20261125-120000-x{k}-000{k}", rows)
            RunDir(path).write_json("summary.json", {"metrics": metrics, "metric_info": info, "seconds": 65.0})
        return {path.name: path for path in sorted(root.iterdir())}

    def test_a_comparison_links_to_the_runs_and_marks_the_best_values(self, runs, root):
        text = html.comparison_page(runs, html.links_from(root / "comparison.html", root))
        page = parse_page(text)
        links = [url for url in page.urls if not url.startswith("data:")]
        assert links == ["index.html", *(f"{name}/report.html" for name in runs)]
        assert re.findall(r'class="number best">([^<]*)<', text) == ["0.75", "0.75", "1"]
        assert "1 min 5 s" in page.texts
        assert page.texts.count("smoothing ") == 1
        assert {"log y axis", "log x axis"} <= {word.strip() for word in page.texts}

    def test_links_from_another_folder(self, root, tmp_path):
        links = html.links_from(tmp_path / "out dir" / "c.html", root)
        assert links.home == "../runs/index.html"
        assert links.run == "../runs/{name}/report.html"

    def test_equal_values_are_not_marked(self):
        assert html.best_values([1.0, 1.0], "higher") == [False, False]
        assert html.best_values([None, 2, "x"], "lower") == [False, False, False]
        assert html.best_values([3, None, 2], "lower") == [False, False, True]
        assert html.best_values([3, 2], "") == [False, False]


class TestIndex:
    def test_dates_durations_and_previews(self, root):
        path = make_run(root, "20261126-134501-x-0001", seconds=3725.0)
        Image.new("RGB", (600, 300), "red").save(path / "images" / "a.png")
        columns = [{"name": "picture", "title": "picture", "is_file": True}]
        results = [{"image": "/a.png", "picture": "images/a.png"}]
        RunDir(path).write_json("summary.json", {"seconds": 3725.0, "results": results, "columns": columns})
        html.write_run(path)
        html.write_index(root, index.runs(root))
        page = parse_page((root / "index.html").read_text())
        assert {"2026-11-26 13:45", "1 h 2 min", "1 run"} <= set(page.texts)
        (source,) = [url for url in page.urls if url.startswith("data:image/png")]
        with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as image:
            assert image.size == (192, 96)
            assert image.getpixel((90, 50)) == (255, 0, 0)

    def test_curves_are_previewed(self, root):
        info = {"val_accuracy": {"unit": "fraction", "better": "higher"}}
        path = make_run(root, metrics=[{"step": k, "val_accuracy": k / 10} for k in range(1, 9)], metric_info=info)
        embedded.write_thumbnail(path)
        with Image.open(path / "thumbnail.png") as image:
            assert image.getpixel((0, 0))[3] == 0
            width, height = image.size
            assert image.getpixel((5, height - 6))[:3] == ImageColor.getrgb(colors.LIGHT[1])
            assert image.getpixel((width - 6, 6))[3] == 255

    def test_a_thumbnail_is_an_image_of_bounded_size(self, root):
        path = make_run(root)
        for content in (b"<svg onload=alert(1)>", embedded.PNG_SIGNATURE + bytes(embedded.MAX_THUMBNAIL_BYTES)):
            (path / "thumbnail.png").write_bytes(content)
            assert embedded.read_thumbnail(path) is None

    def test_a_run_without_a_page_is_not_linked(self, root):
        path = make_run(root, status="failed")
        html.write_index(root, index.runs(root))
        assert f'<span class="name">{path.name}</span>' in (root / "index.html").read_text()
        html.write_run(path)
        html.write_index(root, index.runs(root))
        assert f'<a href="{path.name}/report.html">{path.name}</a>' in (root / "index.html").read_text()

    def test_durations(self):
        texts = [html.duration_text(seconds) for seconds in (None, 0.04, 9.97, 59.4, 61, 3599.6, 7300)]
        assert texts == ["", "0.0 s", "10 s", "59 s", "1 min 1 s", "1 h 0 min", "2 h 1 min"]


class TestChart:
    def test_ticks_are_round_and_cover_all_values(self):
        for values in ([0.0, 1.0], [0.013, 0.97], [-5, 1234.0], [3.0, 3.0], [0.0, 0.0], [1e-9, 3e-9]):
            ticks = svg.ticks(values)
            assert ticks[0] <= min(values)
            assert ticks[-1] >= max(values)
            assert 2 <= len(ticks) <= 2 * svg.TICKS

    def test_lines_stay_inside_and_are_thinned_including_their_last_point(self):
        xs = list(range(5000))
        chart = svg.chart("loss", {"a": (xs, [1 / (x + 1) for x in xs]), "nothing": ([1], [float("nan")])})
        (line,) = chart.lines
        assert len(line.xs) <= svg.MAX_POINTS + 1
        assert line.xs[-1] == 4999
        assert len(chart.rows) <= svg.MAX_ROWS
        points = [tuple(map(float, pair.split(","))) for pair in line.path.split()]
        assert all(0 <= x <= svg.WIDTH and 0 <= y <= svg.HEIGHT for x, y in points)
        assert points[0][1] < points[-1][1]  # y grows downward
        assert svg.chart("empty", {"a": ([], [])}) is None


class TestCommands:
    def test_a_training_run_writes_its_page_and_the_list_of_runs(self, cvlab, tmp_path):
        code, out, err = cvlab(
            "train",
            "quickstart",
            "duration={steps: 2}",
            "data.num_train=64",
            "expect=[]",
            "--runs-dir",
            tmp_path / "r",
            "evaluate_test=false",
            "batch_size=8",
            "--json",
        )
        assert code == 0, err
        (run,) = (path for path in (tmp_path / "r").iterdir() if path.is_dir() and not path.is_symlink())
        assert "report.html" in json.loads(out)["files"]
        text = (run / "report.html").read_text()
        assert "train_loss" in text
        assert "command line" in text
        assert f"{run.name}/report.html" in (tmp_path / "r" / "index.html").read_text()

    def test_a_run_that_fails_has_a_page_and_is_listed(self, cvlab, tmp_path, monkeypatch):
        def fail(*_):
            raise DataError("broken.png: cannot be decoded", "remove it")

        monkeypatch.setattr(type(registry.get_experiment("classify")), "run", fail)
        assert cvlab("train", "quickstart", "--runs-dir", tmp_path / "r")[0] == DataError.code
        (run,) = (path for path in (tmp_path / "r").iterdir() if path.is_dir() and not path.is_symlink())
        text = (run / "report.html").read_text()
        assert "<h2>Failed</h2>" in text
        assert "broken.png: cannot be decoded; remove it" in text
        assert f'href="{run.name}/report.html"' in (tmp_path / "r" / "index.html").read_text()

    def test_an_error_of_the_page_does_not_hide_the_error_of_the_run(self, cvlab, tmp_path, monkeypatch):
        def fail(*_):
            raise DataError("broken.png: cannot be decoded", "remove it")

        monkeypatch.setattr(type(registry.get_experiment("classify")), "run", fail)
        monkeypatch.setattr(html, "run_page", lambda *_: {}["no such key"])
        code, _, err = cvlab("train", "quickstart", "--runs-dir", tmp_path / "r")
        assert code == DataError.code
        assert "broken.png" in err

    def test_several_runs_are_compared(self, cvlab, root):
        for k in range(2):
            make_run(
                root, f"20261125-120000-x{k}-000{k}", [{"step": 1, "val_loss": k}, {"step": 2, "val_loss": k + 1.5}]
            )
        code, out, _ = cvlab("report", "x0", "x1", "--runs-dir", root, "--json")
        page = parse_page((root / "comparison.html").read_text())
        assert code == 0
        assert json.loads(out)["files"] == [str(root / "comparison.html")]
        assert "x0-0000" in page.texts
        assert "svg" in page.tags

    def test_errors(self, cvlab, root, tmp_path):
        make_run(root)
        assert cvlab("report", "nothing", "--runs-dir", root)[0] == 5
        code, _, err = cvlab("report", "x-0001", "--out", tmp_path / "no" / "r.html", "--runs-dir", root)
        assert code == 5
        assert "r.html" in err


def test_an_index_of_many_runs_has_one_row_each():
    row = {"status": "done", "experiment": "classify", "data": None, "result": "", "metrics": {}}
    text = html.index_page([{**row, "run": f"run {k}"} for k in range(5000)])
    assert text.count("<tr>") == 5001
    assert len(text) < 2_000_000
    assert "run%204999/report.html" in text


class TestServer:
    @pytest.fixture
    def request_page(self, root):
        make_run(root, f"20261125-120000-a{MARKUP_NAME.replace('/', '_')}-0001")
        make_run(root)
        (root.parent / "secret.txt").write_text("secret")
        with serve.Server(root, 0) as server:
            thread = threading.Thread(target=server.serve_forever, args=(0.01,))
            thread.start()

            def send_request(path, host=None, method="GET"):
                connection = http.client.HTTPConnection("127.0.0.1", server.server_port)
                connection.request(method, path, headers={"Host": host or f"localhost:{server.server_port}"})
                response = connection.getresponse()
                return response.status, response.read().decode()

            yield send_request
            server.shutdown()
            thread.join()

    def test_pages(self, request_page):
        status, text = request_page("/")
        assert status == 200
        assert "/20261125-120000-x-0001/" in text
        assert MARKUP_NAME not in text
        status, text = request_page("/20261125-120000-x-0001/")
        assert status == 200
        assert "val_accuracy" in text

    def test_selected_runs_are_compared(self, request_page, root):
        make_run(root, "20261126-120000-y-0002")
        status, text = request_page("/compare?run=20261125-120000-x-0001&run=20261126-120000-y-0002&run=../secret.txt")
        assert status == 200
        assert 'href="/20261126-120000-y-0002/"' in text
        assert "Comparison of 2 runs" in text
        assert request_page("/compare")[0] == 404

    def test_trials_of_a_sweep(self, request_page, root):
        sweep = root / "20261125-120000-x-0001"
        make_run(sweep / "trials", "000-a")
        trial = {"trial": "000-a", "status": "done", "metrics": {}, "seed": 0}
        RunDir(sweep).write_json("summary.json", {"trials": [trial]})
        assert f'href="/{sweep.name}/trials/000-a/"' in request_page(f"/{sweep.name}/")[1]
        status, text = request_page(f"/{sweep.name}/trials/000-a/")
        assert status == 200
        assert f'<a href="/{sweep.name}/">sweep</a>' in text
        assert request_page(f"/{sweep.name}/trials/../")[0] == 404

    @pytest.mark.parametrize(
        "path", ["/../secret.txt", "/%2e%2e/secret.txt", "/x/../../secret.txt", "//etc/passwd", "/nothing/"]
    )
    def test_no_path_escapes_the_folder(self, request_page, path):
        status, text = request_page(path)
        assert status == 404
        assert "secret" not in text
        assert "root:" not in text

    @pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example:80"])
    def test_another_host_is_rejected(self, request_page, host):
        assert request_page("/", host)[0] == 403

    def test_the_server_is_read_only(self, request_page):
        assert request_page("/", method="POST")[0] == 501
        assert request_page("/", method="HEAD") == (200, "")

    def test_a_port_that_is_in_use(self, root):
        with serve.Server(root, 0) as server, pytest.raises(serve.RunDirError, match="--port"):
            serve.serve(root, server.server_port, lambda address: None)


def test_compiled_templates_are_stored_for_this_user_only(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert html._bytecode_cache() is not None
    folder = tmp_path / "cvlab" / "pages"
    assert folder.stat().st_mode & 0o077 == 0
    folder.chmod(0o777)
    assert html._bytecode_cache() is None


def test_pages_are_written_if_compiled_templates_cannot_be_stored(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    html._templates.cache_clear()
    html._templates()
    (tmp_path / "cvlab" / "pages").rmdir()
    html._templates().get_template("index.html")  # compiles it
    assert not (tmp_path / "cvlab" / "pages").exists()
    html._templates.cache_clear()
