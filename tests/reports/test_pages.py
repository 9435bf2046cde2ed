"""The pages about runs: self-contained, safe whatever a name holds, complete without a script; served read-only."""

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
WICKED = "<script>alert(1)</script>"


class Outside(HTMLParser):
    """Gathers all addresses that a page would fetch or lead to, and all its text."""

    def __init__(self):
        super().__init__()
        self.addresses, self.words, self.tags = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for key, value in attributes if key in ("src", "href", "srcset", "action")]

    def handle_data(self, data):
        self.words.append(data)


def read(text):
    found = Outside()
    found.feed(text)
    return found


def made(root, name="20261125-120000-x-0001", metrics=(), status="done", **summary):
    path = root / name
    (path / "images").mkdir(parents=True)
    (path / "config.yaml").write_text("experiment: classify\nseed: 3\noptimizer: {name: adam, lr: 0.01}\n")
    out = RunDir(path)
    out.set_status(status, experiment="classify", data="scenes10")
    out.write_json(
        "env.json", {"command": "cvlab train x", "provenance": {"seed": "command line", "optimizer.lr": "file"}}
    )
    out.write_json(
        "summary.json", {"experiment": "classify", "metrics": {"val_accuracy": 0.5}, "expect": [], **summary}
    )
    for row in metrics:
        out.append(row)
    return path


@pytest.fixture
def root(tmp_path):
    return tmp_path / "runs"


