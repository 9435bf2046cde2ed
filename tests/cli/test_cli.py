"""The commands, called in this process: their output, exit codes and files."""

import json
import os
import subprocess
import sys

import pytest
from PIL import Image

from cvlab import __version__
from cvlab.cli import main
from cvlab.config import loading
from cvlab.reports import plots
from cvlab.runs import run_dir
from cvlab.runs.find import find_run, runs_root
from cvlab.runs.records import read_json, read_metrics, read_status

TINY = """experiment: classify
data: {name: scenes10, num_train: 100, val_fraction: 0.02}
model: {name: deep_convnet, filters: [4, 8], pools: [0, 1], batchnorm: true}
optimizer: {name: adam, lr: 1e-2}
batch_size: 20
duration: {epochs: 2}
log_every: 2
threads: 1
precision: float32
expect:
  - train_accuracy >= 0.05
"""
TO_PNG = plots.to_png  # before the fixture `blank_plots` replaces it


@pytest.fixture
def tiny(tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    return "tiny.yaml"


def error_of(out):
    document = json.loads(out)
    assert document["ok"] is False
    return document["error"]


@pytest.mark.usefixtures("drawn_plots")
def test_a_run_from_start_to_report(cvlab, tiny, tmp_path):
    code, out, err = cvlab("train", tiny)
    assert code == 0
    assert err.splitlines()[0].startswith("run directory runs/")
    assert "a crash loses" not in err
    assert out.splitlines()[-1].startswith("run directory runs/")
    assert "train_accuracy >= 0.05" in out
    assert "met" in out
    run = tmp_path / "runs" / "latest"
    assert {"config.yaml", "env.json", "status.json", "metrics.jsonl", "summary.json", "log.txt"} <= set(
        os.listdir(run)
    )
    assert (run / "plots" / "loss.png").read_bytes()[:4] == b"\x89PNG"
    summary = read_json(run / "summary.json")
    assert summary["status"] == "done"
    assert summary["data"] == "scenes10"
    assert len(summary["weights_sha256"]) == 64
    assert read_json(run / "env.json")["threads"] == 1
    rows = list(read_metrics(run))
    assert [row["step"] for row in rows] == [2, 4, 5, 6, 8, 10, 10]
    assert {"train_accuracy", "val_accuracy", "val_loss"} <= rows[-1].keys()


def test_json_is_one_document(cvlab, tiny):
    code, out, _ = cvlab("train", tiny, "--json", "-q")
    document = json.loads(out)
    assert code == 0
    assert list(document) == ["ok", "run", "experiment", "status", "data", "metrics", "expect", "files"]
    assert document["ok"]
    assert document["status"] == "done"
    assert document["experiment"] == "classify"
    assert document["expect"] == [
        {"rule": "train_accuracy >= 0.05", "measured": document["metrics"]["train_accuracy"], "met": True}
    ]
    assert "checkpoints/step_000000010.pt" in document["files"]


def test_an_unmet_expectation_exits_with_3(cvlab, tiny):
    code, out, err = cvlab("train", tiny, "expect=[train_accuracy > 1]", "-q")
    assert code == 3
    assert "NOT MET" in out
    assert "error: not met: train_accuracy > 1" in err
    code, out, _ = cvlab("train", tiny, "expect=[train_accuracy > 1, val_loss < 0]", "--json", "-q")
    document = json.loads(out)
    assert code == 3
    assert document["ok"] is False
    assert document["error"]["code"] == 3
    assert document["status"] == "expectations_failed"
    assert [v["met"] for v in document["expect"]] == [False, False]


def test_running_the_resolved_configuration_reproduces_the_run(cvlab, tiny):
    first = json.loads(cvlab("run", tiny, "--json", "-q", "--seed", 5)[1])
    second = json.loads(cvlab("run", first["run"] + "/config.yaml", "--json", "-q")[1])
    digests = [read_json(run_dir.Path(r["run"]) / "summary.json")["weights_sha256"] for r in (first, second)]
    assert digests[0] == digests[1]


def test_resuming_a_finished_run_reports_it(cvlab, tiny):
    cvlab("train", tiny, "-q")
    code, out, err = cvlab("resume", "latest")
    assert code == 0
    assert "nothing to resume" in err
    assert "train_accuracy" in out


def test_dry_run_writes_nothing(cvlab, tiny, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    code, out, _ = cvlab("train", tiny, "--dry-run", "--json")
    plan = json.loads(out)
    assert code == 0
    assert sorted(tmp_path.rglob("*")) == before
    assert plan["steps"] == 10
    assert plan["parameters"] == 4 * 27 + 4 + 8 + 8 * 36 + 8 + 16 + 512 * 10 + 10
    assert (plan["train_images"], plan["val_images"], plan["data"]) == (100, 250, "scenes10")


def test_a_budget_in_seconds_is_recorded_as_steps_that_reproduce_the_run(cvlab, tiny):
    code, out, err = cvlab("train", tiny, "duration.seconds=1", "--json")
    first = json.loads(out)
    steps = first["metrics"]["steps"]
    assert code == 0
    assert "the plan is updated during training" in err
    assert f"{steps} steps in " in err
    assert loading.load(first["run"]).config.duration.steps == steps
    second = json.loads(cvlab("run", first["run"], "--json", "-q")[1])
    digests = [read_json(run_dir.Path(r["run"]) / "summary.json")["weights_sha256"] for r in (first, second)]
    assert digests[0] == digests[1]
    code, _, err = cvlab("train", tiny, "duration.seconds=1e-5", "-q")
    assert code == 2
    assert "too short for a step" in err


def test_training_on_all_images_and_test_time_augmentation(cvlab, tiny):
    arguments = (
        "data={name: scenes10, num_train: 100, val_fraction: 0}",
        "evaluate_test=true",
        "tta=flip_shift",
        "expect=[]",
        "augment={flip: alternating, cutout_px: 4}",
    )
    code, out, err = cvlab("train", tiny, *arguments, "--json")
    metrics = json.loads(out)["metrics"]
    assert code == 0, err
    assert {"train_accuracy", "best_train_accuracy", "test_accuracy", "test_accuracy_tta"} <= metrics.keys()
    assert not any(key.startswith("val_") for key in metrics)
    code, out, err = cvlab("eval", "latest", "--json")
    assert code == 0, err
    names = ("loss", "accuracy", "accuracy_tta", "top5_accuracy", "macro_f1", "ece")
    assert {name for name in json.loads(out)["metrics"] if "/" not in name} == {f"test_{name}" for name in names}
    assert json.loads(out)["metrics"]["test_accuracy_tta"] == metrics["test_accuracy_tta"]
    assert cvlab("eval", "latest", "--split", "val")[0] == 2
    code, _, err = cvlab("train", tiny, *arguments, "expect=[val_accuracy > 0]")
    assert code == 2
    assert "no metric 'val_accuracy'" in err
    assert "the images have 32 px" in cvlab("train", tiny, "augment.cutout_px=32")[2]


def test_the_fallback_is_reported_everywhere(cvlab, tiny, tmp_path, monkeypatch):
    arguments = ("data={name: cifar10, fallback: scenes10, num_train: 100, val_fraction: 0.02}",)
    code, out, err = cvlab("train", tiny, *arguments, "expect_fallback=[train_accuracy <= 1]")
    assert code == 0
    assert err.splitlines()[0].startswith("warning: cifar10 is not on the disk (offline); falling back to scenes10")
    assert "`cvlab data fetch cifar10` gets it" in err
    assert "scenes10 (fallback for cifar10)" in out
    run = tmp_path / "runs" / "latest"
    for name in ("summary.json", "status.json"):
        assert read_json(run / name)["data"] == "scenes10 (fallback for cifar10)"
    assert read_json(run / "summary.json")["expect"][0]["rule"] == "train_accuracy <= 1"
    assert "fallback_for: cifar10" in (run / "config.yaml").read_text()
    assert read_json(run / "env.json")["provenance"]["data.name"] == "fallback"
    code, _, err = cvlab("train", tiny, *arguments, "--no-fallback")
    assert code == 4
    assert "`cvlab data fetch cifar10` gets it" in err
    assert cvlab("train", tiny, "data.name=cifar10", "-q")[0] == 4


def test_the_code_of_a_model_is_copied_into_the_run(cvlab, tiny, tmp_path):
    (tmp_path / "net.py").write_text(
        "from torch import nn\n\ndef make(width: int, num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(3072, width), nn.ReLU(), nn.Linear(width, num_classes))\n"
    )
    code, out, _ = cvlab("train", tiny, "model={name: './net.py:make', width: 6}", "--json", "-q")
    run = run_dir.Path(json.loads(out)["run"])
    assert code == 0
    assert (run / "net.py").is_file()
    (tmp_path / "net.py").unlink()
    assert cvlab("eval", run, "--json")[0] == 0
    assert cvlab("train", run / "config.yaml", "-q")[0] == 0


@pytest.mark.parametrize("model", ["timm:resnet10t", "torchvision:squeezenet1_1"])
def test_models_of_timm_and_torchvision_train(cvlab, tiny, model):
    code, out, err = cvlab("train", tiny, f"model={{name: '{model}'}}", "duration.steps=2", "expect=[]", "--json", "-q")
    assert code == 0, err
    assert cvlab("eval", json.loads(out)["run"], "--split", "val")[0] == 0


def test_data_of_the_user(cvlab, tiny, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom cvlab import ImageDataset\n\ndef load():\n"
        "    x = torch.randint(0, 256, (60, 16, 16, 1), dtype=torch.uint8)\n"
        "    y = (x.float().mean((1, 2, 3)) > 127).long()\n"
        "    return ImageDataset('mine', x, y, x[:10], y[:10], ('dark', 'bright'))\n"
    )
    code, out, _ = cvlab("train", tiny, "data={name: './mine.py:load'}", "--json", "-q")
    assert code == 0
    assert json.loads(out)["data"] == "./mine.py:load"
    assert cvlab("train", tiny, "data={name: './mine.py:load'}", "--dry-run")[0] == 0


def test_an_exception_in_user_code_shows_its_traceback(cvlab, tiny, tmp_path):
    (tmp_path / "net.py").write_text("def make():\n    return 1 / 0\n")
    code, out, err = cvlab("train", tiny, "model={name: './net.py:make'}", "--json", "-q")
    assert code == 1
    assert "ZeroDivisionError" in err
    assert "net.py" in err
    assert error_of(out)["code"] == 1
    assert not (tmp_path / "runs").exists(), "a model that cannot be built leaves no run directory"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("device=cuda:99", "device cuda:99 is not available"),
        ("batch_size=1000", "batch_size 1000 is larger"),
        ("optimizer={name: sgd, nesterov: true}", "optimizer sgd"),
        ("augment.translate_px=16", None),
        ("model={name: './net.py:pair'}", "returns tuple, expected logits (N, 10)"),
        ("model={name: './net.py:few'}", "returns (2, 3), expected logits (N, 10)"),
        ("model={name: './net.py:weightless'}", "has no trainable weights"),
    ],
)
def test_invalid_settings_are_rejected_before_the_run_directory_exists(cvlab, tiny, tmp_path, override, message):
    (tmp_path / "net.py").write_text(USER_CODE)
    code, _, err = cvlab("train", tiny, override, "duration.steps=1", "-q")
    assert (code == 0) if message is None else (code in (2, 8) and message in err and len(err.splitlines()) == 1)
    assert (tmp_path / "runs").exists() == (message is None)


