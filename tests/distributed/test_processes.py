"""Distributed runs in several processes: gradients, collectives, kills, signals, exit codes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from cvlab.runs import checkpoint
from cvlab.runs.find import list_runs
from cvlab.runs.records import read_metrics, read_status, read_summary
from tests.distributed.ranks import free_port

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent.parent
CONFIG = """experiment: classify
data: {name: scenes10, num_train: 400, val_fraction: 0.02}
model: {name: deep_convnet, filters: [8, 8], pools: [0, 1], batchnorm: true}
optimizer: {name: adam, lr: 1e-2}
batch_size: 20
duration: {epochs: 10}
threads: 1
precision: float32
ema: 0.9
augment: {flip: true, translate_px: 2}
skip_easy: 0.2
save_seconds: 0
"""


def run_scenario(scenario, folder, size):
    """Run a scenario of tests/distributed/ranks.py in `size` processes; return the result of each."""
    processes, port = [], free_port()
    for rank in range(size):
        variables = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCH_CPP_LOG_LEVEL": "ERROR"}
        environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
        command = [sys.executable, "-m", "tests.distributed.ranks", scenario, str(folder / scenario)]
        processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True))
    for process in processes:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    return [json.loads(Path(f"{folder / scenario}.{rank}").read_text()) for rank in range(size)]


@pytest.mark.parametrize("size", [2, 3])
def test_the_mean_gradient_of_the_shards_equals_that_of_the_batch(tmp_path, size):
    assert max(run_scenario("gradients", tmp_path, size)) < 1e-6


def test_evaluation_uses_each_item_once(tmp_path):
    for results in run_scenario("evaluation", tmp_path, 3):
        for count, mean, counts in results:
            assert mean == pytest.approx((count - 1) / 2)
            assert counts == [1.0]


def test_collectives(tmp_path):
    results = run_scenario("collective_results", tmp_path, 3)
    assert results == [results[0]] * 3
    assert results[0] == {
        "from_main": "of 0",
        "gathered": [0, 1, 2],
        "concatenated": [0, 0, 1, 10, 2, 20],
        "buffer": 0.0,
    }


def test_20_of_20_pairs_of_processes_exit_cleanly():
    command = [sys.executable, "-m", "tests.distributed.ranks", "connect_pairs", "20"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(process.stdout) == [0] * 40, process.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data_root):
    """Return the folder of a configuration and the summary of its uninterrupted run in two processes."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "c.yaml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CVLAB_DATA", str(data_root))
        process = start(folder, "whole")
    _, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    return folder, read_summary(folder / "whole" / "latest")


def start(folder, root, *options, command=("train", "c.yaml", "--nproc", "2")):
    program = [sys.executable, "-m", "cvlab", *command, "--runs-dir", str(folder / root), "-q", *options]
    return subprocess.Popen(program, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_steps(process, run, count=20):
    deadline = time.monotonic() + 90
    while not (rows := list(read_metrics(run))) or rows[-1]["step"] < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)


def find_ranks(run):
    """Return the processes that train in a run directory, by rank."""
    pids = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            args = (process / "cmdline").read_bytes().split(b"\0")
            environment = dict(
                line.split(b"=", 1) for line in (process / "environ").read_bytes().split(b"\0") if b"=" in line
            )
        except OSError:
            continue
        if any(bytes(run.resolve()) in arg for arg in args) and b"RANK" in environment:
            pids[int(environment[b"RANK"])] = int(process.name)
    return pids


def assert_same_result(run, summary):
    actual = read_summary(run)
    assert actual["weights_sha256"] == summary["weights_sha256"]
    timed = ("train_seconds", "images_per_second")
    assert all(actual["metrics"][key] == value for key, value in summary["metrics"].items() if key not in timed)
    assert actual["metrics"]["steps"] == summary["metrics"]["steps"]


def test_two_processes_train_like_one(trained, tmp_path):
    folder, summary = trained
    process = start(folder, "one", command=("train", "c.yaml"))
    assert process.communicate(timeout=180)
    assert process.returncode == 0
    reference = read_summary(folder / "one" / "latest")["metrics"]
    assert summary["metrics"]["steps"] == reference["steps"]
    assert summary["metrics"]["train_accuracy"] > 0.4
    rows = [list(read_metrics(folder / root / "latest")) for root in ("whole", "one")]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
    assert rows[0][0]["train_loss"] == pytest.approx(rows[1][0]["train_loss"], rel=0.2)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_run_with_a_killed_process_restarts_bit_for_bit_identical(trained, rank):
    folder, summary = trained
    process = start(folder, f"killed{rank}", "--max-restarts", "1")
    run = folder / f"killed{rank}" / "latest"
    wait_for_steps(process, run)
    os.kill(find_ranks(run)[rank], signal.SIGKILL)
    _, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    assert "restarting all processes" in err, err
    assert "Traceback" not in err, err
    assert_same_result(run, summary)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_signal_to_the_command_stops_all_ranks_after_the_same_step(trained, number, code):
    folder, summary = trained
    root = f"stopped{int(number)}"
    process = start(folder, root)
    run = folder / root / "latest"
    wait_for_steps(process, run)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "Traceback" not in err, err
    deadline = time.monotonic() + 30
    while find_ranks(run):
        assert time.monotonic() < deadline, "a process survives its command"
        time.sleep(0.05)
    saved, logged = checkpoint.steps(run / "checkpoints")[-1], list(read_metrics(run))[-1]["step"]
    assert saved >= logged
    assert read_status(run)["status"] == "interrupted"
    resumed = start(folder, root, command=("resume", "latest"))  # in two processes, as at the start
    _, err = resumed.communicate(timeout=180)
    assert resumed.returncode == 0, err
    assert "not bitwise" not in err, err
    assert_same_result(run, summary)


