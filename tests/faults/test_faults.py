"""Kills, signals and full disks in separate processes: a quick subset by default, all of them with -m faults."""

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


UNSHARE = ("unshare", "--user", "--map-root-user", "--mount")


def run_scenario(name, folder, count, timeout=240, module="server", prefix=()):
    """Run a scenario of the fork server and return its result."""
    process = subprocess.run(
        [*prefix, sys.executable, "-m", f"tests.faults.{module}", name, str(folder), str(count)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    print(process.stdout)
    return json.loads(process.stdout.splitlines()[-1])


def counts(small, large):
    """Parametrize a test by a small count and, with the marker `faults`, a large one."""
    return pytest.mark.parametrize("count", [small, pytest.param(large, marks=pytest.mark.faults)])


@counts(15, 120)
def test_a_run_killed_at_any_time_resumes_bitwise(tmp_path, count):
    result = run_scenario("kills", tmp_path, count)
    assert result["kills"] >= count
    assert result["runs"] >= count // 10
    assert (result["corrupt"], result["different"]) == (0, 0), result


@counts(6, 40)
def test_the_harness_detects_a_writer_that_is_not_durable(tmp_path, count):
    assert run_scenario("naive", tmp_path, count)["corrupt"] >= count // 3


@counts(1, 3)
def test_kill_inside_a_save(tmp_path, count):
    result = run_scenario("failpoints", tmp_path, count)
    assert result == {"died": 7 * count, "corrupt": 0, "different": 0, "temporary_files": 0}


@pytest.fixture
def scenes(data_root):
    from cvlab.experiments.classification.data import scenes10

    scenes10.load(data_root)


CODES = {"SIGTERM": 143, "SIGUSR1": 143, "SIGINT": 130, "SIGINT-SIGINT": 130, "SIGKILL": -9}


def test_signals_leave_a_checkpoint(tmp_path, scenes):
    results = run_scenario("signals", tmp_path, len(CODES))
    assert {name: entry["code"] for name, entry in results.items()} == CODES
    for name, entry in results.items():
        assert entry["status"] == "interrupted", name
        assert entry["resume"] == 143, results
        assert entry["later"] > entry["saved"], results
        if name not in ("SIGKILL", "SIGINT-SIGINT"):
            assert entry["saved"] >= entry["logged"], "the step in progress is saved"


def test_a_full_disk_exits_with_5_and_leaves_valid_files(tmp_path, scenes):
    result = run_scenario("disk_full", tmp_path, 1)
    assert result["code"] == 5
    assert result["corrupt"] == 0
    assert result["temporary_files"] == 0
    assert result["saved"]
    assert max(result["saved"]) <= 5
    assert result["status"] in ("failed", "interrupted")


@pytest.mark.faults
def test_doctor_kills_and_resumes_runs_on_the_disk_of_the_user(cvlab, tmp_path, scenes):
    code, out, _ = cvlab("doctor", "--faults", "--runs-dir", tmp_path / "runs", "--json")
    checks = {check["name"]: check for check in json.loads(out)["checks"]}
    assert code == 0, checks
    assert "0 damaged" in checks["kill -9"]["detail"]
    assert "bit for bit" in checks["resumed"]["detail"]
    assert list((tmp_path / "runs").iterdir()) == []


def test_doctor_detects_different_weights(monkeypatch, tmp_path):
    digests = iter(["one", "another"])
    monkeypatch.setattr(fault_check, "_start", lambda *args, root: None)
    monkeypatch.setattr(fault_check, "_kill_repeatedly", lambda root, kills, generator: ("kill -9", True, "once"))
    monkeypatch.setattr(fault_check, "_finish", lambda process: next(digests))
    passed = {name: ok for name, ok, _ in fault_check.run(tmp_path / "runs", kills=1)}
    assert passed["kill -9"]
    assert not passed["resumed"]


@pytest.fixture
def can_mount():
    """Skip the test if file systems cannot be mounted."""
    if (
        shutil.which("unshare") is None
        or subprocess.run([*UNSHARE, "true"], capture_output=True, check=False).returncode
    ):
        pytest.skip("no file system can be mounted here")


def test_there_is_a_command_for_every_experiment():
    assert {name.split(",")[0] for name in KINDS} == set(registry.EXPERIMENTS)


@pytest.mark.faults
def test_every_kind_of_experiment_survives_a_full_disk(tmp_path, scenes, can_mount):
    results = run_scenario("small_disks", tmp_path, 1, timeout=900, module="kinds", prefix=UNSHARE)
    assert len(results) >= 10
    for name, entry in results.items():
        assert entry["code"] == 5, (name, entry)
        assert len(entry["errors"]) == 1, (name, entry)
        assert not entry["traceback"], (name, entry)
        assert "No space left on device; free space" in entry["errors"][0]
        assert (entry["corrupt"], entry["temporary_files"], entry["same"]) == (0, 0, True), (name, entry)


def test_read_only_runs_can_be_read_and_writing_exits_with_5(tmp_path, scenes, can_mount):
    results = run_scenario("read_only", tmp_path, 0, module="kinds", prefix=UNSHARE)
    for line, entry in results.items():
        assert not entry["traceback"], (line, entry)
        if line in WRITERS:
            assert entry["code"] == 5, (line, entry)
            assert len(entry["errors"]) == 1, (line, entry)
            assert "Read-only file system" in entry["errors"][0], (line, entry)
        else:
            assert entry["code"] in (0, 5), (line, entry)


@pytest.mark.faults
def test_a_run_whose_directory_is_removed_exits_with_5(tmp_path, scenes):
    for entry in run_scenario("removed", tmp_path, 4, module="kinds").values():
        assert entry["code"] == 5, entry
        assert not entry["traceback"], entry
        assert len(entry["output"]) == 1
        assert "No such file or directory; its folder was removed" in entry["output"][0]


@pytest.mark.faults
def test_training_on_photos_is_killed_in_each_of_its_phases(tmp_path):
    results = run_scenario("phases", tmp_path, 1, timeout=600, module="kinds")
    end = results.pop("end")
    assert {name: entry["code"] for name, entry in results.items()} == dict.fromkeys(
        ("decode", "features", "head", "finetune"), -9
    )
    assert end == {"differ": [], "same_cache": True}, results
    assert results["decode"]["cached"] <= results["features"]["cached"] <= results["head"]["cached"], (
        "cached photos and features are kept"
    )


@pytest.mark.faults
def test_every_kind_of_experiment_is_killed_and_resumed(tmp_path, scenes):
    results = run_scenario("kinds", tmp_path, 2, timeout=900, module="kinds")
    assert len(results) >= 10, results
    assert sum(entry["kills"] for entry in results.values()) >= 9, results
    for name, entry in results.items():
        assert (entry["differ"], entry["temporary_files"], entry["corrupt"]) == ([], [], 0), (name, entry)