class TestRun:
    def test_it_tells_configuration_verdicts_curves_and_pictures(self, root):
        rows = [{"step": k, "train_loss": 3 / (k + 1), "val_accuracy": 0.1 * k, "lr": 0.01} for k in range(5)]
        verdict = {"rule": "val_accuracy >= 0.9", "measured": 0.5, "met": False}
        result = {
            "image": "/photos/cat.png",
            "picture": "images/cat-boxes.png",
            "objects": [{"label": "cat", "score": 0.9}],
        }
        path = made(root, metrics=rows, expect=[verdict], results=[result], columns=COLUMNS)
        Image.new("RGB", (2000, 500), "red").save(path / "images" / "cat-boxes.png")
        Image.new("RGB", (20, 20), "blue").save(path / "images" / "other.png")
        found = read(html.run_page(path))
        words = " ".join(found.words)
        for told in (
            "val_accuracy >= 0.9",
            "not met",
            "cat 0.90",
            "command line",
            "cvlab train x",
            "learning rate",
            "0.4",
        ):
            assert told in words, told
        assert found.tags.count("svg") == 3
        assert found.tags.count("img") == 2
        assert all(address.startswith("data:") for address in found.addresses)

    def test_names_are_shown_not_run(self, root):
        path = made(root, metrics=[{"step": 1, WICKED: 1.0, "../../x": 2.0}, {"step": 2, WICKED: 2.0, "../../x": 2.0}])
        (path / "config.yaml").write_text(json.dumps({"experiment": "classify", "name": WICKED}))
        text = html.run_page(path)
        assert WICKED not in text
        assert entities.escape(WICKED) in text
        assert "../../x" in text
        assert read(text).tags.count("script") == 1
        data = json.loads(entities.unescape(re.search(r'data-chart="([^"]*)"', text).group(1)))
        assert data["lines"][0]["name"] == WICKED

    def test_a_picture_outside_of_the_run_is_left_out(self, root):
        secret = root / "secret.png"
        results = [{"image": "a", "picture": "../secret.png"}, {"image": "b", "picture": "images/broken.png"}]
        path = made(root, results=results, columns=COLUMNS)
        Image.new("RGB", (5, 5)).save(secret)
        (path / "images" / "broken.png").write_bytes(b"no picture")
        assert "img" not in read(html.run_page(path)).tags

    def test_more_pictures_than_fit_are_counted(self, root, monkeypatch):
        monkeypatch.setattr(embedded, "MAX_IMAGES", 3)
        path = made(root)
        for k in range(5):
            Image.new("RGB", (8, 8), (k, 0, 0)).save(path / "images" / f"{k}.png")
        text = html.run_page(path)
        assert read(text).tags.count("img") == 3
        assert "2 more images" in text

    @pytest.mark.parametrize("status", ["running", "failed", "interrupted"])
    def test_in_whatever_state(self, root, status):
        path = made(root, status=status)
        (path / "summary.json").unlink()
        assert "classify" in html.run_page(path)

    def test_curves_and_images_come_before_tables(self, root):
        path = made(root, metrics=[{"step": k, "train_loss": 1.0} for k in (1, 2)])
        Image.new("RGB", (8, 8)).save(path / "images" / "a.png")
        text = html.run_page(path)
        places = [text.index(f"<h2>{title}</h2>") for title in ("Curves", "Images", "Metrics", "Configuration")]
        assert places == sorted(places)
        assert "<table" not in text[: text.index("<h2>Curves")]

    def test_the_same_image_is_shown_once(self, root):
        columns = [{"name": "panel", "title": "panel", "is_file": True}, *COLUMNS]
        columns += [{"name": "map", "title": "map", "is_file": True, "is_part": True}]
        result = {"image": "/photos/cat.png", "panel": "images/panel.png", "map": "images/map.png"}
        path = made(root, results=[result, result], columns=columns)
        for name, color in (("panel", "red"), ("map", "blue"), ("copy", "red"), ("preview", "lime"), ("else", "pink")):
            Image.new("RGB", (8, 8), color).save(path / "images" / f"{name}.png")
        text = html.run_page(path)
        assert re.findall(r"<figcaption>([^<]*)</figcaption>", text) == ["panel", "images/else.png"]
        assert "in the run directory: images/map.png" in text

    def test_a_part_is_shown_where_there_is_no_panel(self, root):
        columns = [{"name": "map", "title": "map", "is_file": True, "is_part": True}]
        path = made(root, results=[{"image": "/photos/cat.png", "map": "images/map.png"}], columns=columns)
        Image.new("RGB", (8, 8)).save(path / "images" / "map.png")
        assert "<figcaption>map</figcaption>" in html.run_page(path)

    def test_an_image_that_the_run_made_comes_first(self, root):
        columns = [{"name": "animation", "title": "animation", "is_file": True}]
        path = made(root, results=[{"image": "images/a.png", "animation": "images/a.gif"}], columns=columns)
        Image.new("RGB", (8, 8)).save(path / "images" / "a.png")
        Image.new("RGB", (8, 8)).save(path / "images" / "a.gif")
        text = html.run_page(path)
        assert re.findall(r"<figcaption>([^<]*)</figcaption>", text) == ["result", "animation"]

    def test_a_failed_run_tells_what_failed_where_and_what_to_do(self, root):
        path = made(root, status="failed")
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
        assert "resume" not in html.run_page(made(root, "20261125-120000-y-0002"))

    def test_a_pruned_trial_is_not_to_be_resumed(self, root):
        path = made(root, status="interrupted")
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
        path = made(root, trials=trials)
        made(path / "trials", "000-lr")
        made(root, "other")
        found = read(html.run_page(path, html.Links(home="../index.html")))
        assert [a for a in found.addresses if not a.startswith("data:")] == [
            "../index.html",
            "trials/000-lr/report.html",
        ]
        assert "1.25" in found.words
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
            path = made(root, f"20261125-120000-x{k}-000{k}", rows)
            RunDir(path).write_json("summary.json", {"metrics": metrics, "metric_info": info, "seconds": 65.0})
        return {path.name: path for path in sorted(root.iterdir())}

    def test_it_links_to_the_runs_and_marks_the_best_values(self, runs, root):
        text = html.comparison_page(runs, html.links_from(root / "comparison.html", root))
        found = read(text)
        links = [address for address in found.addresses if not address.startswith("data:")]
        assert links == ["index.html", *(f"{name}/report.html" for name in runs)]
        assert re.findall(r'class="number best">([^<]*)<', text) == ["0.75", "0.75", "1"]
        assert "1 min 5 s" in found.words
        assert found.words.count("smoothing ") == 1
        assert {"log y axis", "log x axis"} <= {word.strip() for word in found.words}

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
        path = made(root, "20261126-134501-x-0001", seconds=3725.0)
        Image.new("RGB", (600, 300), "red").save(path / "images" / "a.png")
        columns = [{"name": "picture", "title": "picture", "is_file": True}]
        results = [{"image": "/a.png", "picture": "images/a.png"}]
        RunDir(path).write_json("summary.json", {"seconds": 3725.0, "results": results, "columns": columns})
        html.write_run(path)
        html.write_index(root, index.runs(root))
        found = read((root / "index.html").read_text())
        assert {"2026-11-26 13:45", "1 h 2 min", "1 run"} <= set(found.words)
        (source,) = [address for address in found.addresses if address.startswith("data:image/png")]
        with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as image:
            assert image.size == (192, 96)
            assert image.getpixel((90, 50)) == (255, 0, 0)

    def test_curves_are_previewed(self, root):
        info = {"val_accuracy": {"unit": "fraction", "better": "higher"}}
        path = made(root, metrics=[{"step": k, "val_accuracy": k / 10} for k in range(1, 9)], metric_info=info)
        embedded.write_thumbnail(path)
        with Image.open(path / "thumbnail.png") as image:
            assert image.getpixel((0, 0))[3] == 0
            width, height = image.size
            assert image.getpixel((5, height - 6))[:3] == ImageColor.getrgb(colors.LIGHT[1])
            assert image.getpixel((width - 6, 6))[3] == 255

    def test_a_thumbnail_is_an_image_of_bounded_size(self, root):
        path = made(root)
        for content in (b"<svg onload=alert(1)>", embedded.PNG_SIGNATURE + bytes(embedded.MAX_THUMBNAIL_BYTES)):
            (path / "thumbnail.png").write_bytes(content)
            assert embedded.read_thumbnail(path) is None

    def test_a_run_without_a_page_is_not_linked(self, root):
        path = made(root, status="failed")
        html.write_index(root, index.runs(root))
        assert f'<span class="name">{path.name}</span>' in (root / "index.html").read_text()
        html.write_run(path)
        html.write_index(root, index.runs(root))
        assert f'<a href="{path.name}/report.html">{path.name}</a>' in (root / "index.html").read_text()

    def test_durations(self):
        shown = [html.duration_text(seconds) for seconds in (None, 0.04, 9.97, 59.4, 61, 3599.6, 7300)]
        assert shown == ["", "0.0 s", "10 s", "59 s", "1 min 1 s", "1 h 0 min", "2 h 1 min"]


