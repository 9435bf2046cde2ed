"""The run directory: names, lock, complete rows of metrics, status of a killed run."""

import json
import multiprocessing
import os

import pytest

from cvlab import console
from cvlab.errors import RunDirError
from cvlab.runs.find import create_run, find_run, list_runs
from cvlab.runs.records import read_json, read_metrics, read_status
from cvlab.runs.run_dir import RunDir
from cvlab.storage.lock import RunLock, is_held


def test_directories_are_unique_and_latest_points_to_the_last_one(tmp_path):
    paths = [create_run(tmp_path / "runs", "x").path for _ in range(5)]
    assert len(set(paths)) == 5
    assert (tmp_path / "runs" / "latest").resolve() == paths[-1].resolve()


def test_a_root_that_is_a_file_is_rejected(tmp_path):
    (tmp_path / "runs").touch()
    with pytest.raises(RunDirError) as error:
        create_run(tmp_path / "runs", "x")
    assert error.value.code == 5


def test_truncated_metrics_are_repaired(tmp_path):
    rows = [{"step": k, "loss": 1.5 / (k + 1)} for k in range(3)]
    content = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    path = tmp_path / "metrics.jsonl"
    for end in range(len(content) + 1):
        path.write_bytes(content[:end])
        complete = content[:end].count(b"\n")
        assert list(read_metrics(tmp_path)) == rows[:complete]
        with RunDir(tmp_path).locked() as run:
            assert path.read_bytes() == b"".join(content.splitlines(keepends=True)[:complete])
            run.append({"step": 9})
        assert list(read_metrics(tmp_path)) == [*rows[:complete], {"step": 9}]


def test_a_resume_truncates_the_metrics_and_rejects_a_gap(tmp_path):
    with RunDir(tmp_path).locked() as run:
        run.append({"step": 1})
        length = run.sync_metrics()
        run.append({"step": 2})
        run.truncate_metrics(length)
        assert list(read_metrics(tmp_path)) == [{"step": 1}]
        with pytest.raises(RunDirError, match="the checkpoint knows of"):
            run.truncate_metrics(length + 1)


def test_numbers_that_json_cannot_represent(tmp_path):
    with RunDir(tmp_path).locked() as run:
        run.append({"a": float("nan"), "b": float("inf"), "c": (1, 2)})
    assert list(read_metrics(tmp_path)) == [{"a": None, "b": None, "c": [1, 2]}]


def hold(path, ready, release):
    with RunDir(path).locked():
        ready.set()
        release.wait(30)


def try_to_hold(path, start, results):
    start.wait(30)
    try:
        with RunDir(path).locked():
            results.put(("held", os.getpid()))
            never = multiprocessing.Event()
            never.wait(1.5)
    except RunDirError as error:
        results.put((error.message, error.code))


def test_exactly_one_of_eight_processes_holds_the_lock(tmp_path):
    context = multiprocessing.get_context("fork")
    start, results = context.Event(), context.Queue()
    processes = [context.Process(target=try_to_hold, args=(tmp_path, start, results)) for _ in range(8)]
    for process in processes:
        process.start()
    start.set()
    messages = [results.get(timeout=30) for _ in processes]
    for process in processes:
        process.join()
    holders = [entry for entry in messages if entry[0] == "held"]
    errors = [entry for entry in messages if entry[0] != "held"]
    assert len(holders) == 1
    assert all("already running" in message and code == 5 for message, code in errors)
    assert any(f"pid {holders[0][1]}" in message for message, _ in errors)


def test_the_lock_of_a_killed_process_is_free_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    ready, release = context.Event(), context.Event()
    holder = context.Process(target=hold, args=(tmp_path, ready, release))
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


def test_a_killed_run_has_the_status_interrupted(tmp_path):
    run = RunDir(tmp_path)
    run.set_status("running", step=3)
    assert read_status(tmp_path) == {**read_json(tmp_path / "status.json"), "status": "interrupted"}


def test_stale_temporaries_are_removed_except_those_of_trials(tmp_path):
    folders = [tmp_path, tmp_path / "checkpoints", tmp_path / "images" / "steps", tmp_path / "trials" / "000"]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".a.tmp").touch()
    (folders[-1] / "config.yaml").touch()
    with RunDir(tmp_path).locked():
        assert list(tmp_path.rglob(".*.tmp")) == [folders[-1] / ".a.tmp"]


def test_runs_are_found_by_path_name_part_of_the_name_and_latest(tmp_path):
    root = tmp_path / "runs"
    first, second = (create_run(root, name) for name in ("one", "two"))
    for run in (first, second):
        run.set_status("done")
    assert find_run(str(first.path), root) == first.path.resolve()
    assert find_run(first.path.name, root) == first.path.resolve()
    assert find_run("one", root) == first.path.resolve()
    assert find_run("latest", root) == second.path.resolve()
    with pytest.raises(RunDirError, match="matches 2 runs"):
        find_run("-", root)
    with pytest.raises(RunDirError, match="no run 'three'"):
        find_run("three", root)
    assert list_runs(root) == sorted([first.path, second.path])


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_damaged_json_gives_a_one_line_error(tmp_path, content):
    (tmp_path / "summary.json").write_bytes(content)
    with pytest.raises(RunDirError) as error:
        read_json(tmp_path / "summary.json")
    assert "\n" not in str(error.value)


def test_warnings_of_modules_that_do_not_know_the_run_are_in_its_log(tmp_path, capsys):
    run = RunDir(tmp_path, console.info)
    console.info("warning: before the run")
    with run.locked():
        console.info("warning: 1 of 3 photos cannot be read")
        console.info("no warning")
        run.log("warning: logged once")
    console.info("warning: after the run")
    lines = [line.split(" ", 1)[1] for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert lines == ["warning: 1 of 3 photos cannot be read", "warning: logged once"]
    assert capsys.readouterr().err.count("warning:") == 4
