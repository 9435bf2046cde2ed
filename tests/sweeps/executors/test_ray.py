"""Sweeps on Ray: the same weights as with local processes, a lost node, a killed scheduler, errors."""

import json
import signal

import pytest

from cvlab.errors import ConfigError, DeviceError
from cvlab.runs.records import read_json, read_status
from cvlab.storage.lock import is_held
from cvlab.sweeps.executors import SubmitConfig, ray_tasks
from tests.conftest import SMALL_SWEEP, until, weights_of_trials

pytest.importorskip("ray")
METRICS_FILES = "runs/2*/trials/*/metrics.jsonl"
pytestmark = pytest.mark.filterwarnings("ignore")  # warnings of Ray itself


@pytest.mark.slow
def test_trials_of_a_lost_node_are_retried(started_sweep, undisturbed_weights, tmp_path):
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        (tmp_path / "slow").touch()
        lost = cluster.add_node(num_cpus=1)
        process = started_sweep("--on", "ray", "--address", cluster.address)
        until(lambda: len(list(tmp_path.glob(METRICS_FILES))) == 2)
        cluster.remove_node(lost, allow_graceful=False)
        (tmp_path / "slow").unlink()
        assert process.wait() == 0, (tmp_path / "stderr.txt").read_text()
    finally:
        cluster.shutdown()
    assert weights_of_trials(tmp_path) == undisturbed_weights
    assert "try 2 of 3" in (tmp_path / "stderr.txt").read_text()


@pytest.mark.slow
def test_a_killed_scheduler_that_is_started_again(started_sweep, undisturbed_weights, tmp_path):
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    (tmp_path / "slow").touch()
    try:
        process = started_sweep("--on", "ray", "--address", cluster.address)
        until(lambda: len(list(tmp_path.glob(METRICS_FILES))) == 2)
        process.kill()
        run = (tmp_path / "runs" / "latest").resolve()
        until(lambda: not any(map(is_held, run.glob("trials/*"))))
        stopped = [read_json(trial / "status.json") for trial in sorted(run.glob("trials/*"))]
        assert [status["status"] for status in stopped] == ["interrupted"] * 2, (
            "the trials saved their state and were not killed"
        )
        (tmp_path / "slow").unlink()
        assert started_sweep("--on", "ray", "--address", cluster.address).wait() == 0
    finally:
        cluster.shutdown()
    assert weights_of_trials(tmp_path) == undisturbed_weights
    assert "resuming" in (tmp_path / "stderr.txt").read_text()


@pytest.mark.slow
def test_a_temporary_cluster_and_a_request_to_stop(started_sweep, undisturbed_weights, tmp_path):
    (tmp_path / "slow").touch()
    process = started_sweep("--on", "ray")
    until(lambda: len(list(tmp_path.glob(METRICS_FILES))) == 2)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 143
    run = (tmp_path / "runs" / "latest").resolve()
    assert {read_status(trial)["status"] for trial in run.glob("trials/*")} == {"interrupted"}
    (tmp_path / "slow").unlink()
    assert started_sweep("--on", "ray", "--workers", "1").wait() == 0
    assert weights_of_trials(tmp_path) == undisturbed_weights


MODEL_CODE = """import os, pathlib
from torch import nn

def net():
    (pathlib.Path(os.environ["CVLAB_SEEN"]) / str(os.getpid())).write_text(os.environ["CUDA_VISIBLE_DEVICES"])
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
"""


@pytest.mark.slow
def test_gpus_of_a_trial(started_sweep, tmp_path, monkeypatch):
    from ray.cluster_utils import Cluster

    visible_devices = tmp_path / "seen"
    visible_devices.mkdir()
    monkeypatch.setenv("CVLAB_SEEN", str(visible_devices))  # environment variables of cvlab are passed to the trials
    (tmp_path / "net.py").write_text(MODEL_CODE)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 8, "num_gpus": 2})
    args = ("--on", "ray", "--address", cluster.address, "submit.gpus=1", "base.device=cpu", "base.duration.steps=3")
    try:
        assert started_sweep(*args, "base.model={name: './net.py:net'}", "seeds=[0,1]").wait() == 0
        stderr = (tmp_path / "stderr.txt").read_text()
        assert started_sweep(*args, "--fresh", "submit.gpus=3").wait() == 8
    finally:
        cluster.shutdown()
    assert {path.read_text() for path in visible_devices.iterdir()} == {"0", "1"}, stderr
    assert "has room for a trial with cpus: 1 and gpus: 3" in (tmp_path / "stderr.txt").read_text()


@pytest.mark.parametrize("address", ["auto", "127.0.0.1:1", "127.0.0.1:99999", "no-such-host.invalid:6379"])
def test_a_cluster_that_does_not_respond_gives_a_one_line_error(address, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match=rf"no Ray cluster at {address}.*`ray (start|status)"):
        ray_tasks._connect(SubmitConfig(on="ray", address=address))


def test_capacity():
    def node_info(is_alive, **resources):
        return {"Alive": is_alive, "Resources": resources}

    nodes = [node_info(True, CPU=5.0, GPU=1.0), node_info(True, CPU=2.0), node_info(False, CPU=64.0, GPU=8.0)]
    assert ray_tasks._capacity(nodes, SubmitConfig(on="ray")) == 7
    assert ray_tasks._capacity(nodes, SubmitConfig(on="ray", cpus=2)) == 3
    assert ray_tasks._capacity(nodes, SubmitConfig(on="ray", cpus=2, gpus=1)) == 1
    with pytest.raises(DeviceError, match=r"no node of the Ray cluster has room for a trial with cpus: 1 and gpus: 2"):
        ray_tasks._require_capacity(nodes, SubmitConfig(on="ray", gpus=2))


def test_dry_run_with_json(cvlab, tmp_path):
    (tmp_path / "s.yaml").write_text(SMALL_SWEEP)
    code, out, err = cvlab("sweep", "s.yaml", "--on", "ray", "--address", "auto", "--dry-run", "--json")
    plan = json.loads(out)
    assert code == 0, err
    assert (plan["on"], plan["workers"]) == ("ray", None), err
