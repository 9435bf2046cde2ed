"""File systems that lack a system call: a run goes on without it, or says in one line what is missing."""

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
OPTIONAL = ("link", "symlink", "fchmod", "fsync", "truncate", "ftruncate", "pwrite", "unlink")  # of the module os
TRAINING = (
    *("train", "quickstart", "data.num_train=60", "batch_size=20", "duration={steps: 6}", "eval_every=3", "expect=[]"),
    *("evaluate_test=false", "threads=1", "-q"),
)
REQUIRED = ("mkdir", "replace", "write")


def refuse(monkeypatch, module, name, number):
    def call(*_args, **_kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(module, name, call)
    accessor = getattr(pathlib, "_NormalAccessor", None)  # which Path calls instead of os in Python 3.10
    if module is os and hasattr(accessor, name):
        monkeypatch.setattr(accessor, name, staticmethod(call))


def run_whole(root):
    """Do what a training does in its run directory; return the run directory."""
    out = create_run(root, "x")
    with out.locked():
        out.write_text("config.yaml", "seed: 0\n")
        out.set_status("running")
        for step in range(1, 5):
            out.append({"step": step})
            state = {"step": step, "model": {"w": torch.full((3,), float(step))}, "bytes": out.sync_metrics()}
            out.write("checkpoints", lambda folder, n=step, s=state: checkpoint.save(folder, n, s, is_best=n in (1, 3)))
        out.log("a line")
        out.set_status("done")
    with (out.path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 5')  # as a kill leaves it
    with out.locked():
        out.append({"step": 9})
        out.truncate_metrics(state["bytes"])
        out.append({"step": 10})
    return out.path


def check_whole(path):
    assert checkpoint.load_latest(path / "checkpoints", pytest.fail)[1]["step"] == 4
    assert checkpoint.load(path / "checkpoints" / checkpoint.BEST)["step"] == 3
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4, 10]
    assert read_status(path)["status"] == "done"


@pytest.mark.parametrize("number", NUMBERS, ids=errno.errorcode.get)
@pytest.mark.parametrize("name", OPTIONAL)
def test_a_run_goes_on_without_a_call_that_it_can_do_without(tmp_path, monkeypatch, name, number):
    refuse(monkeypatch, os, name, number)
    path = run_whole(tmp_path / "runs")
    monkeypatch.undo()
    check_whole(path)


@pytest.mark.parametrize("number", NUMBERS, ids=errno.errorcode.get)
@pytest.mark.parametrize("name", [*REQUIRED, "mkstemp", "lockf"])
def test_a_call_that_a_run_cannot_do_without_is_named_in_one_line(tmp_path, monkeypatch, name, number):
    module = {"mkstemp": tempfile, "lockf": fcntl}.get(name, os)
    refuse(monkeypatch, module, name, number)
    with pytest.raises(RunDirError) as refused:
        run_whole(tmp_path / "runs")
    monkeypatch.undo()
    message = str(refused.value)
    assert os.strerror(number) in message
    assert "--runs-dir" in message
    assert not any(wrong in message for wrong in ("\n", "free space", "already running", "wait for it"))


@pytest.mark.parametrize("number", NUMBERS, ids=errno.errorcode.get)
def test_a_folder_without_fsync_is_no_error_and_a_file_without_it_is_reported_once(
    tmp_path, monkeypatch, capsys, number
):
    fsync = os.fsync

    def only_files(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", only_files)
    check_whole(run_whole(tmp_path / "folders"))
    assert "fsync" not in capsys.readouterr().err
    refuse(monkeypatch, os, "fsync", number)
    monkeypatch.setattr(console, "level", console.QUIET)
    for _ in range(2):
        atomic.write_text(tmp_path / "f", "x")
    warnings = [line for line in capsys.readouterr().err.splitlines() if "no fsync" in line]
    assert len(warnings) == 1
    assert os.strerror(number) in warnings[0]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_disk_that_is_full_or_damaged_is_no_missing_system_call(tmp_path, monkeypatch, number):
    refuse(monkeypatch, os, "fsync", number)
    with pytest.raises(RunDirError, match=os.strerror(number)):
        atomic.write_text(tmp_path / "f", "x")


@pytest.mark.parametrize("number", NUMBERS, ids=errno.errorcode.get)
def test_without_file_locks_nothing_is_said_to_be_running(tmp_path, monkeypatch, number):
    (tmp_path / "run.lock").touch()
    refuse(monkeypatch, fcntl, "lockf", number)
    assert not is_held(tmp_path)
    with pytest.raises(RunDirError, match="no file locks"):
        RunLock(tmp_path).acquire()
    with pytest.raises(DataError, match="no file locks"), download._exclusive(tmp_path / "part"):
        pass
    ok, text = doctor._run_check("runs", lambda: doctor._disk(tmp_path))[1:]
    assert not ok
    assert "no file locks" in text


@pytest.mark.parametrize("number", [errno.EACCES, errno.EAGAIN])
def test_both_answers_of_posix_mean_that_a_lock_is_held(tmp_path, monkeypatch, number):
    (tmp_path / "run.lock").touch()
    refuse(monkeypatch, fcntl, "lockf", number)
    assert is_held(tmp_path)
    with pytest.raises(RunDirError, match="already running"):
        RunLock(tmp_path).acquire()


def test_a_training_ends_on_a_disk_without_hard_links(tmp_path, monkeypatch):
    from cvlab.cli import main

    refuse(monkeypatch, os, "link", errno.ENOTSUP)
    assert main.run_command_line([*TRAINING, f"--runs-dir={tmp_path}"]) == 0
    run = next(tmp_path.glob("*-quickstart-*"))
    assert checkpoint.load(run / "checkpoints" / checkpoint.BEST)["step"] > 0
