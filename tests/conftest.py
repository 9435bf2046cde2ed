"""Shared fixtures. Tests are offline, write to their own folder only, and do not depend on the number of cores."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
REAL_DATA = os.environ.get("CVLAB_DATA")
PROCESS_TESTS = ("distributed", "sweeps")  # folders of the tests of several processes
IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ


def pytest_xdist_auto_num_workers(config):
    """Run the whole fast suite in one process per core, but selected files and markers in a single process."""
    is_whole = config.args_source != config.ArgsSource.ARGS and "not slow" in config.option.markexpr
    return min(os.cpu_count() or 1, 4) if is_whole else 0


def pytest_runtest_setup(item):
    """Skip tests that need a GPU if there is none."""
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("there is no GPU")


@pytest.fixture(scope="session")
def data_root(tmp_path_factory):
    """Return the data folder that all tests share, so that generated data sets are generated once.

    It has a fifth of scenes10, also for the processes that tests start: each run reads and hashes all of its data.
    """
    from cvlab.experiments.classification.data import scenes10

    base = tmp_path_factory.getbasetemp()
    root = (base.parent if IS_WORKER else base) / "data"  # `scenes` alone takes 15 s of CPU time
    root.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes10, "NUM_TRAIN", 2_500)
        patch.setattr(scenes10, "NUM_TEST", 500)
        scenes10.load(root)
    return root


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path, data_root):
    """Start every test offline, in its own folder, with the same seed and number of threads."""
    from cvlab import console

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CVLAB_DATA", str(data_root))
    monkeypatch.setenv("CVLAB_OFFLINE", "1")
    monkeypatch.delenv("CVLAB_RUNS", raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))))
    console.set_level(quiet=False, verbose=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # for the processes that a test starts
    torch.set_num_threads(1 if IS_WORKER else 2)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def small_scenes(request, monkeypatch, clean_environment, data_root):
    """Generate only a few images of scenes and scene_captions; all of them take 15 s and almost a minute.

    Slow tests train to the end, on all images of the built-in data sets, in a separate folder, except those of
    PROCESS_TESTS, whose outcome does not depend on the number of images.
    """
    from cvlab.experiments.captioning import scene_captions
    from cvlab.experiments.detection.data import scenes

    folder = request.path.relative_to(ROOT / "tests").parts[0]
    if request.node.get_closest_marker("slow") and folder not in PROCESS_TESTS:
        monkeypatch.setenv("CVLAB_DATA", str(data_root / "whole"))
        return
    monkeypatch.setattr(scenes, "COUNTS", {"train": 40, "val": 8, "test": 8})
    monkeypatch.setattr(scene_captions, "COUNTS", {"train": 12, "val": 4, "test": 4})


@pytest.fixture
def drawn_plots():
    """Render the plots of runs; see `blank_plots`."""


@pytest.fixture(autouse=True)
def blank_plots(request, monkeypatch):
    """Replace the plots of runs by blank images, also in the trials of sweeps that this process starts."""
    from cvlab.sweeps.executors import local
    from tests import blank_plots

    if "drawn_plots" not in request.fixturenames:
        blank_plots.apply(monkeypatch.setattr)
        monkeypatch.setattr(local, "PRELOADED", (*local.PRELOADED, "tests.blank_trials"))


@pytest.fixture
def real_cifar10(monkeypatch):
    """Return the folder of the real data sets; skip the test if CIFAR-10 is not in it."""
    if not REAL_DATA or not (Path(REAL_DATA) / "cifar-10-batches-py" / "data_batch_1").is_file():
        pytest.skip("CVLAB_DATA has no cifar-10-batches-py")
    monkeypatch.setenv("CVLAB_DATA", REAL_DATA)
    return Path(REAL_DATA)


@pytest.fixture
def stopped_and_resumed(cvlab, monkeypatch):
    """Return a function that trains twice, without and with a stop after step 2, and returns the JSON of both runs."""
    from cvlab.engine import trainer
    from cvlab.errors import StoppedError

    def train_twice(*args):
        code, uninterrupted, err = cvlab("train", *args, "--json")
        assert code == 0, err
        between_steps = trainer.Trainer._between_steps

        def stop_after_two(session, step, save_due):
            between_steps(session, step, save_due)
            if step == 2:
                raise StoppedError("stopped for a test", "", 130)

        with monkeypatch.context() as patch:
            patch.setattr(trainer.Trainer, "_between_steps", stop_after_two)
            assert cvlab("train", *args)[0] == 130
        code, resumed, err = cvlab("resume", "latest", "--json")
        assert code == 0, err
        assert "resumed step_" in err, err
        return json.loads(uninterrupted), json.loads(resumed)

    return train_twice


def weights_digest(result):
    """Return the SHA-256 of the final weights of a run, given its JSON result."""
    return json.loads((Path(result["run"]) / "summary.json").read_text())["weights_sha256"]


@pytest.fixture
def cvlab(capsys):
    """Return a function that runs a command in this process: `code, out, err = cvlab("train", "quickstart")`."""
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


SLOW_MODEL = """import os
import time

from cvlab.experiments.classification.models.convnet import deep_convnet


def net():
    model = deep_convnet(filters=(4,), pools=(0,))
    model.register_forward_pre_hook(lambda *_: time.sleep(0.02 * os.path.exists(os.environ["CVLAB_TEST_SLOW"])))
    return model
"""


@pytest.fixture(scope="session")
def undisturbed_weights(tmp_path_factory, data_root):
    """Return the digests of the weights of the trials of SMALL_SWEEP, run without interruption."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "s.yaml").write_text(SMALL_SWEEP)
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "CVLAB_DATA": str(data_root)}
    command = [sys.executable, "-m", "cvlab", "sweep", "s.yaml", "-q"]
    subprocess.run(command, cwd=folder, env=os.environ | environment, stdout=subprocess.DEVNULL, check=True)
    return weights_of_trials(folder)


@pytest.fixture
def started_sweep(tmp_path):
    """Return a function that starts `cvlab sweep s.yaml` in another process, with standard error in `stderr.txt`.

    While the file `slow` exists, each step takes 20 ms, so that no trial ends before a test interrupts it.
    """
    model = "{name: deep_convnet, filters: [4], pools: [0]}"
    assert model in SMALL_SWEEP
    (tmp_path / "net.py").write_text(SLOW_MODEL)
    (tmp_path / "s.yaml").write_text(SMALL_SWEEP.replace(model, "{name: './net.py:net'}"))
    started = []

    def start(*args):
        environment = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        environment = os.environ | environment | {"CVLAB_TEST_SLOW": str(tmp_path / "slow")}
        with (tmp_path / "stderr.txt").open("ab") as stderr:
            command = [sys.executable, "-m", "cvlab", "sweep", "s.yaml", *args]
            started.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=stderr))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def weights_of_trials(folder):
    """Return the digests of the weights of all trials of the newest sweep below a test's folder."""
    trials = sorted((folder / "runs" / "latest").resolve().glob("trials/*"))
    return [json.loads((trial / "summary.json").read_text())["weights_sha256"] for trial in trials]


def until(condition, seconds=90):
    """Wait until a condition holds; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