def test_a_signal_to_one_rank_stops_all(trained):
    folder, _ = trained
    process = start(folder, "one_stopped")
    run = folder / "one_stopped" / "latest"
    wait_for_steps(process, run)
    os.kill(find_ranks(run)[1], signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert "Traceback" not in err, err
    assert "interrupted by SIGTERM at step" in err
    assert read_status(run)["status"] == "interrupted"


def test_a_run_can_be_resumed_with_another_number_of_processes(trained):
    folder, _ = trained
    process = start(folder, "other")
    run = folder / "other" / "latest"
    wait_for_steps(process, run)
    process.terminate()
    process.communicate(timeout=60)
    resumed = start(folder, "other", command=("resume", "latest", "--nproc", "1"))
    _, err = resumed.communicate(timeout=120)
    assert resumed.returncode == 0
    assert "processes was 2, is 1: the result is not bitwise" in err


@pytest.mark.parametrize("restarts", [0, 1])
def test_torchrun_with_the_same_command_line(trained, restarts):
    folder, summary = trained
    root = f"torchrun{restarts}"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", str(restarts), "-m", "cvlab", "train", "c.yaml", "-q", "--runs-dir", root]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run = folder / root / "latest"
    if restarts:
        wait_for_steps(process, run)
        os.kill(json.loads((run / "run.lock").read_text())["pid"], signal.SIGKILL)
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    assert out.count("run directory") == 1
    assert len(list_runs(folder / root)) == 1
    assert_same_result(run, summary)
    assert ("resumed step_" in (run / "log.txt").read_text()) == bool(restarts)


DIVERGES_ON_RANK_1 = """
import os
from torch import nn
class Net(nn.Sequential):
    def __init__(self, num_classes, image_size):
        super().__init__(nn.Flatten(), nn.Linear(3 * image_size**2, num_classes))
        self.steps = 0
    def forward(self, images):
        self.steps += self.training
        return super().forward(images) * (float("nan") if self.steps > 5 and os.environ.get("RANK") == "1" else 1)
"""
DIVERGING = ("model={name: ./net.py:Net}", "ema=null", "skip_easy=0")


@pytest.mark.parametrize(("overrides", "code"), [(("expect=[val_accuracy > 2]",), 3), (DIVERGING, 6)])
def test_exit_codes_with_several_processes_equal_those_with_one(trained, overrides, code):
    folder, _ = trained
    (folder / "net.py").write_text(DIVERGES_ON_RANK_1)
    process = start(folder, f"code{code}", "duration={epochs: 1}", *overrides, "--json")
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    assert "Traceback" not in err, err
    assert json.loads(out)["error"]["code"] == code
    assert len([line for line in err.splitlines() if line.startswith("error: ")]) == (1 if code == 3 else 2), err


def write_captions(folder):
    for k in range(12):
        Image.effect_noise((70, 64), 40 + 10 * k).convert("RGB").save(folder / f"{k}.png")
    rows = [f"{k}.png,a {word} dog" for k in range(12) for word in ("black", "white", "small")]
    (folder / "captions.csv").write_text("image,caption\n" + "\n".join(rows) + "\n")
    return f"data={{name: captions, path: {folder / 'captions.csv'}}}"


@pytest.mark.parametrize("kind", ["yolo_fpn", "faster_rcnn", "captioner"])
def test_every_kind_of_training_runs_in_several_processes(tmp_path, data_root, monkeypatch, kind):
    monkeypatch.setenv("CVLAB_DATA", str(data_root / "whole"))  # the processes generate all of the scenes
    overrides = (
        "size=64",
        "batch_size=4",
        "duration={steps: 6}",
        "eval_every=1000",
        "evaluate_test=false",
        "expect=[]",
    )
    if kind == "captioner":
        args = (
            "caption_overfit",
            write_captions(tmp_path),
            "model={name: captioner, embed_dim: 8, hidden_dim: 16}",
            "min_word_count=1",
        )
        overrides = (*overrides, "strides=[32]", "beam=2")
    else:
        args = ("yolo_scenes", "data={name: scenes, num_train: 8}", f"model={{name: {kind}}}", "views=1")
    digests = []
    for root in ("one", "two"):
        process = start(tmp_path, root, command=("train", *args, *overrides, "--nproc", "2"))
        _, err = process.communicate(timeout=180)
        assert process.returncode == 0, err
        digests.append(read_summary(tmp_path / root / "latest")["weights_sha256"])
    assert digests[0] == digests[1]
