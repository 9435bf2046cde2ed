"""Runs without a summary, two identical sweeps at a time, temporary files that killed processes leave."""

import json
import os
import subprocess
import sys
import time

from cvlab.cli import main
from cvlab.reports import html
from cvlab.runs.records import read_summary
from cvlab.storage import atomic

TRAINING = (
    "data.num_train=60",
    "batch_size=20",
    "duration={steps: 6}",
    "expect=[]",
    "evaluate_test=false",
    "threads=1",
)


def test_a_finished_run_without_a_summary_is_completed(tmp_path, capsys):
    assert main.run_command_line(["train", "quickstart", *TRAINING, f"--runs-dir={tmp_path}"]) == 0
    run = next(tmp_path.glob("2*"))
    before = read_summary(run)
    (run / "summary.json").unlink()
    assert main.run_command_line(["resume", str(run), f"--runs-dir={tmp_path}"]) == 0
    assert "completed again" in capsys.readouterr().err
    assert read_summary(run)["weights_sha256"] == before["weights_sha256"]
    assert main.run_command_line(["resume", str(run), f"--runs-dir={tmp_path}"]) == 0
    assert "already finished" in capsys.readouterr().err


def test_of_two_identical_sweeps_at_a_time_only_one_runs(tmp_path):
    base = [f"base.{argument}" for argument in TRAINING if argument != "expect=[]"]
    command = [sys.executable, "-m", "cvlab", "sweep", "quickstart", "seeds=[0,1]", *base]
    processes = [
        subprocess.Popen(
            [*command, f"--runs-dir={tmp_path}"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert sorted(process.returncode for process in processes) == [0, 5], errors
    assert any("already running" in text for text in errors)
    assert len(list(tmp_path.glob("2*"))) == 1
    assert len(list(tmp_path.glob("2*/trials/*"))) == 2


def test_old_temporary_files_of_the_index_are_removed_and_new_ones_are_not(tmp_path):
    old, new, unrelated = (tmp_path / name for name in (".index.html-a.tmp", ".index.html-b.tmp", "index.html-c.tmp"))
    link = tmp_path / ".latest-20261126"
    for path in (old, new, unrelated):
        path.touch()
    link.symlink_to("nowhere")
    for path in (old, unrelated, link):
        os.utime(path, (time.time() - 2 * atomic.LEFTOVER_SECONDS,) * 2, follow_symlinks=False)
    html.write_index(tmp_path, [])
    assert sorted(path.name for path in tmp_path.iterdir()) == [new.name, "index.html", unrelated.name]


def test_the_json_of_a_completed_run_is_complete(tmp_path, capsys):
    assert main.run_command_line(["train", "quickstart", *TRAINING, f"--runs-dir={tmp_path}"]) == 0
    run = next(tmp_path.glob("2*"))
    (run / "summary.json").unlink()
    capsys.readouterr()
    assert main.run_command_line(["resume", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "done"
