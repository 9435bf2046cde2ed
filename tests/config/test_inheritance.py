"""`base: NAME` in a configuration: inherited keys, their provenance, and one-line errors with their location."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cvlab.config import loading
from cvlab.errors import ConfigError, RunDirError
from cvlab.runs import trust
from cvlab.sweeps.experiment import load_sweep

PARENT = """name: parent
experiment: classify
data: scenes10
model: {name: deep_convnet, filters: [16, 32], pools: [0], batchnorm: true}
optimizer: {name: adam, lr: 1e-3}
batch_size: 100
duration: {epochs: 10}
reg: 1e-5
ema: 0.9
expect:
  - train_accuracy >= 0.85
"""
NET = "import torch\n\nclass Net(torch.nn.Linear):\n    def __init__(self, num_classes=10, width=4): ...\n"


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "parent.yaml").write_text(PARENT)

    def write_child(text, name="child.yaml"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return str(path)

    return write_child


def load_keys(path, *overrides):
    return yaml.safe_load(loading.load(path, overrides).config.to_yaml())


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("", {}),
        ("batch_size: 20", {"batch_size": 20}),
        ("model: {filters: [8], batchnorm: false}", {"model": {"filters": [8], "batchnorm": False}}),
        ("optimizer: {lr: 1e-2}", {"optimizer": {"lr": 0.01}}),
        ("data: {num_train: 50}", {"data": {"num_train": 50}}),  # the base has only the name
        ("duration: {steps: 5}", {"duration": {"steps": 5, "epochs": None}}),
        ("ema: null", {"ema": None}),
        ("expect: []", {"expect": []}),
    ],
)
def test_keys_are_merged_into_those_of_the_base(write, text, changes):
    expected = load_keys("parent.yaml") | {"name": "child"}
    for key, value in changes.items():
        expected[key] = expected[key] | value if isinstance(value, dict) else value
    assert load_keys(write(f"base: parent.yaml\n{text}\n")) == expected


def test_a_component_of_another_name_replaces_the_one_of_the_base(write):
    optimizer = load_keys(write("base: parent.yaml\noptimizer: {name: sgd}\n"))["optimizer"]
    assert optimizer == load_keys(write(PARENT.replace("{name: adam, lr: 1e-3}", "sgd")))["optimizer"]


def test_a_shipped_configuration_and_a_chain_of_bases(write):
    write("base: cifar_bn\nbatch_size: 50\n", "deep/first.yaml")
    path = write("base: deep/first.yaml\noptimizer: {lr: 1e-2}\n", "second.yaml")
    shipped = load_keys("cifar_bn", "batch_size=50", "optimizer.lr=1e-2")
    assert load_keys(path) == shipped | {"name": "second"}
    assert load_keys(path, "batch_size=10")["batch_size"] == 10


def test_provenance_of_each_key(write):
    write("base: cifar_bn\nbatch_size: 50\nmodel: {batchnorm: false}\n", "deep/first.yaml")
    path = write("base: deep/first.yaml\nname: mine\noptimizer: {lr: 1e-2}\nexpect: []\n")
    origins = loading.load(path, ["seed=1", "model.filters=[8]", "model.pools=[0]"]).provenance
    assert origins == {
        "experiment": "base cifar_bn",
        "data.name": "base cifar_bn",
        "data.fallback": "base cifar_bn",
        "data.num_train": "base cifar_bn",
        "model.name": "base cifar_bn",
        "model.filters": "command line",
        "model.pools": "command line",
        "model.batchnorm": "base deep/first.yaml",
        "model.weight_scale": "base cifar_bn",
        "optimizer.name": "base cifar_bn",
        "optimizer.lr": "file",
        "reg": "base cifar_bn",
        "batch_size": "base deep/first.yaml",
        "duration.epochs": "base cifar_bn",
        "expect": "file",
        "expect_fallback": "base cifar_bn",
        "name": "file",
        "seed": "command line",
    }
    write(PARENT)
    assert (
        loading.load(write("base: parent.yaml\n", "other.yaml")).provenance["name"] == "file"
    )  # the name is not inherited


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: missing.yaml", r"child.yaml:1:1: base: no configuration 'missing.yaml'"),
        ("base: cifar_bm", r"child.yaml:1:1: base: no configuration 'cifar_bm'; did you mean 'cifar_bn'\?"),
        ("base: parent", r"no configuration 'parent'; did you mean 'parent.yaml'\?"),
        ("reg: 0\nbase: child.yaml", r"child.yaml:2:1: base: child.yaml -> child.yaml is a cycle"),
        ("base: folder", r"child.yaml:1:1: base: .*folder is a folder"),
        ("base: 3", "expected the name or the file of a configuration, got 3"),
        ("base: null", "expected the name or the file of a configuration, got null"),
        ("base: [parent.yaml]", "expected the name or the file of a configuration"),
        ('base: ""', "expected the name or the file of a configuration"),
        ("base: list.yaml", "list.yaml has no keys and values at its top"),
        ("base: run/config.yaml", "belongs to a run"),
        ("base: parent.yaml\nreg: null", "child.yaml:2:1: reg: expected a number >= 0, got null"),
        ("base: parent.yaml\nregg: 1", "child.yaml:2:1: unknown key 'regg'; did you mean 'reg'"),
        ("base: wrong.yaml\nbatch_size: 5", "wrong.yaml:2:13: optimizer.lr: expected a number"),
        ("base: wrong.yaml\noptimizer: {lr: 0.1}\nbatch_size: x", "child.yaml:3:1: batch_size: expected"),
    ],
)
def test_an_error_is_one_line_with_its_location(write, tmp_path, text, message):
    (tmp_path / "folder").mkdir()
    write("- 1\n", "list.yaml")
    write("base: parent.yaml\noptimizer: {lr: x}\n", "wrong.yaml")
    write("experiment: classify\n", "run/config.yaml")
    write("{}\n", "run/env.json")
    with pytest.raises(ConfigError, match=message) as error:
        loading.load(write(text + "\n"))
    assert "\n" not in str(error.value)


def test_cycles_of_several_files_and_long_chains(write):
    write("base: b.yaml\n", "a.yaml")
    write("base: deep/../a.yaml\n", "b.yaml")
    Path("deep").mkdir()
    with pytest.raises(ConfigError, match=r"b.yaml:1:1: base: a.yaml -> b.yaml -> a.yaml is a cycle"):
        loading.load("a.yaml")
    for number in range(9):
        write(f"base: {number + 1}.yaml\n", f"{number}.yaml")
    write("base: parent.yaml\n", "8.yaml")
    with pytest.raises(ConfigError, match=r"8.yaml:1:1: base: more than 8 bases"):
        loading.load("0.yaml")
    assert loading.load("1.yaml").config.batch_size == 100


def test_code_of_the_base_is_relative_to_the_folder_of_the_base(write):
    write(NET, "nets/net.py")
    rule = "mean(val_accuracy, model.name=./net.py:Net) > 0.1"
    text = PARENT.partition("expect:")[0].replace(
        "{name: deep_convnet, filters: [16, 32], pools: [0], batchnorm: true}", "./net.py:Net"
    )
    write(text, "nets/net.yaml")
    assert loading.load(write("base: nets/net.yaml\nmodel: {width: 8}\n")).config.model.name == "nets/net.py:Net"
    assert loading.load(write("base: ../nets/net.yaml\n", "other/c.yaml")).config.model.name == "../nets/net.py:Net"
    sweep = (
        f"experiment: sweep\nbase: net.yaml\ngrid: {{model.name: ['./net.py:Net'], seed: [1, 2]}}\nexpect: ['{rule}']\n"
    )
    write(sweep, "nets/sweep.yaml")
    config = loading.load(write("base: nets/sweep.yaml\n", "sweep.yaml")).config
    assert config.grid["model.name"] == ("nets/net.py:Net",)
    assert config.expect == (rule.replace("./net.py", "nets/net.py"),)
    assert config.base["model"] == "nets/net.py:Net"


def test_sweeps(write):
    short = write("experiment: sweep\nbase: child.yaml\ngrid: {reg: [0, 1]}\n", "short.yaml")
    write("base: parent.yaml\nbatch_size: 20\n")
    base = loading.load(short).config.base
    assert base["batch_size"] == 20
    assert base["reg"] == 1e-5
    assert "expect" not in base
    assert load_keys(write("base: short.yaml\nseeds: [3]\n", "again.yaml")) == load_keys(short) | {
        "name": "again",
        "seeds": [3],
    }
    assert load_sweep("again.yaml").config.base == base
    assert load_sweep("child.yaml", ["seeds=[1,2]"]).config.base["batch_size"] == 20
    assert loading.load(short, ["base.optimizer.lr=0.5"]).config.base["optimizer"]["lr"] == 0.5


@pytest.mark.parametrize("text", ["base: ../parent.yaml\n", "experiment: sweep\nbase: {from: ../parent.yaml}\n"])
def test_a_run_that_refers_to_another_file_is_not_trusted(write, tmp_path, text):
    write(text, "run/config.yaml")
    with pytest.raises(RunDirError, match=r"config.yaml: it refers to '../parent.yaml'.*--trust"):
        trust.require_trust_of(str(tmp_path / "run"), False)
    trust.require_trust_of(str(tmp_path / "run"), True)


def test_loading_imports_no_slow_package(write, tmp_path):
    write("base: cifar_no_bn\n")
    code = """import sys, json
from cvlab.config import loading
loading.load("child.yaml")
print(json.dumps(sorted({"torch", "PIL", "numpy"} & set(sys.modules))))"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, check=True
    )
    assert json.loads(process.stdout) == []


def test_the_configuration_of_a_run_is_complete_and_records_its_bases(write, cvlab, tmp_path):
    path = write("base: quickstart\nbatch_size: 20\n")
    small = ["data.num_train=60", "duration={steps: 2}", "expect=[]", "evaluate_test=false"]
    code, out, err = cvlab("train", path, *small, "--runs-dir", str(tmp_path / "runs"), "--json")
    assert code == 0, err
    run = Path(json.loads(out)["run"])
    assert "base" not in yaml.safe_load((run / "config.yaml").read_text())
    origins = json.loads((run / "env.json").read_text())["provenance"]
    assert origins["optimizer.lr"] == "base quickstart"
    assert origins["batch_size"] == "file"
    assert loading.load(str(run)).config.batch_size == 20