USER_CODE = """import torch
from torch import nn

class pair(nn.Linear):
    def __init__(self):
        super().__init__(3072, 10)

    def forward(self, x):
        return super().forward(x.flatten(1)), 1

def few():
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 3))

class weightless(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :10]

def images(count=60, size=(32, 32), dtype=torch.int64):
    from cvlab import ImageDataset
    x, y = torch.zeros(count, *size, 3, dtype=torch.uint8), torch.arange(count).to(dtype) % 10
    return ImageDataset("custom", x, y, x, y, tuple("abcdefghij"))

def nothing():
    return None

def oblong():
    return images(size=(32, 48))

def narrow():
    return images(dtype=torch.int32)
"""


@pytest.mark.parametrize(
    ("name", "expected"),
    [("nothing", "got NoneType"), ("oblong", "must be square, are (32, 48)"), ("narrow", "labels must be int64")],
)
def test_data_of_the_user_is_checked(cvlab, tiny, tmp_path, name, expected):
    (tmp_path / "net.py").write_text(USER_CODE)
    code, _, err = cvlab("train", tiny, f"data={{name: './net.py:{name}'}}", "-q")
    assert code in (2, 4)
    assert expected in err
    assert len(err.splitlines()) == 1


def test_two_files_with_the_same_name_are_both_copied(cvlab, tiny, tmp_path):
    for folder, text in (("one", USER_CODE.replace("3072, 3)", "3072, 10)")), ("two", USER_CODE)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "net.py").write_text(text)
    overrides = ["model={name: './one/net.py:few'}", "data={name: './two/net.py:images'}", "batch_size=8"]
    code, _, err = cvlab("train", tiny, *overrides, "data.val_fraction=0.2", "expect=[]", "-q")
    assert code == 0, err
    run = tmp_path / "runs" / "latest"
    assert (run / "net.py").is_file()
    assert (run / "net_2.py").is_file()
    assert cvlab("eval", "latest")[0] == 0


