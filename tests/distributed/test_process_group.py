"""Distributed runs, tests in a single process: shards, errors, collectives of one process."""

import os
import subprocess
import sys

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from cvlab.api import launch
from cvlab.config import loading
from cvlab.distributed import collectives, process_group, sharding
from cvlab.errors import ConfigError
from cvlab.runs.run_dir import RunDir

ENVIRONMENT = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"} | {
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "1",
}


@pytest.fixture
def set_environment(monkeypatch):
    """Set the environment of one of several processes, as torchrun does."""

    def set_variables(**overrides):
        for name, value in (ENVIRONMENT | overrides).items():
            monkeypatch.setenv(name, value)
        process_group.world.cache_clear()
        return process_group.world()

    yield set_variables
    monkeypatch.undo()
    process_group.world.cache_clear()


@hypothesis.given(count=st.integers(0, 300), size=st.integers(1, 40))
def test_each_item_is_evaluated_once(count, size):
    shards = [range(*sharding.shard_range(count, rank, size)) for rank in range(size)]
    assert [k for shard in shards for k in shard] == list(range(count))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


@hypothesis.given(shard_size=st.integers(1, 20), size=st.integers(2, 12))
@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_concatenated_shards_equal_the_batch(set_environment, shard_size, size):
    batch = torch.randperm(shard_size * size)
    shards = []
    for rank in range(size):
        set_environment(RANK=str(rank), WORLD_SIZE=str(size))
        shards.append(sharding.shard(batch))
    assert torch.equal(torch.cat(shards), batch)
    assert {len(shard) for shard in shards} == {shard_size}


def test_collectives_are_the_identity_in_one_process(monkeypatch):
    process_group.world.cache_clear()
    assert process_group.world() == process_group.World()
    assert process_group.is_main()
    assert process_group.launch_id() is None
    batch = torch.arange(5)
    assert sharding.shard(batch) is batch
    assert collectives.all_gather_cat(batch) is batch
    assert collectives.all_gather_object(3) == [3]
    assert collectives.broadcast_from_rank0(lambda: 4) == 4
    assert collectives.all_reduce_sums({"a": batch})["a"] is batch
    assert process_group.pending_signal(None) is None
    assert process_group.pending_signal(15) == 15
    with process_group.init_process_group():
        pass


def test_the_world_is_read_from_the_environment(set_environment, monkeypatch):
    world = set_environment()
    assert (world.rank, world.size, world.local_rank, world.local_size) == (1, 4, 1, 2)
    assert not process_group.is_main()
    assert set_environment(WORLD_SIZE="1", RANK="0") == process_group.World()
    with pytest.raises(ConfigError, match="start it with torchrun"):
        set_environment(RANK="one")
    command = [sys.executable, "-m", "cvlab", "runs"]
    process = subprocess.run(command, env={**os.environ}, capture_output=True, text=True, check=False)
    assert process.returncode == 2
    assert process.stderr.count("\n") == 1
    assert "start it with torchrun" in process.stderr


def test_a_process_without_its_launcher_requests_a_stop(set_environment, monkeypatch):
    set_environment()
    assert process_group.pending_signal(None) is None
    monkeypatch.setattr("os.getppid", lambda: 1)
    assert process_group.pending_signal(None) == 15


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        (
            ("quickstart", "batch_size=25"),
            2,
            "batch_size 25: 2 processes cannot share it equally; give a multiple of 2",
        ),
        (("quickstart", "duration={seconds: 5}"), 2, "several processes need a number of steps"),
        (("attack",), 2, "attack runs in one process; leave --nproc out"),
        (("cifar_bn_lr_sweep",), 2, "sweep runs in one process"),
        (("quickstart", "device=cuda"), 8, "device cuda is not available"),
        (("quickstart", "lr=1"), 2, "unknown key 'lr'"),
    ],
)
def test_configurations_that_cannot_be_distributed_are_rejected_before_the_run_exists(
    cvlab, tmp_path, args, code, text
):
    if "cuda" in str(args) and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    exit_code, _, err = cvlab("train", *args, "--nproc", "2", "--runs-dir", tmp_path / "runs")
    assert exit_code == code
    assert text in err
    assert not (tmp_path / "runs").exists()


def test_a_run_resumes_with_its_number_of_processes(tmp_path, set_environment):
    RunDir(tmp_path).write_json("env.json", {"processes": 2})
    text = loading.load("quickstart", ["batch_size=12"]).config.to_yaml()
    (tmp_path / "config.yaml").write_text(text)
    process_group.world.cache_clear()
    with pytest.raises(ConfigError, match="batch_size 12: 5 processes cannot share it"):
        launch.require_processes(tmp_path, 5)
    assert launch.require_processes(tmp_path, None) == 2
    assert launch.require_processes(tmp_path, 3) == 3
    set_environment(WORLD_SIZE="4")
    with pytest.raises(ConfigError, match="started in 2 processes, torchrun has started 4; --nproc 4 resumes"):
        launch.require_processes(tmp_path, None)
    assert launch.require_processes(tmp_path, 4) == 4
    (tmp_path / "config.yaml").write_text("experiment: sweep\nbase: {from: quickstart}\nseeds: [0, 1]\n")
    with pytest.raises(ConfigError, match="sweep runs in one process; leave --nproc out"):
        launch.require_processes(tmp_path, 4)


def test_torchrun_starts_training_runs_only(cvlab, set_environment):
    set_environment()
    code, _, err = cvlab("sweep", "cifar_bn_lr_sweep")
    assert code == 2
    assert "sweep runs in one process; call it without torchrun" in err


def test_restarted_processes_find_their_run(tmp_path, set_environment, monkeypatch):
    for name, launch_id in (("a", "one"), ("b", "two"), ("c", "one")):
        out = RunDir(tmp_path / name)
        out.path.mkdir()
        out.set_status("running")
        out.write_json("env.json", {"launch": launch_id})
    set_environment(TORCHELASTIC_RUN_ID="two", TORCHELASTIC_RESTART_COUNT="1")
    assert launch.run_dir_of_launch(lambda: pytest.fail("a new run directory"), tmp_path).name == "b"


def test_the_performance_model_of_the_all_reduce():
    from cvlab.bench.processes import speedup

    assert speedup(1, 0.1, 10**6, 1e-4, 1e9) == pytest.approx(1)
    assert speedup(4, 0.1, 0, 0.0, 1e9) == pytest.approx(4)
    assert speedup(2, 0.1, 10**8, 0.0, 1e9) == pytest.approx(0.1 / (0.05 + 0.1))
