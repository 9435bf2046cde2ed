"""The run directory: names, lock, complete rows of metrics, status of a killed run."""

import json
import multiprocessing
import os

import pytest

from cvlab.errors import RunDirError
from cvlab.runs.find import create_run, find_run, list_runs
from cvlab.runs.records import read_json, read_metrics, read_status
from cvlab.runs.run_dir import RunDir
from cvlab.storage.lock import RunLock, is_held


def test_directories_are_new_and_latest_points_to_the_last(tmp_path):
    made = [create_run(tmp_path / "runs", "x").path for _ in range(5)]
    assert len(set(made)) == 5
    assert (tmp_path / "runs" / "latest").resolve() == made[-1].resolve()


def test_a_root_that_is_a_file_is_rejected(tmp_path):
    (tmp_path / "runs").touch()
    with pytest.raises(RunDirError) as refused:
        create_run(tmp_path / "runs", "x")
    assert refused.value.code == 5


def test_metrics_are_repaired_when_cut_anywhere(tmp_path):
    rows = [{"step": k, "loss": 1.5 / (k + 1)} for k in range(3)]
    whole = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    path = tmp_path / "metrics.jsonl"
    for end in range(len(whole) + 1):
        path.write_bytes(whole[:end])
        complete = whole[:end].count(b"\n")
        assert list(read_metrics(tmp_path)) == rows[:complete]
        with RunDir(tmp_path).locked() as out:
            assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:complete])
            out.append({"step": 9})
        assert list(read_metrics(tmp_path)) == [*rows[:complete], {"step": 9}]


def test_a_resume_truncates_the_metrics_and_rejects_a_gap(tmp_path):
    with RunDir(tmp_path).locked() as out:
        out.append({"step": 1})
        length = out.sync_metrics()
        out.append({"step": 2})
        out.truncate_metrics(length)
        assert list(read_metrics(tmp_path)) == [{"step": 1}]
        with pytest.raises(RunDirError, match="the checkpoint knows of"):
            out.truncate_metrics(length + 1)


def test_numbers_that_json_cannot_represent(tmp_path):
    with RunDir(tmp_path).locked() as out:
        out.append({"a": float("nan"), "b": float("inf"), "c": (1, 2)})
    assert list(read_metrics(tmp_path)) == [{"a": None, "b": None, "c": [1, 2]}]


def hold(path, ready, leave):
    with RunDir(path).locked():
        ready.set()
        leave.wait(30)


def try_to_hold(path, start, results):
    start.wait(30)
    try:
        with RunDir(path).locked():
            results.put(("held", os.getpid()))
            start_over = multiprocessing.Event()
            start_over.wait(1.5)
    except RunDirError as error:
        results.put((error.message, error.code))


def test_exactly_one_of_eight_processes_holds_the_lock(tmp_path):
    context = multiprocessing.get_context("fork")
    start, results = context.Event(), context.Queue()
    starts = [context.Process(target=try_to_hold, args=(tmp_path, start, results)) for _ in range(8)]
    for process in starts:
        process.start()
    start.set()
    found = [results.get(timeout=30) for _ in starts]
    for process in starts:
        process.join()
    held = [entry for entry in found if entry[0] == "held"]
    refused = [entry for entry in found if entry[0] != "held"]
    assert len(held) == 1
    assert all("already running" in message and code == 5 for message, code in refused)
    assert any(f"pid {held[0][1]}" in message for message, _ in refused)


def test_the_lock_of_a_dead_process_is_free_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    ready, leave = context.Event(), context.Event()
    holder = context.Process(target=hold, args=(tmp_path, ready, leave))
    holder.start()
    assert ready.wait(30)
    assert is_held(tmp_path)
    with pytest.raises(RunDirError, match=f"pid {holder.pid}"):
        RunLock(tmp_path).acquire()
    holder.kill()
    holder.join()
    assert not is_held(tmp_path)
    with RunDir(tmp_path).locked():
        pass


def test_a_killed_run_is_interrupted(tmp_path):
    out = RunDir(tmp_path)
    out.set_status("running", step=3)
    assert read_status(tmp_path) == {**read_json(tmp_path / "status.json"), "status": "interrupted"}


def test_stale_temporaries_are_removed_except_those_of_trials(tmp_path):
    places = [tmp_path, tmp_path / "checkpoints", tmp_path / "images" / "steps", tmp_path / "trials" / "000"]
    for place in places:
        place.mkdir(parents=True, exist_ok=True)
        (place / ".a.tmp").touch()
    (places[-1] / "config.yaml").touch()
    with RunDir(tmp_path).locked():
        assert list(tmp_path.rglob(".*.tmp")) == [places[-1] / ".a.tmp"]


def test_runs_are_found_by_path_name_part_and_latest(tmp_path):
    root = tmp_path / "runs"
    one, two = (create_run(root, name) for name in ("one", "two"))
    for out in (one, two):
        out.set_status("done")
    assert find_run(str(one.path), root) == one.path.resolve()
    assert find_run(one.path.name, root) == one.path.resolve()
    assert find_run("one", root) == one.path.resolve()
    assert find_run("latest", root) == two.path.resolve()
    with pytest.raises(RunDirError, match="matches 2 runs"):
        find_run("-", root)
    with pytest.raises(RunDirError, match="no run 'three'"):
        find_run("three", root)
    assert list_runs(root) == sorted([one.path, two.path])


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_damaged_json_is_one_line(tmp_path, content):
    (tmp_path / "summary.json").write_bytes(content)
    with pytest.raises(RunDirError) as refused:
        read_json(tmp_path / "summary.json")
    assert "\n" not in str(refused.value)