def test_a_misspelled_metric_is_rejected_before_the_run(cvlab, tiny, tmp_path):
    code, _, err = cvlab("train", tiny, "expect=[tran_accuracy >= 0.1]")
    assert code == 2
    assert "did you mean 'train_accuracy'" in err
    assert not (tmp_path / "runs").exists()


def test_one_damaged_run_does_not_hide_the_others(cvlab, tiny, tmp_path):
    cvlab("train", tiny, "name=good", "-q")
    for name, text in (("bad1", '{"sta'), ("bad2", '{"metrics": null, "expect": 3}')):
        (tmp_path / "runs" / name).mkdir()
        (tmp_path / "runs" / name / "status.json").write_text('{"status": "done"}')
        (tmp_path / "runs" / name / "summary.json").write_text(text)
    code, out, _ = cvlab("runs", "--json")
    states = {row["run"].rpartition("-")[0] or row["run"]: row["status"] for row in json.loads(out)["runs"]}
    assert code == 0
    assert states["bad1"] == states["bad2"] == "damaged"
    assert "done" in states.values()
    assert cvlab("show", "bad2")[0] == cvlab("compare", "good", "bad2")[0] == 5


def test_invalid_names_of_runs_are_errors(cvlab, tiny, tmp_path):
    cvlab("train", tiny, "-q")
    (tmp_path / "runs" / "latest").unlink()
    assert cvlab("show", "latest")[0] == 0
    for name in ("", "  ", "x" * 5000):
        code, _, err = cvlab("show", name)
        assert code == 5
        assert len(err.splitlines()) == 1
    assert cvlab("train", "x" * 5000)[0] == 2
    (tmp_path / "file").write_text("")
    assert cvlab("runs", "--runs-dir", "file")[0] == 5


