"""Sweeps on Ray: the same weights as on this machine, a node that is lost, a driver that is killed, refusals."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from cvlab import rundir
from cvlab.errors import ConfigError, DeviceError
from cvlab.submit import Submit, ray_tasks

pytest.importorskip("ray")
pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own

SWEEP = """experiment: sweep
base:
  experiment: classify
  data: {name: scenes10, num_train: 1000, val_fraction: 0.02}
  model: {name: deep_convnet, filters: [4], pools: [0]}
  optimizer: {name: sgd, lr: 1e-2}
  batch_size: 20
  duration: {steps: 1500}
  eval_every: 1000
  precision: float32
  threads: 1
grid:
  optimizer.lr: [1e-3, 1e-2]
"""


@pytest.fixture
def sweep(tmp_path):
    """Start `cvlab sweep s.yaml` in a process of its own; its standard error is kept in `said.txt`."""
    (tmp_path / "s.yaml").write_text(SWEEP)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    started = []

    def start(*words):
        with (tmp_path / "said.txt").open("ab") as said:
            command = [sys.executable, "-m", "cvlab", "sweep", "s.yaml", *words]
            started.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=said))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def digests(tmp_path):
    run = (tmp_path / "runs" / "latest").resolve()
    return [rundir.read_summary(arm)["weights_sha256"] for arm in sorted((run / "arms").iterdir())]


def until(condition, seconds=90):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def begun(tmp_path):
    return list(tmp_path.glob("runs/2*/arms/*/metrics.jsonl"))


@pytest.mark.slow
def test_a_node_that_is_lost_takes_no_arm_with_it(sweep, tmp_path):
    from ray.cluster_utils import Cluster

    assert sweep().wait() == 0
    wanted = digests(tmp_path)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        lost = cluster.add_node(num_cpus=1)
        process = sweep("--fresh", "--on", "ray", "--address", cluster.address)
        until(lambda: len(begun(tmp_path)) == 4)
        cluster.remove_node(lost, allow_graceful=False)
        assert process.wait() == 0, (tmp_path / "said.txt").read_text()
    finally:
        cluster.shutdown()
    assert digests(tmp_path) == wanted
    assert "try 2 of 3" in (tmp_path / "said.txt").read_text()


@pytest.mark.slow
def test_a_driver_that_is_killed_and_started_again(sweep, tmp_path):
    from ray.cluster_utils import Cluster

    assert sweep().wait() == 0
    wanted = digests(tmp_path)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    try:
        process = sweep("--fresh", "--on", "ray", "--address", cluster.address)
        until(lambda: len(begun(tmp_path)) == 4)
        process.kill()
        run = (tmp_path / "runs" / "latest").resolve()
        until(lambda: not any(map(rundir.is_held, run.glob("arms/*"))))
        stopped = [rundir.read_json(arm / "status.json") for arm in sorted(run.glob("arms/*"))]
        assert [status["status"] for status in stopped] == ["interrupted"] * 2, "they saved; nothing was killed"
        assert sweep("--on", "ray", "--address", cluster.address).wait() == 0
    finally:
        cluster.shutdown()
    assert digests(tmp_path) == wanted
    assert "going on with" in (tmp_path / "said.txt").read_text()


@pytest.mark.slow
def test_a_cluster_of_its_own_and_a_request_to_stop(sweep, tmp_path):
    assert sweep().wait() == 0
    wanted = digests(tmp_path)
    process = sweep("--fresh", "--on", "ray")
    until(lambda: len(begun(tmp_path)) == 4)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 143
    run = (tmp_path / "runs" / "latest").resolve()
    assert {rundir.read_status(arm)["status"] for arm in run.glob("arms/*")} == {"interrupted"}
    assert sweep("--on", "ray", "--workers", "1").wait() == 0
    assert digests(tmp_path) == wanted


@pytest.mark.parametrize("address", ["auto", "127.0.0.1:1", "127.0.0.1:99999", "no-such-host.invalid:6379"])
def test_a_cluster_that_does_not_answer_is_one_line(address, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match=rf"no Ray cluster at {address}.*`ray (start|status)"):
        ray_tasks._connect(Submit(on="ray", address=address))


def test_room():
    def row(alive, **resources):
        return {"Alive": alive, "Resources": resources}

    nodes = [row(True, CPU=5.0, GPU=1.0), row(True, CPU=2.0), row(False, CPU=64.0, GPU=8.0)]
    assert ray_tasks._room(nodes, Submit(on="ray")) == 7
    assert ray_tasks._room(nodes, Submit(on="ray", cpus=2)) == 3
    assert ray_tasks._room(nodes, Submit(on="ray", cpus=2, gpus=1)) == 1
    with pytest.raises(DeviceError, match=r"no node of the Ray cluster has room for an arm with cpus: 1 and gpus: 2"):
        ray_tasks._require_room(nodes, Submit(on="ray", gpus=2))


def test_json_of_a_plan(cvlab, tmp_path):
    (tmp_path / "s.yaml").write_text(SWEEP)
    code, out, err = cvlab("sweep", "s.yaml", "--on", "ray", "--address", "auto", "--dry-run", "--json")
    plan = json.loads(out)
    assert code == 0 and (plan["on"], plan["workers"]) == ("ray", "as many as there is room for"), err
