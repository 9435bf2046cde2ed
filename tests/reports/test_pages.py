"""The pages about runs: self-contained, safe whatever a name holds, complete without a script; served read-only."""

import html as entities
import http.client
import json
import re
import threading
from html.parser import HTMLParser

import pytest
from PIL import Image

from cvlab.api import serve
from cvlab.reports import html, svg
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
        monkeypatch.setattr(html, "MAX_IMAGES", 3)
        path = made(root)
        for k in range(5):
            Image.new("RGB", (8, 8)).save(path / "images" / f"{k}.png")
        text = html.run_page(path)
        assert read(text).tags.count("img") == 3
        assert "2 more images" in text

    @pytest.mark.parametrize("status", ["running", "failed", "interrupted"])
    def test_in_whatever_state(self, root, status):
        path = made(root, status=status)
        (path / "summary.json").unlink()
        assert "classify" in html.run_page(path)


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
            thread = threading.Thread(target=server.serve_forever)
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