def test_a_metric_that_is_not_finite_is_a_divergence(cvlab, tiny, tmp_path):
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "class Nan(nn.Linear):\n"
        "    def __init__(self):\n        super().__init__(3072, 10)\n"
        "    def forward(self, x):\n"
        "        return super().forward(x.flatten(1)) * (1 if self.training else float('nan'))\n"
    )
    code, _, err = cvlab("train", tiny, "model={name: './net.py:Nan'}", "-q")
    assert code == 6
    assert "_loss is not finite at step 5" in err


@pytest.mark.parametrize("width", [30, 58, 72, 93, 137])
def test_tables_break_lines_between_words_only(cvlab, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    for command, kind in ((("models", "list"), "models"), (("data", "list"), "data"), (("config",), "configs")):
        expected = {
            word
            for row in json.loads(cvlab(*command, "--json")[1])[kind]
            for value in row.values()
            for word in str(value).split()
        }
        assert expected <= set(cvlab(*command)[1].split())


def test_a_closed_pipe_does_not_stop_a_command(tiny, tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}

    def run_shell(line):
        command = line.replace("cvlab", f"{sys.executable} -m cvlab")
        return subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, check=False)

    assert run_shell("cvlab runs | true; exit ${PIPESTATUS[0]}").returncode == 0
    assert run_shell("cvlab --help | true; exit ${PIPESTATUS[0]}").returncode == 0
    assert run_shell("cvlab config nosuch --json | true; exit ${PIPESTATUS[0]}").returncode == 2
    assert run_shell(f"cvlab train {tiny} log_every=1 2>&1 | true; exit ${{PIPESTATUS[0]}}").returncode == 0
    assert read_status(tmp_path / "runs" / "latest")["status"] == "done"
    if os.path.exists("/dev/full"):
        process = run_shell("cvlab runs > /dev/full")
        assert process.returncode == 5
        assert "No space left" in process.stderr
        assert "Traceback" not in process.stderr


def test_divergence(cvlab, tiny, tmp_path):
    code, out, _ = cvlab(
        "train", tiny, "optimizer={name: sgd, lr: 100}", "reg=1", "duration.steps=200", "eval_every=100", "--json", "-q"
    )
    error = error_of(out)
    assert code == 6
    assert "not finite at step" in error["message"]
    assert "lr 100" in error["message"]
    assert error["run"] == find_run("latest", runs_root()).name or "runs/" in error["run"]
    assert read_json(tmp_path / "runs" / "latest" / "status.json")["status"] == "failed"


def test_eval_prints_and_records_the_test_metrics(cvlab, tiny, tmp_path):
    trained = json.loads(cvlab("train", tiny, "--json", "-q")[1])
    code, out, _ = cvlab("eval", "latest", "--json")
    evaluation = json.loads(out)
    assert code == 0
    names = ("loss", "accuracy", "top5_accuracy", "macro_f1", "ece")
    assert {name for name in evaluation["metrics"] if "/" not in name} == {
        f"{split}_{name}" for split in ("val", "test") for name in names
    }
    assert evaluation["metrics"]["val_accuracy"] == trained["metrics"]["val_accuracy"]
    assert read_json(tmp_path / "runs" / "latest" / "eval.json")["metrics"] == evaluation["metrics"]
    best = json.loads(cvlab("eval", "latest", "--checkpoint", "best", "--split", "val", "--json")[1])
    assert best["metrics"]["val_accuracy"] == trained["metrics"]["best_val_accuracy"]
    assert cvlab("eval", "latest", "--split", "dev")[0] == 2
    assert cvlab("eval", "latest", "--checkpoint", "first")[0] == 2
    for path in (tmp_path / "runs" / "latest" / "checkpoints").iterdir():
        path.write_bytes(b"")
    assert cvlab("eval", "latest")[0] == 7
    assert cvlab("eval", "latest", "--checkpoint", "best")[0] == 7


