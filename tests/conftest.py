"""Fixtures: no test opens a socket, writes outside its own folder or depends on the machine's threads."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

REAL_DATA = os.environ.get("CVLAB_DATA")
IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ


def pytest_xdist_auto_num_workers(config):
    """Run the whole fast suite in a process per core; chosen files, and tests chosen by `-m`, in this one."""
    is_whole = config.args_source != config.ArgsSource.ARGS and "not slow" in config.option.markexpr
    return min(os.cpu_count() or 1, 4) if is_whole else 0


@pytest.fixture(scope="session")
def data_root(tmp_path_factory):
    """A data folder that is shared by all tests, so that the scenes are generated once."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path, data_root):
    """Every test starts in a folder of its own, offline."""
    from cvlab import console

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CVLAB_DATA", str(data_root))
    monkeypatch.setenv("CVLAB_OFFLINE", "1")
    monkeypatch.delenv("CVLAB_RUNS", raising=False)
    console.set_level(quiet=False, verbose=False)
    torch.set_num_threads(1 if IS_WORKER else 2)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def few_sentences(monkeypatch):
    """Of the built-in set with sentences a few pictures are enough: all of it takes most of a minute."""
    from cvlab.experiments.captioning import scene_captions

    monkeypatch.setattr(scene_captions, "COUNTS", {"train": 12, "val": 4, "test": 4})


@pytest.fixture
def real_cifar10(monkeypatch):
    """The folder of the real data sets; the test skips where CIFAR-10 is not in it."""
    if not REAL_DATA or not (Path(REAL_DATA) / "cifar-10-batches-py" / "data_batch_1").is_file():
        pytest.skip("CVLAB_DATA has no cifar-10-batches-py")
    monkeypatch.setenv("CVLAB_DATA", REAL_DATA)
    return Path(REAL_DATA)


@pytest.fixture
def stopped_and_resumed(cvlab, monkeypatch):
    """Train once as it is and once stopped after its second step and resumed: the JSON of both runs."""
    from cvlab.engine import trainer
    from cvlab.errors import StoppedError

    def both(*words):
        code, whole, err = cvlab("train", *words, "--json")
        assert code == 0, err
        real = trainer.Trainer._between_steps

        def stopping(session, step, save_due):
            real(session, step, save_due)
            if step == 2:
                raise StoppedError("stopped for a test", "", 130)

        with monkeypatch.context() as patch:
            patch.setattr(trainer.Trainer, "_between_steps", stopping)
            assert cvlab("train", *words)[0] == 130
        code, again, err = cvlab("resume", "latest", "--json")
        assert code == 0, err
        assert "resumed step_" in err, err
        return json.loads(whole), json.loads(again)

    return both


def weights_digest(found):
    """Return the digest of the weights that a run ended with."""
    return json.loads((Path(found["run"]) / "summary.json").read_text())["weights_sha256"]


@pytest.fixture
def cvlab(capsys):
    """Call a command line in this process: `code, out, err = cvlab("train", "quickstart")`."""
    from cvlab.cli import main

    def call(*arguments):
        capsys.readouterr()
        code = main.run_command_line([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


SMALL_SWEEP = """experiment: sweep
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
def started_sweep(tmp_path):
    """Start `cvlab sweep s.yaml` in a process of its own; what it says on standard error is kept in `said.txt`."""
    (tmp_path / "s.yaml").write_text(SMALL_SWEEP)
    started = []

    def start(*words):
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        with (tmp_path / "said.txt").open("ab") as said:
            command = [sys.executable, "-m", "cvlab", "sweep", "s.yaml", *words]
            started.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=said))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def weights_of_arms(folder):
    """Return the digests of the weights of all arms of the newest sweep below a test's folder."""
    arms = sorted((folder / "runs" / "latest").resolve().glob("arms/*"))
    return [json.loads((arm / "summary.json").read_text())["weights_sha256"] for arm in arms]


def until(condition, seconds=90):
    """Wait for a condition."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
