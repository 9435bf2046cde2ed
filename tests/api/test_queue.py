"""The queue: items run in order, once each, and survive kills, Ctrl-C, failures and concurrent runners."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cvlab.errors import RunDirError
from cvlab.runs import queue
from cvlab.runs.find import create_run, list_runs
from cvlab.runs.records import read_status, read_summary
from cvlab.storage.lock import RunLock
from tests.conftest import until

CONFIG = """experiment: classify
data: {name: scenes10, num_train: 100, val_fraction: 0.02}
model: {name: deep_convnet, filters: [4], pools: [0]}
optimizer: {name: sgd, lr: 1e-2}
batch_size: 20
duration: {steps: 4}
precision: float32
threads: 1
"""


@pytest.fixture(autouse=True)
def config(tmp_path):
    (tmp_path / "c.yaml").write_text(CONFIG)


def list_items(cvlab):
    return json.loads(cvlab("queue", "list", "--json")[1])["items"]


def test_items_are_listed_run_and_removed(cvlab, tmp_path):
    assert "the queue is empty" in cvlab("queue", "list")[1]
    assert cvlab("queue", "run")[0] == 0
    assert cvlab("queue", "add", "c.yaml", "optimizer.lr=1e-3", "-q")[0] == 0
    assert cvlab("queue", "add", "c.yaml", "name=second", "expect=[steps > 4]", "-q")[0] == 0
    code, out, _ = cvlab("queue", "add", "c.yaml", "--seed", 3, "--json", "-q")
    assert code == 0
    assert json.loads(out)["item"] == 3
    (tmp_path / "c.yaml").write_text("changed: later\n")
    items = list_items(cvlab)
    assert [(row["item"], row["status"]) for row in items] == [(1, "waiting"), (2, "waiting"), (3, "waiting")]
    assert items[0]["overrides"] == ["optimizer.lr=0.001"]
    code, out, _ = cvlab("queue", "rm", "3")
    assert code == 0
    assert "item 3 was removed" in out
    assert len(list_runs(tmp_path / "runs")) == 2, "a run that has not started is deleted"
    code, out, err = cvlab("queue", "run", "--json")
    assert code == 3, err
    document = json.loads(out)
    assert [row["status"] for row in document["items"]] == ["done", "expectations_failed"]
    assert document["error"]["message"].startswith("1 of 2 items failed, the first is item 2: expectations are not met")
    first = Path(items[0]["run"])
    before = (first / "summary.json").stat().st_mtime_ns
    assert cvlab("queue", "run", "--retry", "-q")[0] == 3
    assert (first / "summary.json").stat().st_mtime_ns == before, "an item with a result is not run again"
    assert cvlab("queue", "rm", "--done")[0] == 0
    assert first.is_dir()
    assert [row["item"] for row in list_items(cvlab)] == [2]
    assert cvlab("queue", "rm", "second")[0] == 0
    assert not list_items(cvlab)


def test_invalid_items_are_one_line_errors(cvlab, tmp_path):
    for arguments, code, message in (
        (("add", "c.yaml", "optimizer.lr=-1"), 2, "optimizer.lr: expected a number > 0"),
        (("add", "nosuch"), 2, "nosuch"),
        (("rm", "4"), 5, "no item '4' in the queue; `cvlab queue list` has their numbers"),
        (("rm",), 2, "no item is named"),
        (("run", "--workers", "0"), 2, "workers"),
    ):
        exit_code, _, err = cvlab("queue", *arguments)
        assert exit_code == code, err
        assert message in err
        assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()
    assert cvlab("queue", "add", "c.yaml", "-q")[0] == cvlab("queue", "add", "c.yaml", "-q")[0] == 0
    assert "2 items match 'c-'" in cvlab("queue", "rm", "c-")[2]
    deleted, remaining = queue.items(tmp_path / "runs")
    for file in deleted.run.iterdir():
        file.unlink()
    deleted.run.rmdir()
    code, _, err = cvlab("queue", "run", "-q")
    assert code == 5
    assert "the first is item 1" in err
    assert "the run directory is gone" in err
    assert read_status(remaining.run)["status"] == "done"


def test_a_failing_item_does_not_stop_the_rest(cvlab, tmp_path):
    (tmp_path / "net.py").write_text("from torch import nn\ndef net():\n    raise SystemError('no such layer')\n")
    good = CONFIG.replace("{name: deep_convnet, filters: [4], pools: [0]}", "{name: './good.py:net'}")
    (tmp_path / "good.py").write_text(
        "from torch import nn\ndef net():\n    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))\n"
    )
    (tmp_path / "good.yaml").write_text(good)
    assert cvlab("queue", "add", "c.yaml", "optimizer.lr=100", "reg=10.0", "duration.steps=40", "-q")[0] == 0
    assert cvlab("queue", "add", "good.yaml", "-q")[0] == 0
    assert cvlab("queue", "add", "good.yaml", "name=tampered", "-q")[0] == 0
    (tmp_path / "good.py").unlink()
    tampered = queue.items(tmp_path / "runs")[2].run / "good.py"
    tampered.write_text(tampered.read_text() + "print('changed')\n")
    code, _, err = cvlab("queue", "run", "--workers", 2)
    assert code == 6, err
    assert "2 of 3 items failed, the first is item 1: " in err
    rows = list_items(cvlab)
    assert [row["status"] for row in rows] == ["failed", "done", "waiting"]
    assert "was changed since; read it, then use --trust" in err
    code, _, err = cvlab("queue", "run", "--trust", "-q")
    assert code == 6, "a failed item keeps the exit code until it is removed"
    assert [row["status"] for row in list_items(cvlab)] == ["failed", "done", "done"]


def test_an_item_is_claimed_by_one_process_at_a_time(tmp_path):
    root = tmp_path / "runs"
    run = create_run(root, "a", is_latest=False).path
    assert not (root / "latest").exists()
    item = queue.add(root, run)
    assert queue.items(root) == [item]
    assert list(queue.find(root, ["1", run.name])) == [item]
    command = f"from cvlab.runs import queue; from pathlib import Path; root = Path({str(root)!r})\n"
    command += "print(queue.claim(queue.items(root)[0]) is not None)"

    def claimed_elsewhere():
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        return subprocess.check_output([sys.executable, "-c", command], env=environment, text=True)

    held = queue.claim(item)
    assert claimed_elsewhere() == "False\n"
    held.release()
    assert claimed_elsewhere() == "True\n"
    held = queue.claim(item)
    queue.remove(item, held)
    assert queue.items(root) == []
    with pytest.raises(RunDirError, match="no item '1'"):
        list(queue.find(root, ["1"]))
    assert queue.claim(item) is None, "it has been removed"


def add_items(cvlab, count, steps):
    for number in range(count):
        changes = (f"name=r{number}", f"duration.steps={steps}", "eval_every=1000")
        assert cvlab("queue", "add", "c.yaml", *changes, "-q")[0] == 0
    return [item.run for item in queue.items(Path("runs"))]


@pytest.fixture
def runner(tmp_path):
    """Return a function that starts `cvlab queue run` in another process; its standard error is in `stderr.txt`."""
    started = []

    def start(*arguments):
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        with (tmp_path / "stderr.txt").open("ab") as stderr:
            command = [sys.executable, "-m", "cvlab", "queue", "run", *arguments]
            started.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=stderr))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def count_starts(run):
    return (run / "log.txt").read_text().count("run directory")


@pytest.mark.faults
def test_ctrl_c_stops_and_the_next_runner_resumes(cvlab, tmp_path, runner):
    runs = add_items(cvlab, 2, 300)
    process = runner()
    until(lambda: (runs[0] / "metrics.jsonl").exists() and (runs[0] / "metrics.jsonl").stat().st_size > 0)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    assert "continue with `cvlab queue run`" in (tmp_path / "stderr.txt").read_text()
    assert [row["status"] for row in list_items(cvlab)] == ["interrupted", "waiting"]
    assert cvlab("queue", "run", "--workers", 2, "-q")[0] == 0
    assert [row["status"] for row in list_items(cvlab)] == ["done", "done"]
    assert [count_starts(run) for run in runs] == [2, 1]
    assert "resumed step_" in (runs[0] / "log.txt").read_text()


@pytest.mark.faults
def test_two_runners_and_kills_run_each_item_once(cvlab, tmp_path, runner):
    runs = add_items(cvlab, 6, 600)
    first, second = runner("--workers", "2"), runner()
    until(lambda: sum((run / "metrics.jsonl").exists() for run in runs) >= 3)
    first.kill()
    first.wait()
    third = runner("--workers", "2")
    assert (second.wait(), third.wait()) == (0, 0), (tmp_path / "stderr.txt").read_text()
    assert {read_status(run)["status"] for run in runs} == {"done"}
    assert sum(count_starts(run) for run in runs) <= len(runs) + 2, "only the items of the killed runner start twice"
    assert len({read_summary(run)["weights_sha256"] for run in runs}) == 1
    assert "already running" not in (tmp_path / "stderr.txt").read_text()
    lock = RunLock(queue.items(tmp_path / "runs")[0].folder)
    lock.acquire()
    lock.release()