def test_runs_show_and_compare(cvlab, tiny, tmp_path, monkeypatch):
    for lr in ("1e-2", "1e-3"):
        cvlab("train", tiny, f"optimizer.lr={lr}", "-q")
    code, out, _ = cvlab("runs", "--json")
    rows = json.loads(out)["runs"]
    assert code == 0
    assert [row["status"] for row in rows] == ["done", "done"]
    names = [row["run"] for row in rows]
    assert "done" in cvlab("runs")[1]
    code, out, _ = cvlab("show", names[0][-4:])
    assert code == 0
    assert "optimizer.lr" in out
    assert "train_accuracy" in out
    monkeypatch.setattr(plots, "to_png", TO_PNG)  # render the plot of the comparison
    code, out, _ = cvlab("compare", *names, "--json", "--out", tmp_path / "c")
    comparison = json.loads(out)
    differences = comparison["differences"]  # runs that started in the same second are in any order
    assert code == 0
    assert differences.keys() == {"optimizer.lr"}
    assert sorted(differences["optimizer.lr"]) == [0.001, 0.01]
    assert len(comparison["metrics"]["val_accuracy"]) == 2
    with Image.open(tmp_path / "c" / "compare.png") as picture:
        assert picture.width > 300
    written = (tmp_path / "c" / "compare.csv").read_text()
    assert written.splitlines()[0].startswith("kind,name,tiny-")
    assert "config,optimizer.lr,0.0" in written
    assert cvlab("compare", *names, "--csv")[1] == written
    assert "optimizer.lr" in cvlab("compare", *names)[1]
    assert cvlab("compare", "nothing")[0] == 5


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["train", "nothing"], 2, "unknown configuration 'nothing'"),
        (["train", "cifar_bm"], 2, "did you mean 'cifar_bn'"),
        (["train", "quickstart", "optimizer.rl=3"], 2, "did you mean 'lr'"),
        (["train", "quickstart", "batch_size=20000", "-q"], 2, "larger than the training set of 10000"),
        (["train", "quickstart", "data.num_train=20000", "-q"], 2, "at most num_train=10000"),
        (["train", "quickstart", "--device", "cuda:7"], 8, "device cuda:7 is not available"),
        (["train", "quickstart", "--device", "tpu"], 2, "device"),
        (["train", "quickstart", "--offline", "--download"], 2, "exclude each other"),
        (["train"], 2, "missing argument"),
        (["train", "quickstart", "--nothing"], 2, "no such option: --nothing; see `cvlab train --help`"),
        (["tarin"], 2, "unknown command 'tarin'; did you mean 'train'? `cvlab --help` lists all"),
        (["resume", "nothing"], 5, "no run 'nothing'"),
        (["eval", "nothing"], 5, "no run 'nothing'"),
        (["show", "nothing"], 5, "no run 'nothing'"),
        (["data", "fetch", "cifar"], 2, "did you mean 'cifar10'"),
        (["data", "fetch", "cifar10"], 4, "CVLAB_OFFLINE"),
        (["data", "fetch", "cifar10", "--from", "nowhere"], 4, "nowhere"),
        (["data", "check", "cifar10"], 4, "data_batch_1"),
        (["config", "cifar_bn", "seed=x"], 2, "whole number"),
    ],
)
def test_errors_are_one_line_with_their_exit_code(cvlab, arguments, code, text):
    if code == 8:
        torch = pytest.importorskip("torch")
        if torch.cuda.device_count() > 7:
            pytest.skip("there are that many GPUs")
    exit_code, out, err = cvlab(*arguments)
    assert exit_code == code
    assert text in err
    assert out == ""
    assert len([line for line in err.splitlines() if line.startswith("error:")]) == 1, err
    assert "Traceback" not in err
    exit_code, out, _ = cvlab(*arguments, "--json")
    error = error_of(out)
    assert exit_code == code == error["code"]
    assert text in f"{error['message']}; {error['hint']}"


