"""Real kills, signals and a disk that refuses, on real processes; a quick subset always, all of it with -m faults."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cvlab import registry
from cvlab.api import fault_check
from tests.faults.texts import KINDS, WRITERS

ROOT = Path(__file__).parent.parent.parent


MOUNTING = ("unshare", "--user", "--map-root-user", "--mount")


def scenario(name, folder, count, timeout=240, module="server", prefix=()):
    """Run a scenario of the fork server and return what it found."""
    found = subprocess.run(
        [*prefix, sys.executable, "-m", f"tests.faults.{module}", name, str(folder), str(count)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    print(found.stdout)
    return json.loads(found.stdout.splitlines()[-1])


def both(few, many):
    """Give a test its quick count and, marked, its full one."""
    return pytest.mark.parametrize("count", [few, pytest.param(many, marks=pytest.mark.faults)])


@both(15, 120)
def test_a_run_killed_at_any_time_resumes_bit_for_bit_identical(tmp_path, count):
    found = scenario("kills", tmp_path, count)
    assert found["kills"] >= count
    assert found["runs"] >= count // 10
    assert (found["corrupt"], found["different"]) == (0, 0), found


@both(6, 40)
def test_the_harness_detects_a_writer_that_is_not_durable(tmp_path, count):
    assert scenario("naive", tmp_path, count)["corrupt"] >= count // 3


@both(1, 3)
def test_kill_inside_a_save(tmp_path, count):
    found = scenario("failpoints", tmp_path, count)
    assert found == {"died": 7 * count, "corrupt": 0, "different": 0, "left": 0}


@pytest.fixture
def scenes(data_root):
    from cvlab.experiments.classification.data import scenes10

    scenes10.load(data_root)


CODES = {"SIGTERM": 143, "SIGUSR1": 143, "SIGINT": 130, "SIGINT-SIGINT": 130, "SIGKILL": -9}


def test_signals_leave_a_checkpoint(tmp_path, scenes):
    found = scenario("signals", tmp_path, len(CODES))
    assert {name: entry["code"] for name, entry in found.items()} == CODES
    for name, entry in found.items():
        assert entry["status"] == "interrupted", name
        assert entry["resume"] == 143, found
        assert entry["later"] > entry["saved"], found
        if name not in ("SIGKILL", "SIGINT-SIGINT"):
            assert entry["saved"] >= entry["logged"], "the step in progress is saved"


def test_a_full_disk_exits_with_5_and_leaves_valid_files(tmp_path, scenes):
    found = scenario("disk_full", tmp_path, 1)
    assert found["code"] == 5
    assert found["corrupt"] == 0
    assert found["left"] == 0
    assert found["saved"]
    assert max(found["saved"]) <= 5
    assert found["status"] in ("failed", "interrupted")


@pytest.mark.faults
def test_doctor_kills_and_resumes_on_the_users_disk(cvlab, tmp_path, scenes):
    code, out, _ = cvlab("doctor", "--faults", "--runs-dir", tmp_path / "runs", "--json")
    found = {check["name"]: check for check in json.loads(out)["checks"]}
    assert code == 0, found
    assert "0 damaged" in found["kill -9"]["detail"]
    assert "bit for bit" in found["resumed"]["detail"]
    assert list((tmp_path / "runs").iterdir()) == []


def test_doctor_detects_different_weights(monkeypatch, tmp_path):
    digests = iter(["one", "another"])
    monkeypatch.setattr(fault_check, "_start", lambda *words, root: None)
    monkeypatch.setattr(fault_check, "_kill_repeatedly", lambda root, kills, generator: ("kill -9", True, "once"))
    monkeypatch.setattr(fault_check, "_finish", lambda process: next(digests))
    found = {name: ok for name, ok, _ in fault_check.run(tmp_path / "runs", kills=1)}
    assert found["kill -9"]
    assert not found["resumed"]


@pytest.fixture
def mounting():
    """Skip where a file system of one's own can't be mounted."""
    if (
        shutil.which("unshare") is None
        or subprocess.run([*MOUNTING, "true"], capture_output=True, check=False).returncode
    ):
        pytest.skip("no file system can be mounted here")


def test_the_kinds_are_all_experiments():
    assert {name.split(",")[0] for name in KINDS} == set(registry.EXPERIMENTS)


@pytest.mark.faults
def test_every_kind_of_experiment_survives_a_full_disk(tmp_path, scenes, mounting):
    found = scenario("small_disks", tmp_path, 1, timeout=900, module="kinds", prefix=MOUNTING)
    assert len(found) >= 10
    for name, entry in found.items():
        assert entry["code"] == 5, (name, entry)
        assert len(entry["errors"]) == 1, (name, entry)
        assert not entry["traceback"], (name, entry)
        assert "No space left on device; free space" in entry["errors"][0]
        assert (entry["corrupt"], entry["left"], entry["same"]) == (0, 0, True), (name, entry)


def test_read_only_runs_can_be_read_and_everything_else_exits_with_5(tmp_path, scenes, mounting):
    found = scenario("read_only", tmp_path, 0, module="kinds", prefix=MOUNTING)
    for line, entry in found.items():
        assert not entry["traceback"], (line, entry)
        if line in WRITERS:
            assert entry["code"] == 5, (line, entry)
            assert len(entry["said"]) == 1, (line, entry)
            assert "Read-only file system" in entry["said"][0], (line, entry)
        else:
            assert entry["code"] in (0, 5), (line, entry)


@pytest.mark.faults
def test_a_run_whose_folder_is_removed_exits_with_5(tmp_path, scenes):
    for entry in scenario("removed", tmp_path, 4, module="kinds").values():
        assert entry["code"] == 5, entry
        assert not entry["traceback"], entry
        assert len(entry["said"]) == 1
        assert "No such file or directory; its folder was removed" in entry["said"][0]


@pytest.mark.faults
def test_training_on_photos_is_killed_in_each_of_its_phases(tmp_path):
    found = scenario("phases", tmp_path, 1, timeout=600, module="kinds")
    end = found.pop("end")
    assert {name: entry["code"] for name, entry in found.items()} == dict.fromkeys(
        ("decode", "features", "head", "finetune"), -9
    )
    assert end == {"differ": [], "same_cache": True}, found
    assert found["decode"]["cached"] <= found["features"]["cached"] <= found["head"]["cached"], "nothing is lost"


@pytest.mark.faults
def test_every_kind_of_experiment_is_killed_and_resumed(tmp_path, scenes):
    found = scenario("kinds", tmp_path, 2, timeout=900, module="kinds")
    assert len(found) >= 10, found
    assert sum(entry["kills"] for entry in found.values()) >= 9, found
    for name, entry in found.items():
        assert (entry["differ"], entry["left"], entry["corrupt"]) == ([], [], 0), (name, entry)