class TestChart:
    def test_ticks_are_round_and_hold_all_values(self):
        for values in ([0.0, 1.0], [0.013, 0.97], [-5, 1234.0], [3.0, 3.0], [0.0, 0.0], [1e-9, 3e-9]):
            found = svg.ticks(values)
            assert found[0] <= min(values)
            assert found[-1] >= max(values)
            assert 2 <= len(found) <= 2 * svg.TICKS

    def test_lines_stay_inside_and_are_thinned_to_their_last_point(self):
        xs = list(range(5000))
        made = svg.chart("loss", {"a": (xs, [1 / (x + 1) for x in xs]), "nothing": ([1], [float("nan")])})
        (line,) = made.lines
        assert len(line.xs) <= svg.MAX_POINTS + 1
        assert line.xs[-1] == 4999
        assert len(made.rows) <= svg.MAX_ROWS
        points = [tuple(map(float, pair.split(","))) for pair in line.path.split()]
        assert all(0 <= x <= svg.WIDTH and 0 <= y <= svg.HEIGHT for x, y in points)
        assert points[0][1] < points[-1][1]  # down the page is down
        assert svg.chart("empty", {"a": ([], [])}) is None


class TestCommands:
    def test_a_training_writes_its_page_and_the_list_of_runs(self, cvlab, tmp_path):
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
            made(root, f"20261125-120000-x{k}-000{k}", [{"step": 1, "val_loss": k}, {"step": 2, "val_loss": k + 1.5}])
        code, out, _ = cvlab("report", "x0", "x1", "--runs-dir", root, "--json")
        found = read((root / "comparison.html").read_text())
        assert code == 0
        assert json.loads(out)["files"] == [str(root / "comparison.html")]
        assert "x0-0000" in found.words
        assert "svg" in found.tags

    def test_refusals(self, cvlab, root, tmp_path):
        made(root)
        assert cvlab("report", "nothing", "--runs-dir", root)[0] == 5
        code, _, err = cvlab("report", "x-0001", "--out", tmp_path / "no" / "r.html", "--runs-dir", root)
        assert code == 5
        assert "r.html" in err