def test_a_runs_dir_that_cannot_be_written_is_an_error(cvlab, tiny, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    assert cvlab("train", tiny, "--runs-dir", tmp_path / "file")[0] == 5
    monkeypatch.setenv("CVLAB_RUNS", "/proc/nothing")
    code, _, err = cvlab("train", tiny)
    assert code == 5
    assert "/proc/nothing" in err
    assert "--runs-dir" in err


def test_a_locked_run_is_not_resumed(cvlab, tiny, tmp_path):
    import multiprocessing

    cvlab("train", tiny, "-q")
    path = find_run("latest", runs_root())

    def hold(ready, leave):
        with run_dir.RunDir(path).locked():
            ready.set()
            leave.wait(60)

    context = multiprocessing.get_context("fork")
    ready, leave = context.Event(), context.Event()
    holder = context.Process(target=hold, args=(ready, leave))
    holder.start()
    assert ready.wait(60)
    code, _, err = cvlab("resume", "latest")
    leave.set()
    holder.join()
    assert code == 5
    assert f"already running (pid {holder.pid}" in err


def test_commands_that_list(cvlab):
    code, out, _ = cvlab("config", "cifar_bn")
    assert code == 0
    assert "train_accuracy >= 0.85" in out
    assert "betas: [0.9, 0.999]" in out
    assert "cifar_bn" in cvlab("config")[1]
    assert "classify" in cvlab("experiments")[1]
    assert {row["name"] for row in json.loads(cvlab("models", "list", "--json")[1])["models"]} >= {
        "deep_convnet",
        "timm:NAME",
    }
    assert "deep_convnet" in cvlab("models", "list")[1]
    states = {row["name"]: row["state"] for row in json.loads(cvlab("data", "list", "--json")[1])["data"]}
    assert states["cifar10"] == "not on the disk"
    assert states["scenes10"] in ("ready", "built in")
    assert cvlab("data", "list")[0] == 0
    assert cvlab("data", "fetch", "scenes10")[0] == 0
    assert "equal to their checksums" in cvlab("data", "check")[1]
    assert cvlab("runs")[0] == 0
    assert cvlab("--version")[1] == f"cvlab {__version__}\n"


def test_doctor(cvlab):
    code, out, _ = cvlab("doctor", "--json")
    report = json.loads(out)
    assert code == 0, report
    assert report["ok"], report
    assert {check["name"] for check in report["checks"]} >= {
        "torch",
        "torchvision",
        "devices",
        "data",
        "configurations",
    }


def test_the_schema_has_every_key(cvlab):
    schema = json.loads(cvlab("config", "--schema")[1])
    *experiment_schemas, inheriting = schema["anyOf"]
    branches = {branch["properties"]["experiment"]["const"]: branch for branch in experiment_schemas}
    assert inheriting["required"] == ["base"]
    branch = branches["classify"]
    assert "eps" in branches["attack"]["properties"]
    assert "grid" in branches["sweep"]["properties"]
    models = {block["properties"]["name"]["const"] for block in branch["properties"]["model"]["anyOf"][:-1]}
    assert {"deep_convnet", "three_layer_convnet", "fc_net"} <= models
    assert "filters" in branch["properties"]["model"]["anyOf"][0]["properties"]


def test_help_imports_no_slow_package():
    code = (
        "import sys\nfrom cvlab.cli import main\n"
        "try:\n    main.main(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'torchvision', 'timm', 'matplotlib', 'numpy', 'pydantic', 'yaml'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert "compare" in process.stdout


def test_debug_prints_the_traceback(cvlab):
    _, _, err = cvlab("train", "nothing", "--debug")
    assert "Traceback" in err


def test_all_commands_have_help(cvlab):
    for command in (
        "train",
        "run",
        "eval",
        "lr",
        "resume",
        "runs",
        ("runs", "list"),
        ("runs", "rm"),
        "show",
        "compare",
        "config",
        "summary",
        "experiments",
        ("models", "list"),
    ):
        code, out, _ = cvlab(*([command] if isinstance(command, str) else command), "--help")
        assert code == 0, command
        assert "--json" in out, command
    assert main.app.info.name == "cvlab"


def test_limit_shows_the_newest_runs_and_the_total(cvlab, tmp_path):
    for k in range(5):
        folder = tmp_path / f"2026112{k}-120000-x-000{k}"
        folder.mkdir()
        (folder / "config.yaml").write_text("experiment: classify\n")
    code, out, _ = cvlab("runs", "--limit", 2, "--runs-dir", tmp_path)
    assert code == 0
    assert "x-0004" in out
    assert "x-0003" in out
    assert "x-0002" not in out
    assert "2 of 5 runs" in out
    listed = json.loads(cvlab("runs", "--json", "--runs-dir", tmp_path)[1])
    assert listed["count"] == len(listed["runs"]) == 5
    assert len(json.loads(cvlab("runs", "--json", "--limit", 2, "--runs-dir", tmp_path)[1])["runs"]) == 2


def test_runs_are_filtered_tagged_and_removed(cvlab, tmp_path):
    for k in range(3):
        folder = tmp_path / f"2026112{k}-120000-x-000{k}"
        folder.mkdir()
        (folder / "config.yaml").write_text(f"experiment: classify\nseed: {k}\n")
        (folder / "summary.json").write_text(json.dumps({"metrics": {"val_accuracy": k / 10}}))
        (folder / "status.json").write_text('{"status": "done"}')
    runs_dir = ("--runs-dir", tmp_path)
    code, out, _ = cvlab(
        "runs", "val_accuracy>0", "--sort", "seed", "--columns", "seed", "--reverse", "--json", *runs_dir
    )
    assert code == 0
    assert [row["values"]["seed"] for row in json.loads(out)["runs"]] == [2, 1]
    assert (
        "starred, good"
        in cvlab("runs", "star", "seed=1", *runs_dir)[1] + cvlab("runs", "tag", "seed=1", "--add", "good", *runs_dir)[1]
    )
    assert "a note" in cvlab("runs", "note", "x-0001", "a note", *runs_dir)[1]
    assert "x-0001" in cvlab("runs", "tags=good starred=true", *runs_dir)[1]
    assert "would be removed" in cvlab("runs", "rm", "tags!=good", "--dry-run", *runs_dir)[1]
    assert len(list(tmp_path.glob("2*"))) == 3
    code, out, _ = cvlab("runs", "rm", "tags!=good", "--json", *runs_dir)
    assert (code, len(json.loads(out)["runs"]), json.loads(out)["bytes"] > 0) == (0, 2, True)
    assert [path.name[-1] for path in tmp_path.glob("2*")] == ["1"]
    assert "0 B freed" in cvlab("runs", "prune", *runs_dir)[1]
    for command in (("compare", "seed=1"), ("report", "seed=1", "--out", tmp_path / "page.html")):
        assert cvlab(*command, *runs_dir)[0] == 0, command
    for query in ("seed=7 sed=1", "status"):
        code, _, err = cvlab("runs", query, *runs_dir) if "=" in query else cvlab("runs", "list", query, *runs_dir)
        assert code == 2
        assert "column" in err
    assert cvlab("runs", "rm", "seed=7", *runs_dir)[0] == 5
    assert "did you mean 'prune'" in cvlab("runs", "prun", *runs_dir)[2]


LONG_NAME = "x" * 300
LONG_NAME_COMMANDS = (  # command lines with a name longer than a file name can be
    *(f"{verb} {{0}}" for verb in ("classify", "saliency", "caption", "detect", "train", "resume", "show", "report")),
    *("style {0} sample", "style sample {0}", "attack --target ostrich {0}", "compare {0} {0}", "export {0} --to onnx"),
    *(f"{verb} sample --weights {{0}}" for verb in ("classify", "detect", "caption")),
    *(
        "detect sample --model yolov3_tiny --weights {0}",
        "data fetch cifar10 --from {0}",
        "data fetch voc07 --from {0}",
    ),
    *("data fetch flickr8k --from {0}", "models fetch yolov3_tiny --from {0}", "runs --runs-dir {0}", "sweep {0}"),
    *("train quickstart --runs-dir {0}", "train quickstart model.name=./{0}.py:Net", "gradcheck ./{0}.py:Net"),
    *("train yolo_scenes data.name=boxes data.path={0}", "train caption_scenes data.name=captions data.path={0}"),
    *(
        "track {0} --to mlflow",
        "eval {0}",
        "verify {0}",
        "config {0}",
        "summary {0}",
        "style sample whirls content_mask={0}",
    ),
)


@pytest.mark.parametrize("line", LONG_NAME_COMMANDS)
def test_a_name_longer_than_the_disk_allows_is_a_one_line_error(cvlab, tmp_path, line):
    root = () if "--runs-dir" in line else ("--runs-dir", tmp_path)
    takes_root = line.split()[0] not in ("data", "models", "gradcheck", "config")
    code, _, err = cvlab(*line.format(LONG_NAME).split(), *(root if takes_root else ()))
    errors = [text for text in err.splitlines() if text.startswith("error: ")]
    assert code in (2, 4, 5), err
    assert errors, err
    assert "Traceback" not in err, err


@pytest.mark.parametrize("group", [[], ["data"], ["models"], ["queue"]])
def test_without_a_command_the_help_is_printed(cvlab, group):
    code, out, err = cvlab(*group)
    assert code == 0
    assert out == cvlab(*group, "--help")[1]
    assert err == ""
    assert out.startswith(" ".join(["Usage: cvlab", *group]))


def test_the_help_lists_every_command_in_one_group(cvlab):
    from cvlab.cli import groups

    _, out, _ = cvlab("--help")
    sections = out.split("\n\n")[3:]
    assert [section.partition(":")[0] for section in sections] == list(groups.GROUPS)
    lines = [line.split(maxsplit=1) for section in sections for line in section.splitlines()[1:]]
    commands, texts = zip(*lines, strict=True)
    assert len(set(commands)) == len(commands) == 33
    assert len(set(texts)) == len(texts)
    assert not any(text.endswith("...") for text in texts)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["foo"], "unknown command 'foo'; similar: look, doctor; `cvlab --help` lists all 33"),
        (["data", "fech"], "unknown command 'fech'; did you mean 'fetch'? known: check, fetch, list"),
        (["train", "quickstart", "--sede", "3"], "similar: --debug, --seed, --set; see `cvlab train --help`"),
        (["train", "yolo_scene"], "did you mean 'yolo_scenes'? `cvlab config` lists all 75"),
        (["train", "scenes_yolo"], "unknown configuration 'scenes_yolo'; similar: "),
        (["config", "quickstart", "model=resnet18"], "did you mean timm:resnet18 or torchvision:resnet18?"),
        (["train", "quickstart", "model=timm:resnet18", "model.foo=3"], "it has no parameter 'foo'"),
        (["attack", "--target", "ostrch", "sample"], "no class 'ostrch'; did you mean 'ostrich'?"),
        (["saliency", "--class", "ostrch", "sample"], "did you mean 'ostrich'?"),
        (["classvis", "--target", "gorilla,ostrch"], "did you mean 'ostrich'?"),
        (["resume"], "no interrupted run in runs; name the run to resume"),
    ],
)
def test_an_error_suggests_similar_names(cvlab, arguments, expected):
    code, out, err = cvlab(*arguments)
    assert code in (2, 5)
    assert out == ""
    assert expected in err
    assert len(err.splitlines()) == 1
    assert len(err) < 250


