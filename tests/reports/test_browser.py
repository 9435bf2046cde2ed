"""The pages about runs in a real browser: Debian's chromium, driven through its own driver."""

import json
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request

import pytest

from cvlab.api import serve
from cvlab.cli.main import run_command_line
from cvlab.reports import html, index
from cvlab.runs import records
from cvlab.runs.run_dir import RunDir

pytestmark = pytest.mark.browser
ARGUMENTS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]


class Browser:
    """A session of the WebDriver protocol, as far as it is needed here."""

    def __init__(self, port):
        self.root = f"http://127.0.0.1:{port}"
        options = {"goog:chromeOptions": {"args": ARGUMENTS}}
        options["goog:loggingPrefs"] = {"browser": "ALL", "performance": "ALL"}
        made = self.ask("POST", "/session", {"capabilities": {"alwaysMatch": options}})
        self.root += f"/session/{made['sessionId']}"

    def ask(self, method, path, body=None):
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(self.root + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, path, width=1400, height=900):
        self.ask("POST", "/window/rect", {"width": width, "height": height})
        self.ask("POST", "/url", {"url": path.as_uri()})

    def run(self, script, *arguments):
        return self.ask("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def logged(self, kind):
        return self.ask("POST", "/se/log", {"type": kind})

    def requested(self):
        """Return the addresses that were asked for since the last time."""
        messages = [json.loads(entry["message"])["message"] for entry in self.logged("performance")]
        sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return [address for address in sent if not address.startswith("data:")]


@pytest.fixture(scope="module")
def browser():
    driver = shutil.which("chromedriver")
    if driver is None or not (shutil.which("chromium") or shutil.which("google-chrome")):
        pytest.skip("no chromium with its chromedriver on this machine")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([driver, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(100):
            try:
                made = Browser(port)
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.1)
        yield made
        made.ask("DELETE", "")
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A training and an attack as the program leaves them, and a run with a name that is markup."""
    root = tmp_path_factory.mktemp("runs")
    short = [
        "duration={steps: 20}",
        "data.num_train=64",
        "batch_size=8",
        "evaluate_test=false",
        "expect=[]",
        "log_every=1",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CVLAB_DATA", str(tmp_path_factory.mktemp("data")))
        patch.setenv("CVLAB_OFFLINE", "1")
        assert run_command_line(["train", "quickstart", *short, "--runs-dir", str(root), "-q"]) == 0
        assert run_command_line(["attack", "sample", "--target", "ostrich", "--runs-dir", str(root), "-q"]) == 0
    path = root / "20991231-120000-<b>odd-0001"
    path.mkdir()
    (path / "config.yaml").write_text("experiment: classify\nseed: 3\n")
    RunDir(path).set_status("failed", experiment="classify", data="scenes10")
    html.write_run(path)
    html.write_index(root, index.runs(root))
    return root


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize(("name", "pictures"), [("quickstart", 0), ("attack", 2)])
def test_a_report_shows_its_pictures_and_asks_for_nothing(browser, root, width, name, pictures):
    page = next(root.glob(f"*-{name}-*")) / "report.html"
    browser.logged("browser"), browser.requested()
    browser.open(page, width)
    assert browser.run("return [...document.images].every((i) => i.complete && i.naturalWidth > 0)")
    assert browser.run("return document.images.length") == pictures
    assert browser.run("return document.documentElement.scrollWidth <= window.innerWidth")
    assert browser.requested() == [page.as_uri()]
    assert [entry for entry in browser.logged("browser") if entry["level"] == "SEVERE"] == []


def test_values_are_read_by_keyboard(browser, root):
    browser.open(next(root.glob("*quickstart*")) / "report.html")
    said = browser.run(
        "const svg = document.querySelector('svg'); svg.focus();"
        "for (const key of ['ArrowRight', 'ArrowRight', 'ArrowRight'])"
        "  svg.dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true}));"
        "return svg.closest('figure').querySelector('.readout').textContent"
    )
    rows = [json.loads(line) for line in next(root.glob("*quickstart*/metrics.jsonl")).read_text().splitlines()]
    value = next(row["train_loss"] for row in rows if row.get("step") == 3)
    assert said.startswith(f"step 3: train_loss {float(f'{value:.5g}'):.5g}"), said


def test_the_numbers_are_there_without_a_script(root):
    text = (next(root.glob("*quickstart*")) / "report.html").read_text()
    assert "<td>20</td>" in text.partition("<script>")[0]
    assert "train_loss" in text


def test_runs_are_sorted_and_filtered(browser, root):
    browser.open(root / "index.html")
    names = (
        "return [...document.querySelectorAll('tbody tr')].filter((r) => !r.hidden).map((r) => r.cells[0].innerText)"
    )
    newest_first = browser.run(names)
    assert len(newest_first) == 3
    assert "<b>odd" in newest_first[0]
    browser.run("document.querySelector('th button').click()")
    assert browser.run(names) == newest_first[::-1]
    filtering = "const i = document.querySelector('input'); i.value = arguments[0]; i.dispatchEvent(new Event('input'))"
    browser.run(filtering, "done quick")
    assert browser.run(names) == [name for name in newest_first if "quickstart" in name]
    assert browser.run("return document.getElementById('count').textContent") == "1 of 3 runs"
    browser.run(filtering, "")
    browser.run("document.querySelector('tbody a').click()")
    assert browser.run("return document.querySelector('h1').innerText") == newest_first[-1]


def test_ui_shows_a_run_go_on(browser, root, monkeypatch):
    monkeypatch.setattr(
        records, "is_held", lambda path: path.name.startswith("2099")
    )  # a lock does not hold its own process
    path = root / "20991231-130000-going-0002"
    path.mkdir()
    (path / "config.yaml").write_text("experiment: classify\n")
    with serve.Server(root, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        out = RunDir(path)
        out.set_status("running", experiment="classify")
        out.append({"step": 1, "train_loss": 0.5})
        browser.ask("POST", "/url", {"url": f"{server.address}{path.name}/"})
        measured = "return document.body.innerText.includes(arguments[0])"
        assert browser.run(measured, "running")
        assert not browser.run(measured, "0.125")
        out.append({"step": 2, "train_loss": 0.125})
        deadline = time.monotonic() + 30
        while not browser.run(measured, "0.125") and time.monotonic() < deadline:
            time.sleep(0.2)
        assert browser.run(measured, "0.125")
        server.shutdown()