def test_an_index_of_many_runs_is_a_line_each():
    row = {"status": "done", "experiment": "classify", "data": None, "result": "", "metrics": {}}
    text = html.index_page([{**row, "run": f"run {k}"} for k in range(5000)])
    assert text.count("<tr>") == 5001
    assert len(text) < 2_000_000
    assert "run%204999/report.html" in text


class TestServer:
    @pytest.fixture
    def ask(self, root):
        made(root, f"20261125-120000-a{WICKED.replace('/', '_')}-0001")
        made(root)
        (root.parent / "secret.txt").write_text("secret")
        with serve.Server(root, 0) as server:
            thread = threading.Thread(target=server.serve_forever, args=(0.01,))
            thread.start()

            def call(path, host=None, method="GET"):
                connection = http.client.HTTPConnection("127.0.0.1", server.server_port)
                connection.request(method, path, headers={"Host": host or f"localhost:{server.server_port}"})
                answer = connection.getresponse()
                return answer.status, answer.read().decode()

            yield call
            server.shutdown()
            thread.join()

    def test_pages(self, ask):
        status, text = ask("/")
        assert status == 200
        assert "/20261125-120000-x-0001/" in text
        assert WICKED not in text
        status, text = ask("/20261125-120000-x-0001/")
        assert status == 200
        assert "val_accuracy" in text

    def test_chosen_runs_are_compared(self, ask, root):
        made(root, "20261126-120000-y-0002")
        status, text = ask("/compare?run=20261125-120000-x-0001&run=20261126-120000-y-0002&run=../secret.txt")
        assert status == 200
        assert 'href="/20261126-120000-y-0002/"' in text
        assert "Comparison of 2 runs" in text
        assert ask("/compare")[0] == 404

    def test_trials_of_a_sweep(self, ask, root):
        sweep = root / "20261125-120000-x-0001"
        made(sweep / "trials", "000-a")
        trial = {"trial": "000-a", "status": "done", "metrics": {}, "seed": 0}
        RunDir(sweep).write_json("summary.json", {"trials": [trial]})
        assert f'href="/{sweep.name}/trials/000-a/"' in ask(f"/{sweep.name}/")[1]
        status, text = ask(f"/{sweep.name}/trials/000-a/")
        assert status == 200
        assert f'<a href="/{sweep.name}/">sweep</a>' in text
        assert ask(f"/{sweep.name}/trials/../")[0] == 404

    @pytest.mark.parametrize(
        "path", ["/../secret.txt", "/%2e%2e/secret.txt", "/x/../../secret.txt", "//etc/passwd", "/nothing/"]
    )
    def test_no_path_leaves_the_folder(self, ask, path):
        status, text = ask(path)
        assert status == 404
        assert "secret" not in text
        assert "root:" not in text

    @pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example:80"])
    def test_another_host_is_refused(self, ask, host):
        assert ask("/", host)[0] == 403

    def test_it_only_reads(self, ask):
        assert ask("/", method="POST")[0] == 501
        assert ask("/", method="HEAD") == (200, "")

    def test_a_port_that_is_taken(self, root):
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