def test_classes_are_checked_before_a_model_is_loaded(cvlab, monkeypatch):
    from cvlab.models import pretrained

    monkeypatch.setattr(pretrained, "build", lambda *_: pytest.fail("the model was built"))
    assert cvlab("attack", "--target", "ostrch", "sample")[0] == 2


def test_a_block_can_be_abbreviated_to_its_name(cvlab, tiny, tmp_path):
    (tmp_path / "short.yaml").write_text(TINY.replace("{name: adam, lr: 1e-2}", "adam") + "schedule: cosine\n")
    config = json.loads(cvlab("config", "short.yaml", "--json")[1])["config"]
    assert config["optimizer"]["lr"] == 1e-3
    assert config["schedule"] == {"name": "cosine", "final": 0.0}
    overrides = ("optimizer=sgd", "optimizer.lr=0.5", "schedule=linear", "data=scenes10", "data.num_train=50")
    config = json.loads(cvlab("config", tiny, *overrides, "--json")[1])["config"]
    assert (config["optimizer"]["name"], config["optimizer"]["lr"]) == ("sgd", 0.5)
    assert config["schedule"]["name"] == "linear"
    assert config["data"]["num_train"] == 50
    code, _, err = cvlab("config", tiny, "schedule=cosin")
    assert code == 2
    assert "did you mean 'cosine'" in err


