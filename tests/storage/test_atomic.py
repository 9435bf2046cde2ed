"""The order of calls in an atomic write, and what a power failure would leave after any other order."""

import itertools
import os
import stat

import pytest

from cvlab.errors import RunDirError
from cvlab.storage import atomic

OLD, NEW = "old", "new"


def crash_states(order):
    """Simulate power failures after each call: yield (acknowledged, content after the restart).

    A disk may keep any subset of what was not made durable: the data of a file without fsync may be torn, and a
    rename that is not followed by an fsync of the directory may be lost.
    """
    for cut in range(len(order) + 1):
        done = order[:cut]
        acknowledged = cut == len(order)
        renamed, data_durable, rename_durable = "rename" in done, "fsync" in done, "dirsync" in done
        for data_survives, rename_survives in itertools.product((True, False), repeat=2):
            if renamed and (rename_durable or rename_survives):
                yield acknowledged, NEW if data_durable or data_survives else "torn"
            else:
                yield acknowledged, OLD


def loses_data(order):
    return any(content == "torn" or (acknowledged and content != NEW) for acknowledged, content in crash_states(order))


def recorded_order(tmp_path, monkeypatch):
    calls = []
    replace, fsync = os.replace, os.fsync

    def spy_fsync(descriptor):
        calls.append("dirsync" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "fsync")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("rename"), replace(a, b)))
    atomic.write_text(tmp_path / "f", "x")
    monkeypatch.undo()
    return calls


def test_only_the_full_order_survives_every_power_failure(tmp_path, monkeypatch):
    order = recorded_order(tmp_path, monkeypatch)
    assert order == ["fsync", "rename", "dirsync"]
    assert not loses_data(order)
    for other in (["rename"], ["fsync", "rename"], ["rename", "dirsync"], ["rename", "fsync", "dirsync"]):
        assert loses_data(other), other


def test_the_content_is_replaced_completely(tmp_path):
    path = tmp_path / "f"
    atomic.write_text(path, "one")
    atomic.write_text(path, "two")
    assert path.read_text() == "two"
    assert os.listdir(tmp_path) == ["f"]


def test_a_failing_write_leaves_the_old_content(tmp_path):
    path = tmp_path / "f"
    atomic.write_text(path, "one")

    def fill(file):
        file.write(b"half")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        atomic.write(path, fill)
    assert path.read_text() == "one"
    assert os.listdir(tmp_path) == ["f"]


def test_a_removed_folder_gives_a_one_line_error(tmp_path):
    with pytest.raises(RunDirError, match="No such file") as error:
        atomic.write_text(tmp_path / "gone" / "f", "x")
    assert error.value.code == 5
    assert "\n" not in str(error.value)


def test_only_temporaries_are_removed(tmp_path):
    (tmp_path / ".f-abc.tmp").touch()
    (tmp_path / ".hidden").touch()
    (tmp_path / "f.tmp").touch()
    atomic.remove_stale_temporaries(tmp_path, is_locked=True)
    assert sorted(os.listdir(tmp_path)) == [".hidden", "f.tmp"]
