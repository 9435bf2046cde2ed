"""Sweeps: trials, their order and names, processes, interruption, expectations over trials; and `cvlab verify`."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from cvlab.config import loading, overrides
from cvlab.errors import ConfigError
from cvlab.runs import run_dir
from cvlab.runs.find import list_runs
from cvlab.runs.records import read_json, read_status, read_summary
from cvlab.sweeps import grid, results

BASE = """  experiment: classify
  data: {name: scenes10, num_train: 100, val_fraction: 0.02}
  model: {name: deep_convnet, filters: [4], pools: [0]}
  optimizer: {name: sgd, lr: 1e-2}
  batch_size: 20
  duration: {steps: 4}
  precision: float32
"""
SWEEP = f"""experiment: sweep
base:
{BASE}grid:
  optimizer.lr: [1e-3, 1e-2]
seeds: [0, 1]
"""


def write(tmp_path, text, name="s.yaml"):
    (tmp_path / name).write_text(text)
    return name


def load_errors(tmp_path, text, *overrides):
    with pytest.raises(ConfigError) as caught:
        loading.load(write(tmp_path, text), overrides)
    return [str(error) for error in (caught.value, *caught.value.further_errors)]


def test_combinations():
    combinations = grid.combinations({"a": (1, 2), "b.c": (True,)}, {"x": (5, 6), "y": (7, 8)}, (0, 1))
    assert len(combinations) == 8
    assert combinations[0] == {"a": 1, "b.c": True, "x": 5, "y": 7, "seed": 0}
    assert [trial["x"] + trial["y"] for trial in combinations[:4]] == [12, 12, 14, 14]
    assert grid.combinations({}, {}, ()) == [{}]


def test_trials_apply_changes_to_a_copy_of_the_base():
    base = {"optimizer": {"name": "sgd", "lr": 1.0}, "duration": {"epochs": 3}}
    changes = [{"optimizer.lr": 0.5, "duration.steps": 7}, {"optimizer": {"name": "adam"}, "model.filters": (8, 8)}]
    conditions = [({"optimizer.name": "adam"}, {"batch_size": 9})]
    first, second = grid.expand(base, changes, conditions)
    assert first.raw["optimizer"] == {"name": "sgd", "lr": 0.5}
    assert first.raw["duration"] == {"steps": 7}
    assert second.raw["optimizer"] == {"name": "adam"}
    assert second.raw["batch_size"] == 9
    assert "batch_size" not in first.raw
    assert (first.name, second.name) == ("000-lr-0.5-steps-7", "001-optimizer-adam-filters-8-8")
    assert base == {"optimizer": {"name": "sgd", "lr": 1.0}, "duration": {"epochs": 3}}


def test_a_base_may_inherit_from_another_configuration(tmp_path):
    text = "experiment: sweep\nbase:\n  from: cifar_bn\n  duration: {steps: 3}\n  optimizer: {lr: 5e-3}\n"
    loaded = loading.load(write(tmp_path, text + "grid: {model.batchnorm: [true, false]}\n"), ["base.batch_size=50"])
    base = loaded.config.base
    assert base["duration"] == {"steps": 3}
    assert base["optimizer"] == {"name": "adam", "lr": 5e-3}
    assert base["batch_size"] == 50
    assert base["model"]["filters"] == (16, 32, 32, 64, 64)
    assert "expect" not in base
    reloaded = loading.load(write(tmp_path, loaded.config.to_yaml(), "again.yaml")).config
    assert reloaded.to_yaml() == loaded.config.to_yaml()
    replaced = overrides.merge({"optimizer": {"name": "adam", "betas": 1}}, {"optimizer": {"name": "sgd"}})
    assert replaced == {"optimizer": {"name": "sgd"}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("lr: [1e-3, 1e-2]", "lr: [1e-3, -1]"), r"s.yaml:11:3: optimizer.lr: expected a number > 0"),
        (("optimizer.lr:", "optimizer.lrr:"), r"s.yaml:11:3: unknown key 'optimizer.lrr'; did you mean 'lr'"),
        (("pools: [0]", "pols: [0]"), r"s.yaml:5:\d+: unknown key 'model.pols'; did you mean 'pools'"),
        (("[1e-3, 1e-2]", "[]"), r"optimizer.lr: the list of values is empty"),
        (("[1e-3, 1e-2]", "1e-3"), r"s.yaml:11:3: grid.optimizer.lr: expected a list, got"),
        (("seeds: [0, 1]", "seeds: [-1]"), r"s.yaml:12:\d+: seeds.0: expected"),
        (("seeds", "zip: {batch_size: [1, 2], seed: [1]}\nseeds"), "batch_size has 2, seed has 1"),
        (("seeds", "zip: {optimizer.lr: [1, 2]}\nseeds"), "optimizer.lr is in grid and in zip"),
        (("[0, 1]", f"[{','.join(map(str, range(501)))}]"), "1002 trials; at most 1000"),
        (("experiment: classify", "experiment: sweep"), "sweeps cannot be nested"),
        (("seeds: [0, 1]", "seeds: [0, 0]"), "seeds: a value is listed twice"),
        (("[1e-3, 1e-2]", "[1e-3, 1e-3]"), "optimizer.lr: a value is listed twice"),
        (("seeds", "  seed: [5, 6]\nseeds"), "seed is varied twice"),
        (("seeds", "  optimizer: [{name: adam}]\nseeds"), "optimizer.lr is varied twice, also by optimizer"),
        (("  batch_size", "  expect: [val_loss < 9]\n  batch_size"), r"s.yaml:7:3: base.expect: a trial has none"),
        (("seeds", "diverged_values: {val_acuracy: 0.1}\nseeds"), "did you mean 'val_accuracy'"),
        (("seeds", "conditions: [{when: {optimizer.momentum: 0.0}, set: {reg: 0.1}}]\nseeds"), "write it into base"),
        (("seeds", "expect: [mean(val_acuracy) > 0]\nseeds"), "no metric 'val_acuracy'; did you mean 'val_accuracy'"),
        (("seeds", "expect: [val_accuracy > 0]\nseeds"), r"for a sweep write a function, for example `mean\(METRIC\)`"),
        (("seeds", "expect: ['mean(val_loss, optimizer.lr=7) > 0']\nseeds"), "no trial has optimizer.lr=7"),
        (("seeds", "expect: ['increasing(val_loss, optimizr.lr)']\nseeds"), "no trial has the key optimizr.lr"),
        (("seeds", "expect: ['mean(val_loss, seed=0) > 0']\nseeds"), "settings are means over seeds"),
        (("seeds", "conditions: [{when: {seed: 0}, set: {batch_size: 0}}]\nseeds"), r"s.yaml:12:\d+: batch_size"),
    ],
)
def test_errors_have_their_position(tmp_path, change, message):
    errors = load_errors(tmp_path, SWEEP.replace(*change))
    assert any(re.search(message, text) for text in errors), errors


def test_overrides_of_axes(tmp_path):
    loaded = loading.load(write(tmp_path, SWEEP), ["grid.optimizer.lr=[0.5]", "zip.batch_size=[5,10]", "seeds=[3]"])
    assert [trial.name for trial in loaded.config.trials()] == [
        "000-lr-0.5-batch_size-5-seed-3",
        "001-lr-0.5-batch_size-10-seed-3",
    ]
    assert loading.load("s.yaml", ["base.duration.epochs=2"]).config.base["duration"] == {"epochs": 2}
    errors = load_errors(tmp_path, SWEEP, "grid.optimizer.lr=[-1]")
    assert errors == ["override grid.optimizer.lr=[-1]: optimizer.lr: expected a number > 0 and <= 100, got -1"]


def test_functions_over_trials_are_rejected_in_a_single_run(tmp_path):
    errors = load_errors(tmp_path, BASE.replace("\n  ", "\n").strip() + "\nexpect: [mean(val_loss) < 9]\n")
    assert "is a function over a sweep" in errors[0]


def test_a_complete_sweep(cvlab, tmp_path):
    write(tmp_path, SWEEP + "workers: 2\nexpect: ['spread(val_accuracy) < 1', mean(steps) == 4]\n")
    code, out, err = cvlab("sweep", "s.yaml", "--json")
    result = json.loads(out)
    assert code == 0, err
    assert result["experiment"] == "sweep"
    assert result["metrics"] == {"trials": 4, "diverged": 0}
    assert [row["keys"] for row in result["settings"]] == [{"optimizer.lr": 1e-3}, {"optimizer.lr": 1e-2}]
    run = (tmp_path / "runs" / "latest").resolve()
    trials = sorted((run / "trials").iterdir())
    assert [trial.name for trial in trials][:2] == ["000-lr-0.001-seed-0", "001-lr-0.001-seed-1"]
    accuracies = [read_summary(trial)["metrics"]["val_accuracy"] for trial in trials]
    mean = result["settings"][0]["metrics"]["val_accuracy"]
    assert mean["n"] == 2
    assert mean["mean"] == pytest.approx(sum(accuracies[:2]) / 2)
    lines = (run / "table.csv").read_text().splitlines()
    assert len(lines) == 5
    assert lines[0].startswith("trial,status,optimizer.lr,seed,")
    assert {path.name for path in (run / "plots").iterdir()} == {
        f"{name}.png" for name in ("train_loss", "train_accuracy", "val_loss", "val_accuracy")
    }
    # a trial is an ordinary run, identical to the same configuration run alone
    assert cvlab("show", trials[0])[0] == cvlab("eval", trials[0])[0] == cvlab("resume", trials[0])[0] == 0
    standalone = json.loads(cvlab("run", trials[2], "--json", "-q")[1])
    summaries = [read_summary(run_dir.Path(path)) for path in (standalone["run"], trials[2])]
    assert summaries[0]["weights_sha256"] == summaries[1]["weights_sha256"]
    code, out, _ = cvlab("show", run)
    assert code == 0
    assert "val_accuracy" in out
    assert "spread(val_accuracy) < 1" in out
    repeated = loading.load(str(run)).config
    assert repeated.to_yaml() == loading.load("s.yaml").config.to_yaml()


def setting(**keys):
    return {"keys": keys, "metrics": {"val_accuracy": {"mean": 0.5, "sd": 0.1, "n": 3}}}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ([setting(lr=x, bn=bn) for x in (0.1, 0.2) for bn in (True, False)], "lr"),
        ([setting(lr=x, width=w) for x in (0.1, 0.2) for w in (1, 2, 3)], "width"),
        ([setting(name=n, lr=x) for n, x in (("sgd", 0.1), ("adam", 0.2))], None),  # no key is held fixed
        ([setting(name=n) for n in ("sgd", "adam")], None),
        ([setting(scale=s) for s in ("kaiming", 0.1)], None),
        ([setting(lr=x) for x in (1e-3, 1e-2)], "lr"),
    ],
)
@pytest.mark.usefixtures("drawn_plots")
def test_the_x_axis_of_a_plot_over_settings(settings, expected):
    assert results._x_key(settings) == expected
    assert results.draw(settings, "val_accuracy", "title")[:4] == b"\x89PNG"


def test_completed_trials_do_not_run_again_after_an_interruption(cvlab, tmp_path):
    name = write(tmp_path, SWEEP.replace("steps: 4}", "steps: 60}\n  eval_every: 1000"))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "cvlab", "sweep", name, "--workers", "1"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not any(map(_ended, tmp_path.glob("runs/2*/trials/000*"))):
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        stderr = process.stderr.read().decode()
    assert process.returncode == 143, stderr
    assert "cvlab resume" in stderr, stderr
    run = (tmp_path / "runs" / "latest").resolve()
    ended = {trial: (trial / "summary.json").stat().st_mtime_ns for trial in run.glob("trials/*") if _ended(trial)}
    assert 1 <= len(ended) < 4
    code, _, err = cvlab("sweep", name, "--workers", 2)
    assert code == 0
    assert f"resuming the interrupted sweep runs/{run.name}" in err
    assert len([path for path in run.glob("trials/*") if _ended(path)]) == 4
    assert all((trial / "summary.json").stat().st_mtime_ns == before for trial, before in ended.items())
    assert cvlab("sweep", name, "--dry-run")[0] == 0
    assert len(list_runs(tmp_path / "runs")) == 1


def _ended(trial):
    return read_status(trial).get("status") == "done"


def test_trials_end_when_the_sweep_is_killed(tmp_path):
    name = write(tmp_path, SWEEP.replace("steps: 4", "steps: 100000"))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "cvlab", "sweep", name, "--workers", "1"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not list(tmp_path.glob("runs/2*/trials/000*/metrics.jsonl")):
            time.sleep(0.05)
        process.kill()
    trial = next(tmp_path.glob("runs/2*/trials/000*"))
    while time.monotonic() < deadline and read_json(trial / "status.json")["status"] == "running":
        time.sleep(0.05)
    assert read_status(trial)["status"] == "interrupted"
    assert list((trial / "checkpoints").glob("*.pt"))
    assert read_status(trial.parent.parent)["status"] == "interrupted"


def test_a_trial_that_diverges_is_a_result(cvlab, tmp_path):
    text = SWEEP.replace("[1e-3, 1e-2]", "[1e-2, 100]").replace("seeds: [0, 1]", "seeds: [0]")
    text = (
        text.replace("steps: 4}", "steps: 60}\n  reg: 1.0\n  eval_every: 30")
        + "expect: [diverged(optimizer.lr=100) == 1, diverged() == 0.5]\n"
    )
    code, out, err = cvlab("sweep", write(tmp_path, text), "--json")
    result = json.loads(out)
    assert code == 0, err
    assert result["metrics"] == {"trials": 2, "diverged": 1}
    assert result["settings"][1]["status"] == ["diverged"]
    options = ["diverged_values={val_accuracy: 0.1}", "expect=['mean(val_accuracy, optimizer.lr=100) == 0.1']"]
    assert cvlab("sweep", "s.yaml", *options, "--fresh", "-q")[0] == 0
    assert cvlab("sweep", "s.yaml", "expect=[mean(val_accuracy) > 0]", "-q")[0] == 3


def test_a_trial_that_fails_does_not_stop_the_others(cvlab, tmp_path):
    write(tmp_path, "from torch import nn\ndef net(width=3, num_classes=10):\n    return Net(width)\n", "net.py")
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Sequential):\n"
        "    def __init__(self, width=3):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(3072, width), nn.Linear(width, 10))\n"
        "        assert width != 5, 'not five'\n"
    )
    text = SWEEP.replace("deep_convnet, filters: [4], pools: [0]", "'./net.py:Net'").replace("[0, 1]", "[0]")
    text = text.replace("optimizer.lr: [1e-3, 1e-2]", "model.width: [5, 6]")
    code, _, err = cvlab("sweep", write(tmp_path, text))
    assert code == 1, err
    assert "1 trials failed" in err, err
    assert "AssertionError: not five" in err, err
    run = (tmp_path / "runs" / "latest").resolve()
    assert [results.read_trial(trial)["status"] for trial in sorted((run / "trials").iterdir())] == ["failed", "done"]
    for copied in (run / "net.py", *run.glob("trials/*/net.py")):
        copied.write_text(copied.read_text().replace("width != 5", "True"))
    code, _, err = cvlab("resume", run)
    assert code == 5, err
    assert "was changed since" in err
    assert cvlab("resume", run, "--trust")[0] == 0


def test_two_models_with_the_same_file_name_are_two_settings(cvlab, tmp_path):
    for folder, width in (("a", 4), ("b", 8)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "net.py").write_text(
            "from torch import nn\ndef net():\n"
            f"    return nn.Sequential(nn.Flatten(), nn.Linear(3072, {width}), nn.Linear({width}, 10))\n"
        )
    text = SWEEP.replace("[0, 1]", "[0]").replace(
        "optimizer.lr: [1e-3, 1e-2]", "model: [{name: './a/net.py:net'}, {name: './b/net.py:net'}]"
    )
    name = write(tmp_path, text + "expect: ['mean(parameters, model.name=./a/net.py:net) < 20000']\n")
    code, out, err = cvlab("sweep", name, "--json")
    result = json.loads(out)
    assert code == 0, err
    assert [row["keys"]["model.name"] for row in result["settings"]] == ["./a/net.py:net", "./b/net.py:net"]
    run = (tmp_path / "runs" / "latest").resolve()
    status = json.loads((run / "status.json").read_text()) | {"status": "interrupted"}
    (run / "status.json").write_text(json.dumps(status))
    code, _, err = cvlab("sweep", name)
    assert code == 0
    assert "resuming" in err
    assert "2 already done" in err
    (run / "status.json").write_text(json.dumps(status))
    (tmp_path / "a" / "net.py").write_text((tmp_path / "a" / "net.py").read_text() + "# repaired\n")
    code, _, err = cvlab("sweep", name)
    assert code == 0
    assert "resuming" not in err


def test_code_outside_the_folder_is_copied_into_the_run(cvlab, tmp_path, monkeypatch):
    code = "from torch import nn\ndef net():\n    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))\n"
    (tmp_path / "net.py").write_text(code)
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    text = SWEEP.replace("deep_convnet, filters: [4], pools: [0]", "'../net.py:net'").replace("[1e-3, 1e-2]", "[1e-3]")
    rule = "expect: ['mean(parameters, model.name=../net.py:net) == 30730']\n"
    write(tmp_path / "below", text.replace("[0, 1]", "[0]") + rule)
    assert cvlab("sweep", "s.yaml")[0] == 0
    run = (tmp_path / "below" / "runs" / "latest").resolve()
    (tmp_path / "net.py").unlink()
    assert loading.load(str(run)).config.base["model"]["name"] == "./_up/net.py:net"
    assert (run / "_up" / "net.py").read_text() == code
    assert cvlab("run", run)[0] == 0, "repeated from its own directory"


def test_data_sets_on_an_axis_have_no_fallback(cvlab, tmp_path):
    name = write(tmp_path, SWEEP.replace("optimizer.lr: [1e-3, 1e-2]", "data.name: [scenes10, cifar10]"))
    code, _, err = cvlab("sweep", name)
    assert code == 4
    assert "`cvlab data fetch cifar10` gets it" in err
    assert not (tmp_path / "runs").exists()


def test_too_many_values_are_rejected_at_once(cvlab, tmp_path):
    seeds = f"seeds=[{','.join(map(str, range(590)))}]"
    code, _, err = cvlab("sweep", write(tmp_path, SWEEP.replace("[1e-3, 1e-2]", "[1e-3]")), seeds)
    assert code == 2
    assert "more than 600 values" in err
    assert not (tmp_path / "runs").exists()


def test_a_budget_in_seconds_is_not_a_seed(tmp_path):
    text = SWEEP.replace("optimizer.lr: [1e-3, 1e-2]", "duration: [{seconds: 1}, {seconds: 2}]")
    assert loading.load(write(tmp_path, text)).config.varied_keys() == ["duration.seconds"]


def test_missing_and_damaged_trials(cvlab, tmp_path):
    name = write(tmp_path, SWEEP.replace("[0, 1]", "[0]"))
    assert cvlab("sweep", name, "-q")[0] == 0
    run = (tmp_path / "runs" / "latest").resolve()
    (run / "status.json").write_text('{"status": "interrupted", "experiment": "sweep"}')
    (run / "trials" / ".ipynb_checkpoints").mkdir()
    (run / "trials" / "000-lr-0.001-seed-0" / "summary.json").write_text("{")
    code, out, _ = cvlab("resume", run, "--json", "-q")
    assert code == 0
    assert [row["status"] for row in json.loads(out)["settings"]] == [["damaged"], ["done"]]
    (run / "status.json").write_text('{"status": "interrupted", "experiment": "sweep"}')
    (run / "trials" / "001-lr-0.01-seed-0").rename(tmp_path / "away")
    code, _, err = cvlab("resume", run)
    assert code == 5
    assert "the trial 001-lr-0.01-seed-0 is missing" in err


def test_any_configuration_can_be_swept(cvlab, tmp_path):
    name = write(tmp_path, BASE.replace("\n  ", "\n").strip() + "\nexpect: [train_accuracy > 2]\n", "plain.yaml")
    code, out, err = cvlab("sweep", name, "grid.batch_size=[10,20]", "base.duration.steps=2", "--json", "-q")
    assert code == 0, err
    assert [row["keys"] for row in json.loads(out)["settings"]] == [{"batch_size": 10}, {"batch_size": 20}]
    code, _, err = cvlab("sweep", name, "grid.batch_sze=[10,20]")
    assert code == 2
    assert "did you mean 'batch_size'" in err


def test_verify(cvlab, tmp_path):
    flat = BASE.replace("\n  ", "\n").strip()
    good = write(tmp_path, flat + "\nexpect: [steps == 4, train_accuracy <= 1]\n", "good.yaml")
    not_met = write(tmp_path, flat + "\nexpect: [train_accuracy > 1]\n", "bad.yaml")
    missing_data = write(tmp_path, flat.replace("scenes10", "cifar10") + "\nexpect: [steps == 4]\n", "worse.yaml")
    code, out, _ = cvlab("verify", good, "--json", "-q")
    assert code == 0
    assert [row["met"] for row in json.loads(out)["verified"]] == [True, True]
    code, out, err = cvlab("verify", good, not_met)
    assert code == 3
    assert "NOT MET" in out
    assert "not met: bad: train_accuracy > 1" in err
    code, out, err = cvlab("verify", not_met, missing_data, good, "--json")
    result = json.loads(out)
    assert code == 4
    assert result["error"]["code"] == 4
    assert [row["met"] for row in result["verified"]] == [False] * 2 + [True] * 2
    (tmp_path / "net.py").write_text("def net():\n    return 1 / 0\n")
    user_model = write(tmp_path, flat.replace("deep_convnet, filters: [4], pools: [0]", "'./net.py:net'"), "own.yaml")
    code, out, _ = cvlab("verify", user_model, good, "--json")
    assert code == 1
    assert [row["met"] for row in json.loads(out)["verified"]] == [False, True, True]
    before = len(list_runs(tmp_path / "runs"))
    assert cvlab("verify", good, "nosuch")[0] == 2
    assert len(list_runs(tmp_path / "runs")) == before