def test_show_prints_the_reason_of_a_failure_and_what_to_do(cvlab, tiny, tmp_path):
    code, _, err = cvlab("train", tiny, "optimizer.lr=100", "optimizer.name=sgd", "duration={steps: 40}", "-q")
    assert code == 6
    code, out, _ = cvlab("show", "latest")
    assert code == 0
    assert "classify on scenes10: failed" in out
    assert "None" not in out
    reason = next(line for line in out.splitlines() if line.startswith("reason: "))
    assert reason.removeprefix("reason: ").partition(" (at step")[0] in err
    assert f"cvlab resume {find_run('latest', runs_root()).name}" in out
    assert "log.txt" in out
    document = json.loads(cvlab("show", "latest", "--json")[1])
    assert document["status"] == "failed"
    assert document["reason"]


def test_resume_without_a_name_resumes_the_newest_interrupted_run(cvlab, tiny, tmp_path):
    cvlab("train", tiny, "-q")
    interrupted = find_run("latest", runs_root())
    cvlab("train", tiny, "-q")
    (interrupted / "summary.json").unlink()
    status = read_json(interrupted / "status.json") | {"status": "interrupted", "error": "interrupted at step 10"}
    (interrupted / "status.json").write_text(json.dumps(status))
    code, out, _ = cvlab("show", interrupted.name)
    assert f"continue with `cvlab resume {interrupted.name}`" in out
    code, out, _ = cvlab("resume")
    assert code == 0
    assert out.splitlines()[-1] == f"run directory runs/{interrupted.name}"


def test_tables_align_numbers_right_and_text_left(capsys, monkeypatch):
    from cvlab.reports import tables

    monkeypatch.setenv("COLUMNS", "80")
    text = "a long description that has to be wrapped since it does not fit into a line of eighty characters"
    tables.table("", ("name", "accuracy", "size", "description"), [("a", 0.5, "12.5 MB", text), ("bcd", 12, "-", "b")])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["name", "accuracy", "size", "description"]
    column = lines[0].index("description")
    assert lines[2][:column].rstrip().endswith("12.5 MB")
    assert lines[0].index("accuracy") + len("accuracy") == lines[2].index("0.5") + len("0.5")
    assert [line[column] != " " for line in lines[2:5]] == [True, True, True]
    monkeypatch.delenv("COLUMNS")
    tables.table("", ("name", "description"), [("a", text)])
    assert text in capsys.readouterr().out  # lines in a pipe are not wrapped


def test_photo_commands_have_no_default_expectations(cvlab, monkeypatch):
    code, out, _ = cvlab("classify", "sample")
    assert code == 0
    assert "expected" not in out
    assert "met" not in out.split()
    code, out, _ = cvlab("classify", "sample", "expect=[mean_probability > 1]")
    assert code == 3
    assert "NOT MET" in out


def test_an_attack_without_success_exits_with_3(cvlab):
    arguments = ("attack", "--target", "ostrich", "sample", "steps=1", "lr=0.001", "extra_steps=0")
    code, out, err = cvlab(*arguments)
    assert code == 3
    assert "prediction not changed" in out
    assert "the attack did not change the prediction for the photo to 'ostrich'" in err.splitlines()[-1]
    document = json.loads(cvlab(*arguments, "--json")[1])
    assert document["ok"] is False
    assert document["error"]["code"] == 3
    assert document["expect"] == []
