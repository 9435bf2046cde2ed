"""File systems that lack a system call: a run continues without it, or fails with a one-line error that names it."""

import errno
import fcntl
import os
import pathlib
import stat
import tempfile

import pytest
import torch

from cvlab import console
from cvlab.api import doctor
from cvlab.errors import DataError, RunDirError
from cvlab.runs import checkpoint
from cvlab.runs.find import create_run
from cvlab.runs.records import read_metrics, read_status
from cvlab.storage import atomic, download
from cvlab.storage.lock import RunLock, is_held

NUMBERS = (errno.ENOSYS, errno.ENOTSUP, errno.EPERM, errno.ENOLCK)
OPTIONAL = ("link", "symlink", "fchmod", "fsync", "truncate", "ftruncate", "pwrite", "unlink")  # functions of os
TRAINING = (
    *("train", "quickstart", "data.num_train=60", "batch_size=20", "duration={steps: 6}", "eval_every=3", "expect=[]"),
    *("evaluate_test=false", "threads=1", "-q"),
)
REQUIRED = ("mkdir", "replace", "write")


def break_call(monkeypatch, module, name, number):
    def call(*_args, **_kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(module, name, call)
    accessor = getattr(pathlib, "_NormalAccessor", None)  # which Path calls instead of os in Python 3.10
    if module is os and hasattr(accessor, name):
        monkeypatch.setattr(accessor, name, staticmethod(call))


def write_run(root):
    """Write and read a run directory as a training run does, and return its path."""
    run = create_run(root, "x")
    with run.locked():
        run.write_text("config.yaml", "seed: 0\n")
        run.set_status("running")
        for step in range(1, 5):
            run.append({"step": step})
            state = {"step": step, "model": {"w": torch.full((3,), float(step))}, "bytes": run.sync_metrics()}
            run.write("checkpoints", lambda folder, n=step, s=state: checkpoint.save(folder, n, s, is_best=n in (1, 3)))
        run.log("a line")
        run.set_status("done")
    with (run.path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 5')  # a row cut off when the process was killed
    with run.locked():
        run.append({"step": 9})
        run.truncate_metrics(state["bytes"])
        run.append({"step": 10})
    return run.path


def check_run(path):
    assert checkpoint.load_latest(path / "checkpoints", pytest.fail)[1]["step"] == 4
    assert checkpoint.load(path / "checkpoints" / checkpoint.BEST)["step"] == 3
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4, 10]
    assert read_status(path)["status"] == "done"


@pytest.mark.parametrize("number", NUMBERS, ids=errno.errorcode.get)
@pytest.mark.parametrize("name", OPTIONAL)
def test_a_run_continues_without_an_optional_system_call(tmp_path, monkeypatch, name, number):
    break_call(monkeypatch, os, name, number)
    path = write_run(tmp_path / "runs")
    monkeypatch.undo()
    check_run(path)


@pytest.mark.parametrize("number", NUMBERS, ids=errno.errorcode.get)
@pytest.mark.parametrize("name", [*REQUIRED, "mkstemp", "lockf"])
def test_a_missing_required_system_call_is_named_in_a_one_line_error(tmp_path, monkeypatch, name, number):
    module = {"mkstemp": tempfile, "lockf": fcntl}.get(name, os)
    break_call(monkeypatch, module, name, number)
    with pytest.raises(RunDirError) as error:
        write_run(tmp_path / "runs")
    monkeypatch.undo()
    message = str(error.value)
    assert os.strerror(number) in message
    assert "--runs-dir" in message
    assert not any(wrong in message for wrong in ("\n", "free space", "already running", "wait for it"))


@pytest.mark.parametrize("number", NUMBERS, ids=errno.errorcode.get)
def test_missing_fsync_is_ignored_for_folders_and_logged_once_for_files(tmp_path, monkeypatch, capsys, number):
    fsync = os.fsync

    def fsync_files_only(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync_files_only)
    check_run(write_run(tmp_path / "folders"))
    assert "fsync" not in capsys.readouterr().err
    break_call(monkeypatch, os, "fsync", number)
    monkeypatch.setattr(console, "level", console.QUIET)
    for _ in range(2):
        atomic.write_text(tmp_path / "f", "x")
    warnings = [line for line in capsys.readouterr().err.splitlines() if "no fsync" in line]
    assert len(warnings) == 1
    assert os.strerror(number) in warnings[0]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_full_or_damaged_disk_is_an_error(tmp_path, monkeypatch, number):
    break_call(monkeypatch, os, "fsync", number)
    with pytest.raises(RunDirError, match=os.strerror(number)):
        atomic.write_text(tmp_path / "f", "x")


@pytest.mark.parametrize("number", NUMBERS, ids=errno.errorcode.get)
def test_no_run_counts_as_running_without_file_locks(tmp_path, monkeypatch, number):
    (tmp_path / "run.lock").touch()
    break_call(monkeypatch, fcntl, "lockf", number)
    assert not is_held(tmp_path)
    with pytest.raises(RunDirError, match="no file locks"):
        RunLock(tmp_path).acquire()
    with pytest.raises(DataError, match="no file locks"), download._exclusive(tmp_path / "part"):
        pass
    ok, text = doctor._run_check("runs", lambda: doctor._disk(tmp_path))[1:]
    assert not ok
    assert "no file locks" in text


@pytest.mark.parametrize("number", [errno.EACCES, errno.EAGAIN])
def test_both_error_codes_of_posix_mean_that_a_lock_is_held(tmp_path, monkeypatch, number):
    (tmp_path / "run.lock").touch()
    break_call(monkeypatch, fcntl, "lockf", number)
    assert is_held(tmp_path)
    with pytest.raises(RunDirError, match="already running"):
        RunLock(tmp_path).acquire()


def test_a_training_run_completes_on_a_disk_without_hard_links(tmp_path, monkeypatch):
    from cvlab.cli import main

    break_call(monkeypatch, os, "link", errno.ENOTSUP)
    assert main.run_command_line([*TRAINING, f"--runs-dir={tmp_path}"]) == 0
    run = next(tmp_path.glob("*-quickstart-*"))
    assert checkpoint.load(run / "checkpoints" / checkpoint.BEST)["step"] > 0
