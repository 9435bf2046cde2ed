"""Arrays that are computed row by row: rows on the disk are reused, missing and damaged ones are computed."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from cvlab.storage import row_cache
from cvlab.storage.row_cache import RowSpec, load_or_compute

SPEC = RowSpec(10, (2, 3), np.dtype(np.float16), 4)


class Computer:
    """Compute rows, and record the blocks for which it is called."""

    def __init__(self, fails_at=None):
        self.calls, self.fails_at = [], fails_at

    def __call__(self, start, end):
        if start == self.fails_at:
            raise KeyboardInterrupt
        self.calls.append((start, end))
        rows = np.arange(start * 6, end * 6, dtype=np.float16).reshape(-1, 2, 3)
        return rows, [f"row {k}" for k in range(start, end)]


def check(array):
    assert np.array_equal(array.rows, np.arange(60, dtype=np.float16).reshape(10, 2, 3))
    assert array.notes == [f"row {k}" for k in range(10)]


def test_rows_are_computed_once(tmp_path):
    first, second = Computer(), Computer()
    check(load_or_compute(tmp_path / "a" / "key", SPEC, first))
    check(load_or_compute(tmp_path / "a" / "key", SPEC, second))
    assert first.calls == [(0, 4), (4, 8), (8, 10)]
    assert second.calls == []


def test_rows_of_complete_blocks_survive_an_interruption(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        load_or_compute(tmp_path / "key", SPEC, Computer(fails_at=8))
    second = Computer()
    check(load_or_compute(tmp_path / "key", SPEC, second))
    assert second.calls == [(8, 10)]


@pytest.mark.parametrize("position", [0, 47, 48, 100, 119])
def test_damaged_rows_are_computed_again(tmp_path, position, capsys):
    load_or_compute(tmp_path / "key", SPEC, Computer())
    content = bytearray((tmp_path / "key.rows").read_bytes())
    content[position] ^= 255
    (tmp_path / "key.rows").write_bytes(content)
    second = Computer()
    check(load_or_compute(tmp_path / "key", SPEC, second))
    assert second.calls[0][0] == position // 48 * 4
    assert "damaged" in capsys.readouterr().err
    check(load_or_compute(tmp_path / "key", SPEC, Computer()))


@pytest.mark.parametrize("name", ["key.rows", "key.jsonl"])
@pytest.mark.parametrize("length", [0, 1, 50, -1])
def test_truncated_files_are_completed(tmp_path, name, length):
    load_or_compute(tmp_path / "key", SPEC, Computer())
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[:length])
    check(load_or_compute(tmp_path / "key", SPEC, Computer()))


@pytest.mark.parametrize("line", [b"{}\n", b"[1]\n", b"null\n", b'{"end": 4, "crc32": 0, "notes": []}\n', b"\xff\n"])
def test_an_invalid_index_is_ignored(tmp_path, line):
    (tmp_path / "key.rows").write_bytes(bytes(48))
    (tmp_path / "key.jsonl").write_bytes(line)
    check(load_or_compute(tmp_path / "key", SPEC, Computer()))


def test_rows_stay_in_memory_if_they_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    check(load_or_compute(tmp_path / "file" / "key", SPEC, Computer()))
    assert "not kept" in capsys.readouterr().err


def test_a_full_disk_is_not_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(row_cache.atomic, "sync_file", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    check(load_or_compute(tmp_path / "key", SPEC, Computer()))


@pytest.mark.parametrize("is_written", [True, False])
def test_a_killed_process_leaves_valid_rows(tmp_path, is_written):
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[2]); from pathlib import Path\n"
        "from tests.storage.test_row_cache import *\n"
        "class Slow(Computer):\n"
        "    def __call__(self, start, end):\n"
        "        print(start, flush=True)\n"
        "        time.sleep(60 if start == 8 else 0)\n"
        "        return super().__call__(start, end)\n"
        "load_or_compute(Path(sys.argv[1]), SPEC, Slow())\n"
    )
    root = str(Path(__file__).parents[2])
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "key"), root], stdout=subprocess.PIPE, text=True
    )
    assert [process.stdout.readline() for _ in range(3)] == ["0\n", "4\n", "8\n"]
    while is_written and (tmp_path / "key.jsonl").read_bytes().count(b"\n") < 2:
        time.sleep(0.01)  # a block is written while the next one is computed
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    second = Computer()
    check(load_or_compute(tmp_path / "key", SPEC, second))
    assert second.calls in ([(8, 10)], *([] if is_written else [[(4, 8), (8, 10)]]))
