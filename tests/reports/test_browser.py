"""The pages about runs in a real browser: Chromium, controlled through chromedriver."""

import itertools
import json
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request

import pytest
from PIL import ImageColor

from cvlab.api import serve
from cvlab.cli.main import run_command_line
from cvlab.reports import colors, html, index
from cvlab.runs import records
from cvlab.runs.run_dir import RunDir

pytestmark = pytest.mark.browser
ARGUMENTS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]


class Browser:
    """A session of the WebDriver protocol with the few commands that these tests need."""

    def __init__(self, port):
        self.root = f"http://127.0.0.1:{port}"
        options = {"goog:chromeOptions": {"args": ARGUMENTS}}
        options["goog:loggingPrefs"] = {"browser": "ALL", "performance": "ALL"}
        session = self.send("POST", "/session", {"capabilities": {"alwaysMatch": options}})
        self.root += f"/session/{session['sessionId']}"

    def send(self, method, path, body=None):
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(self.root + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)["value"]

    def open_page(self, path):
        self.send("POST", "/url", {"url": path.as_uri()})

    def emulate(self, color_scheme, width=1400):
        """Set the preferred color scheme and the width of the viewport, which may be less than that of any window."""
        features = [{"name": "prefers-color-scheme", "value": color_scheme}]
        self.devtools("Emulation.setEmulatedMedia", {"features": features})
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.devtools("Emulation.setDeviceMetricsOverride", size)

    def devtools(self, command, parameters):
        return self.send("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def run(self, script, *arguments):
        return self.send("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def read_log(self, kind):
        return self.send("POST", "/se/log", {"type": kind})

    def requested_urls(self):
        """Return the URLs that were requested since the last call."""
        messages = [json.loads(entry["message"])["message"] for entry in self.read_log("performance")]
        urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return [url for url in urls if not url.startswith("data:")]


@pytest.fixture(scope="module")
def browser():
    driver_path = shutil.which("chromedriver")
    if driver_path is None or not (shutil.which("chromium") or shutil.which("google-chrome")):
        pytest.skip("no chromium with its chromedriver on this machine")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([driver_path, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(100):
            try:
                session = Browser(port)
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.1)
        yield session
        session.send("DELETE", "")
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(autouse=True)
def light_and_wide(request):
    """Start each test with the light color scheme and a width of 1400 px."""
    request.getfixturevalue("browser").emulate("light")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Return a folder with two training runs, an attack, a failed run whose name is markup, and a comparison."""
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
        options = [*short, "optimizer.lr=0.004", "--runs-dir", str(root), "-q"]
        assert run_command_line(["train", "quickstart", "name=second", *options]) == 0
    path = root / "20991231-120000-<b>odd-0001"
    path.mkdir()
    (path / "config.yaml").write_text("experiment: classify\nseed: 3\n")
    error = "the loss is not finite; lower optimizer.lr"
    RunDir(path).set_status("failed", experiment="classify", data="scenes10", step=3, total_steps=9, error=error)
    html.write_run(path)
    html.write_index(root, index.runs(root))
    names = sorted(path.name for path in root.iterdir() if "quickstart" in path.name or "second" in path.name)
    page = html.comparison_page({name: root / name for name in names}, html.links_from(root / "c.html", root))
    (root / html.COMPARISON).write_text(page)
    return root


BROKEN_WORDS = """
const walker = document.createTreeWalker(document.querySelector('main'), NodeFilter.SHOW_TEXT);
const broken = [];
while (walker.nextNode()) {
  const node = walker.currentNode;
  for (const match of node.data.matchAll(/[^\\s-]+/g)) {
    const range = document.createRange();
    range.setStart(node, match.index);
    range.setEnd(node, match.index + match[0].length);
    const tops = new Set([...range.getClientRects()].filter((r) => r.width > 1).map((r) => Math.round(r.top)));
    if (tops.size > 1) broken.push(match[0]);
  }
}
return broken
"""
PAGES = ("quickstart", "attack", "odd", "index.html", "comparison.html")


def page_path(root, name):
    return root / name if name.endswith(".html") else next(root.glob(f"*{name}-*")) / "report.html"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("name", PAGES)
def test_pages_fit_and_are_legible(browser, root, name, width, scheme):
    browser.emulate(scheme, width)
    browser.open_page(page_path(root, name))
    assert browser.run("return document.documentElement.scrollWidth") <= width
    assert browser.run(BROKEN_WORDS) == []
    css_colors = browser.run(
        "return ['body', 'h1', 'a', 'td', 'th'].map((t) => document.querySelector(t)).filter(Boolean)"
        ".map((e) => getComputedStyle(e).color).concat(getComputedStyle(document.body).backgroundColor)"
    )
    *foregrounds, background = [luminance(color) for color in css_colors]
    assert (background > 0.5) == (scheme == "light")
    assert all(
        (max(foreground, background) + 0.05) / (min(foreground, background) + 0.05) >= 4.5 for foreground in foregrounds
    )


def luminance(color):
    """Return the relative luminance of a CSS color, as defined by WCAG 2."""
    channels = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
    red, green, blue = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize(("scheme", "palette"), [("light", colors.LIGHT), ("dark", colors.DARK)])
def test_curves_have_the_colors_of_their_splits(browser, root, scheme, palette):
    browser.emulate(scheme)
    browser.open_page(page_path(root, "quickstart"))
    strokes = browser.run(
        "const lines = {};"
        "for (const svg of document.querySelectorAll('svg')) {"
        "  const names = JSON.parse(svg.dataset.chart).lines.map((line) => line.name);"
        "  svg.querySelectorAll('.lines > *').forEach((e, k) => { lines[names[k]] = getComputedStyle(e).stroke; });"
        "}"
        "return lines"
    )
    for name, number in (("train_loss", 0), ("train_accuracy", 0), ("val_loss", 1), ("val_accuracy", 1)):
        assert strokes[name] == f"rgb{ImageColor.getrgb(palette[number])}", name


CONTROLS = """
const set = (selector, change) => {
  const input = document.querySelector(`.controls ${selector}`);
  change(input);
  input.dispatchEvent(new Event('input', {bubbles: true}));
};
const state = () => {
  const svg = document.querySelector('svg');
  const texts = [...svg.querySelectorAll('.axes text')];
  const numbers = (anchor) => texts.filter((t) => t.getAttribute('text-anchor') === anchor)
    .map((t) => Number(t.textContent.replace(/,/g, '')));
  return {
    y: numbers('end'),
    x: numbers('middle'),
    lines: [...svg.querySelectorAll('.lines > :not(.faint)')].map((l) => l.getAttribute('points') ?? ''),
    faint: svg.querySelectorAll('.faint').length,
    hidden: document.querySelector('.controls').hidden,
  };
};
"""


@pytest.mark.parametrize("name", ["comparison.html", "quickstart"])
def test_curves_are_smoothed_and_have_logarithmic_axes(browser, root, name):
    browser.open_page(page_path(root, name))
    before = browser.run(f"{CONTROLS} return state()")
    assert not before["hidden"]
    redrawn = browser.run(f"{CONTROLS} set('input[type=range]', (i) => {{ i.value = 0; }}); return state()")
    assert redrawn["x"] == before["x"], "the script draws the same chart as the page"
    assert redrawn["y"] == before["y"]
    assert points(redrawn["lines"][0]) == pytest.approx(points(before["lines"][0]), abs=0.2)
    smoothed = browser.run(f"{CONTROLS} set('input[type=range]', (i) => {{ i.value = 0.9; }}); return state()")
    assert smoothed["faint"] == len(smoothed["lines"])
    assert roughness(smoothed["lines"][0]) < 0.7 * roughness(before["lines"][0])
    log_axes = browser.run(
        f"{CONTROLS} for (const a of 'xy') set(`[data-log=${{a}}]`, (i) => {{ i.checked = true; }}); return state()"
    )
    for axis in "xy":
        assert all(re.fullmatch(r"[125]0*", f"{tick:.9f}".replace(".", "").strip("0") + "0") for tick in log_axes[axis])
        assert log_axes[axis] != before[axis]
        assert log_axes[axis] == sorted(log_axes[axis])
    assert all(0 <= x <= 480 and 0 <= y <= 260 for x, y in zip(*[iter(points(log_axes["lines"][0]))] * 2, strict=True))


def points(text):
    return [float(number) for pair in text.split() for number in pair.split(",")]


def roughness(text):
    heights = points(text)[1::2]
    return sum(abs(b - a) for a, b in itertools.pairwise(heights))


def test_selected_runs_are_compared_without_a_server(browser, root):
    browser.open_page(root / "index.html")
    disabled = "return document.querySelector('form.compare button').disabled"
    assert browser.run(disabled)
    names = browser.run(
        "const inputs = [...document.querySelectorAll('input[name=run]')]"
        "  .filter((i) => /quickstart|second/.test(i.value));"
        "for (const input of inputs) input.click();"
        "return inputs.map((i) => i.value)"
    )
    assert len(names) == 2
    assert not browser.run(disabled)
    browser.run("document.querySelector('form.compare button').click()")
    table = browser.run(
        "const t = document.querySelector('#comparison table');"
        "return [...t.rows].map((r) => [...r.cells].map((c) => [c.textContent, c.className.includes('best')]))"
    )
    assert [text for text, _ in table[0]] == ["metric", *sorted(names)]
    rows = {row[0][0]: row[1:] for row in table[1:]}
    losses = [json.loads((root / name / "summary.json").read_text())["metrics"]["val_loss"] for name in sorted(names)]
    assert [best for _, best in rows["val_loss"]] == [loss == min(losses) for loss in losses]
    assert not any(best for _, best in rows["steps"])
    assert browser.run("return document.querySelector('#comparison').checkVisibility()")
    assert browser.run("return document.querySelector('#comparison code').textContent").startswith("cvlab report ")
    browser.run("document.querySelector('#comparison th a').click()")
    assert browser.run("return document.querySelector('h1').innerText") == sorted(names)[0]


def test_the_server_compares_selected_runs(browser, root):
    with serve.Server(root, 0) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        browser.send("POST", "/url", {"url": server.address})
        browser.run(
            "for (const i of document.querySelectorAll('input[name=run]'))"
            "  if (/quickstart|second/.test(i.value)) i.click();"
            "document.querySelector('form.compare button').click()"
        )
        assert browser.run("return document.querySelector('h1').innerText") == "Comparison of 2 runs"
        assert browser.run("return document.querySelectorAll('.best').length") > 1
        browser.run("document.querySelector('#compared-runs a').click()")
        assert "quickstart" in browser.run("return document.querySelector('h1').innerText")
        browser.run("document.querySelector('nav a').click()")
        assert browser.run("return document.querySelector('h1').innerText") == "Runs"
        server.shutdown()


def test_a_failed_run_shows_how_to_resume_it(browser, root):
    browser.open_page(page_path(root, "odd"))
    text = browser.run("return document.querySelector('.failure').innerText")
    assert "Failed at step 3 of 9" in text
    assert "the loss is not finite; lower optimizer.lr" in text
    assert "cvlab resume 20991231-120000-<b>odd-0001" in text


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize(("name", "num_images"), [("quickstart", 3), ("attack", 1)])
def test_a_report_shows_its_images_and_makes_no_further_requests(browser, root, width, name, num_images):
    page = page_path(root, name)
    browser.emulate("light", width)
    browser.read_log("browser"), browser.requested_urls()
    browser.open_page(page)
    browser.run("for (const image of document.images) image.loading = 'eager'")  # also those outside the viewport
    deadline = time.monotonic() + 10
    while not browser.run("return [...document.images].every((i) => i.complete && i.naturalWidth > 0)"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert browser.run("return document.images.length") >= num_images
    assert browser.requested_urls() == [page.as_uri()]
    assert [entry for entry in browser.read_log("browser") if entry["level"] == "SEVERE"] == []


def test_values_can_be_read_with_the_keyboard(browser, root):
    browser.open_page(page_path(root, "quickstart"))
    readout = browser.run(
        "const svg = document.querySelector('svg'); svg.focus();"
        "for (const key of ['ArrowRight', 'ArrowRight', 'ArrowRight'])"
        "  svg.dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true}));"
        "return svg.closest('figure').querySelector('.readout').textContent"
    )
    rows = [json.loads(line) for line in next(root.glob("*quickstart*/metrics.jsonl")).read_text().splitlines()]
    value = next(row["train_loss"] for row in rows if row.get("step") == 3)
    assert readout.startswith(f"step 3: train_loss {float(f'{value:.5g}'):.5g}"), readout


def test_the_numbers_are_shown_without_a_script(root):
    text = (next(root.glob("*quickstart*")) / "report.html").read_text()
    assert "<td>20</td>" in text.partition("<script>")[0]
    assert "train_loss" in text


def test_runs_are_sorted_and_filtered(browser, root):
    browser.open_page(root / "index.html")
    list_names = (
        "return [...document.querySelectorAll('#runs tbody tr')]"
        ".filter((r) => !r.hidden).map((r) => r.cells[2].innerText)"
    )
    newest_first = browser.run(list_names)
    assert len(newest_first) == 4
    assert "<b>odd" in newest_first[0]
    browser.run("document.querySelector('#runs th button').click()")
    assert browser.run(list_names) == newest_first[::-1]
    set_filter = (
        "const i = document.querySelector('input[type=search]');"
        "i.value = arguments[0]; i.dispatchEvent(new Event('input'))"
    )
    browser.run(set_filter, "done quick")
    assert browser.run(list_names) == [name for name in newest_first if "quickstart" in name]
    assert browser.run("return document.getElementById('count').textContent") == "1 of 4 runs"
    browser.run(set_filter, "")
    browser.run("document.querySelector('#runs tbody a').click()")
    assert browser.run("return document.querySelector('h1').innerText") == newest_first[-1]


def test_ui_shows_the_progress_of_a_run(browser, root, monkeypatch):
    monkeypatch.setattr(records, "is_held", lambda path: path.name.startswith("2099"))  # this process holds no lock
    path = root / "20991231-130000-going-0002"
    path.mkdir()
    (path / "config.yaml").write_text("experiment: classify\n")
    with serve.Server(root, 0) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        run = RunDir(path)
        run.set_status("running", experiment="classify")
        run.append({"step": 1, "train_loss": 0.5})
        browser.send("POST", "/url", {"url": f"{server.address}{path.name}/"})
        is_shown = "return document.body.innerText.includes(arguments[0])"
        assert browser.run(is_shown, "running")
        assert not browser.run(is_shown, "0.125")
        run.append({"step": 2, "train_loss": 0.125})
        deadline = time.monotonic() + 30
        while not browser.run(is_shown, "0.125") and time.monotonic() < deadline:
            time.sleep(0.2)
        assert browser.run(is_shown, "0.125")
        server.shutdown()


def test_trials_in_parallel_coordinates_can_be_read_and_selected(browser, tmp_path):
    (tmp_path / "config.yaml").write_text("experiment: sweep\n")
    keys = [{"lr": 10.0**-k, "bn": k % 2 == 0} for k in range(6)]
    rows = [{"trial": f"00{k}", "metrics": {}, "keys": row, "value": 0.1 * k} for k, row in enumerate(keys)]
    importance = {"metric": "val_accuracy", "log_keys": ["lr"], "reason": "few"}
    (tmp_path / "summary.json").write_text(json.dumps({"trials": rows, "importance": importance}))
    html.write_run(tmp_path)
    browser.open_page(tmp_path / html.FILE)
    script = """
    const svg = document.querySelector("svg[data-parallel]"), figure = svg.closest("figure");
    const box = svg.getBoundingClientRect(), scale = box.width / svg.viewBox.baseVal.width;
    svg.setPointerCapture = () => {};
    const send = (type, x, y) => svg.dispatchEvent(new PointerEvent(type, {
      clientX: box.left + x * scale, clientY: box.top + y * scale, pointerId: 1, bubbles: true }));
    const seen = [];
    const note = () => seen.push([figure.querySelector(".readout").textContent, svg.querySelectorAll(".faint").length]);
    svg.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowLeft" }));
    note();
    const last = Number([...svg.querySelectorAll(".axis")].pop().dataset.x);
    send("pointerdown", last, 20); send("pointermove", last, 180); send("pointerup", last, 180);
    note();
    send("pointermove", last - 1, 34);
    note();
    send("pointerdown", last, 100); send("pointerup", last, 100);
    note();
    return seen
    """
    best = "005: lr 1e-05, bn false, val_accuracy 0.5"
    assert browser.run(script) == [[best, 0], ["3 of 6 trials", 3], [best, 3], ["", 0]]
    assert browser.read_log("browser") == []
