"""Run directories that are damaged or written to concurrently: readers succeed or raise a one-line error."""

import copy
import json
import random
import threading

import pytest

from cvlab.errors import CvlabError
from cvlab.reports import compare, html, index, tables
from cvlab.runs.records import is_run
from cvlab.runs.run_dir import RunDir

FILES = ("config.yaml", "env.json", "status.json", "summary.json", "metrics.jsonl", "log.txt")
UNUSUAL_VALUES = (
    None,
    True,
    -1,
    10**400,
    1e308,
    float("nan"),
    "",
    "<b>",
    "../../x",
    [],
    {},
    [[]],
    [None],
    {"a": {"b": None}},
    "\0",
)
RESULT = {"image": "a.png", "objects": [{"label": "dog", "score": 0.5}], "picture": "images/a.png", "steps": 3}
SUMMARY = {
    "experiment": "detect",
    "name": "x",
    "seconds": 1.5,
    "data": "scenes",
    "metrics": {"val_accuracy": 0.5, "steps": 10},
    "metric_info": {"val_accuracy": {"unit": "fraction", "better": "higher"}},
    "expect": [{"rule": "val_accuracy > 0", "measured": 0.5, "met": True, "values": [0.5, 0]}],
    "results": [RESULT],
    "columns": [
        {"name": "objects", "title": "objects", "keys": ["objects", "steps"], "has_lines": True},
        {"name": "picture", "title": "picture", "unit": "px", "is_file": True},
    ],
    "settings": [
        {"keys": {"lr": 0.1}, "trials": 1, "status": ["done"], "metrics": {"val_loss": {"mean": 1, "sd": None, "n": 1}}}
    ],
}
ENV = {"time": "now", "command": "cvlab", "provenance": {"seed": "file"}, "threads": 2}
ROWS = [{"step": k, "train_loss": 1.0, "lr": 0.1} for k in range(4)]


def write(path):
    (path / "images").mkdir(parents=True)
    (path / "config.yaml").write_text("experiment: detect\nseed: 3\nmodel: {name: yolo}\n")
    out = RunDir(path)
    out.set_status("done", experiment="detect", data="scenes")
    out.write_json("env.json", ENV)
    out.write_json("summary.json", SUMMARY)
    for row in ROWS:
        out.append(row)
    (path / "log.txt").write_text("a line\n")


def key_paths(value, parents=()):
    """Yield the path of keys and indices to every value in a JSON document."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*parents, key)
        if isinstance(item, (dict, list)):
            yield from key_paths(item, (*parents, key))


def mutate(document, draw):
    """Return a document with one value replaced by an unusual one, or removed."""
    output = copy.deepcopy(document)
    *parents, last = draw.choice(list(key_paths(output)))
    block = output
    for key in parents:
        block = block[key]
    if draw.random() < 0.2:
        del block[last]
    else:
        block[last] = draw.choice(UNUSUAL_VALUES)
    return json.dumps(output)


def damage(path, draw):
    """Change one file of a run; return its name."""
    name = draw.choice(FILES)
    file = path / name
    raw = bytearray(file.read_bytes())
    kind = draw.choice(["cut", "flip", "odd", "odd", "odd", "bytes", "gone"])
    documents = {"env.json": ENV, "summary.json": SUMMARY, "status.json": {"status": "done", "experiment": "detect"}}
    if kind == "odd" and name == "metrics.jsonl":
        file.write_text("".join(f"{mutate(row, draw)}\n" for row in ROWS))
    elif kind == "odd" and name in documents:
        file.write_text(mutate(documents[name], draw))
    elif kind == "cut":
        file.write_bytes(raw[: draw.randrange(len(raw) + 1)])
    elif kind == "bytes":
        file.write_bytes(draw.randbytes(draw.randrange(200)))
    elif kind == "gone":
        file.unlink()
    else:
        raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
        file.write_bytes(raw)
    return f"{name}, {kind}"


@pytest.mark.parametrize("seed", range(300))
def test_a_damaged_run_is_listed_and_its_readers_raise_one_line_errors(tmp_path, seed, capsys):
    from cvlab.api import run

    draw = random.Random(seed)
    path = tmp_path / "20261125-120000-x-0001"
    write(path)
    damaged = damage(path, draw)
    intact = tmp_path / "20261125-120000-y-0002"
    write(intact)
    if is_run(path):
        rows = index.runs(tmp_path)
        assert [row["run"] for row in rows] == [path.name, intact.name], damaged
        html.index_page(rows)
    for read in (
        lambda: html.run_page(path),
        lambda: html.comparison_page({"x": path, "y": intact}),
        lambda: tables.show_comparison(compare.compare({"x": path, "y": intact})),
        lambda: tables.show_result(run.result(path)),
    ):
        try:
            read()
        except CvlabError as error:
            assert "\n" not in str(error), damaged
            assert path.name in str(error), damaged


def test_runs_are_read_while_they_are_written(tmp_path):
    path = tmp_path / "20261125-120000-x-0001"
    write(path)
    stopped = threading.Event()

    def write_repeatedly():
        out = RunDir(path)
        number = 4
        while not stopped.is_set():
            out.append({"step": number, "train_loss": 1.0})
            out.write_json("summary.json", SUMMARY)
            out.set_status("running", step=number)
            html.write_index(tmp_path, index.runs(tmp_path))
            number += 1

    html.write_index(tmp_path, index.runs(tmp_path))
    writers = [threading.Thread(target=write_repeatedly) for _ in range(2)]
    for writer in writers:
        writer.start()
    try:
        for _ in range(40):
            assert "train_loss" in html.run_page(path)
            assert "train_loss" in html.comparison_page({"x": path, "same": path})
            assert (tmp_path / html.INDEX).read_text().rstrip().endswith("</html>")
    finally:
        stopped.set()
        for writer in writers:
            writer.join()
