"""Several processes on the same runs: concurrent sweeps, concurrent resumes, readers while runs write."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from cvlab.runs.find import list_runs
from cvlab.runs.records import read_metrics, read_status
from tests.faults.texts import CONFIG, SWEEP

pytestmark = pytest.mark.faults


def start(*arguments):
    command = [sys.executable, "-m", "cvlab", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(process):
    """Wait for a command; return its exit code and its standard error."""
    _, stderr = process.communicate(timeout=180)
    return process.returncode, stderr


@pytest.fixture
def sweep(tmp_path, data_root):
    """Write a sweep and return its file."""
    from cvlab.experiments.classification.data import scenes10

    scenes10.load(data_root)

    (tmp_path / "s.yaml").write_text(SWEEP)
    return tmp_path / "s.yaml"


def test_concurrent_sweeps_do_not_mix(tmp_path, sweep):
    root = tmp_path / "runs"
    processes = [
        start("sweep", sweep, f"base.duration.epochs={4 + k}", "--runs-dir", root, "--json", "-q") for k in range(2)
    ]
    results = []
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        results.append(json.loads(out))
    runs = {entry["run"] for entry in results}
    assert len(runs) == 2
    assert all(entry["metrics"]["trials"] == 2 for entry in results)
    for k, entry in enumerate(results):
        assert [trial["metrics"]["epochs"] for trial in entry["trials"]] == [4 + k] * 2


def test_one_of_two_processes_resumes_an_interrupted_sweep(tmp_path, sweep):
    root, args = tmp_path / "runs", (sweep, "base.duration.epochs=50")
    first = start("sweep", *args, "--runs-dir", root, "-q")
    deadline = time.monotonic() + 60
    while not any(list(read_metrics(trial)) for trial in root.glob("latest/trials/*")):
        assert first.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    first.send_signal(signal.SIGTERM)
    assert wait_for(first)[0] == 143
    processes = [start("sweep", *args, "--runs-dir", root, "-q") for _ in range(2)]
    results = [wait_for(process) for process in processes]
    codes = sorted(code for code, _ in results)
    assert codes in ([0, 5], [0, 0]), results  # [0, 0]: the second saw a sweep in progress and started a new one
    for code, stderr in results:
        assert "Traceback" not in stderr
        assert code == 0 or "already running" in stderr
    status = [read_status(run)["status"] for run in list_runs(root)]
    assert status == ["done"] * (1 if codes == [0, 5] else 2)


READERS = ("show latest", "compare latest latest --json", "report latest", "runs --json", "show latest --json")


def test_readers_work_while_a_run_writes(tmp_path, sweep):
    root = tmp_path / "runs"
    (tmp_path / "c.yaml").write_text(CONFIG)
    writer = start("train", tmp_path / "c.yaml", "save_seconds=0", "log_every=1", "--runs-dir", root, "-q")
    deadline = time.monotonic() + 60
    while not (root / "latest" / "metrics.jsonl").exists():
        assert writer.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    num_read = 0
    while writer.poll() is None and num_read < len(READERS):
        line = READERS[num_read % len(READERS)]
        reader = subprocess.run(
            [sys.executable, "-m", "cvlab", *line.split(), "--runs-dir", str(root)],
            capture_output=True,
            check=False,
            text=True,
            env={**os.environ, "CVLAB_OFFLINE": "1"},
        )
        assert reader.returncode == 0, (line, reader.stderr)
        assert "--json" not in line or json.loads(reader.stdout)
        num_read += 1
    assert num_read >= 3, "the run ended before it was read"
    writer.send_signal(signal.SIGTERM)
    assert wait_for(writer)[0] in (0, 143)
