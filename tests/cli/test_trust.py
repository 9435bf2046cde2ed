"""A run directory with Python files that was not created on this machine is run only with --trust."""

import json
import shutil
from pathlib import Path

import pytest

from cvlab.cli import main
from cvlab.runs import trust

NET = """
import os, pathlib
from torch import nn
from parts import WIDTH
if "CVLAB_TEST_CANARY" in os.environ:
    pathlib.Path(os.environ["CVLAB_TEST_CANARY"]).touch()
def net(num_classes: int = 10):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(WIDTH), nn.Linear(WIDTH, num_classes))
"""
OVERRIDES = (
    *("data.num_train=60", "batch_size=20", "duration={steps: 3}", "expect=[]"),
    *("evaluate_test=false", "threads=1"),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory, data_root):
    """Return a run of a model of the user, trained on this machine."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "net.py").write_text(NET.replace("nn.LazyLinear(WIDTH)", "nn.Linear(3072, WIDTH)"))
    (folder / "parts.py").write_text("WIDTH = 4\n")
    model = f"model={folder}/net.py:net"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CVLAB_DATA", str(data_root))
        arguments = ["train", "quickstart", model, *OVERRIDES, f"--runs-dir={folder / 'runs'}", "-q"]
        assert main.run_command_line(arguments) == 0
    return next((folder / "runs").glob("2*"))


@pytest.fixture
def canary(tmp_path, monkeypatch):
    monkeypatch.setenv("CVLAB_TEST_CANARY", str(tmp_path / "canary"))
    return tmp_path / "canary"


def commands(run, out):
    return {
        "train": ["train", str(run), f"--runs-dir={out}"],
        "run": ["run", str(run), f"--runs-dir={out}"],
        "run of the file": ["run", str(run / "config.yaml"), f"--runs-dir={out}"],
        "dry run": ["train", str(run), "--dry-run"],
        "resume": ["resume", str(run)],
        "eval": ["eval", str(run), "--split=val"],
        "export": ["export", str(run), "--to=safetensors"],
        "sweep": ["sweep", str(run), "seeds=[0]", "--dry-run"],
        "config": ["config", str(run)],
        "lr": ["lr", str(run), "--steps=20", f"--runs-dir={out}"],
        "summary": ["summary", str(run)],
        "verify": ["verify", str(run), f"--runs-dir={out}"],
        "queue": ["queue", "add", str(run), f"--runs-dir={out}"],
    }


NAMES = tuple(commands(Path(), ""))


def no_env(run):
    (run / "env.json").unlink()


def no_signature(run):
    change_env(run, lambda env: env.pop(trust.SIGNATURE))


def odd_signature(run):
    change_env(run, lambda env: env.update({trust.SIGNATURE: [1]}))


def null_signature(run):
    change_env(run, lambda env: env.update({trust.SIGNATURE: None}))


def other_code(run):
    with (run / "net.py").open("a") as file:
        file.write("\n# changed\n")


def other_import(run):
    (run / "parts.py").write_text("WIDTH = 5\n")


def new_module(run):
    (run / "torch.py").write_text("")


def new_bytecode(run):
    (run / "__pycache__").mkdir()
    (run / "__pycache__" / "parts.cpython-311.pyc").write_bytes(b"")


def code_outside(run):
    (run.parent / "evil.py").write_text((run / "net.py").read_text())
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("net.py:net", f"{run.parent}/evil.py:net"))


def change_env(run, edit):
    env = json.loads((run / "env.json").read_text())
    edit(env)
    (run / "env.json").write_text(json.dumps(env))


UNTRUSTED_CHANGES = (
    *(no_env, no_signature, odd_signature, null_signature, other_code, other_import),
    *(new_module, new_bytecode, code_outside),
)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_of_this_machine_is_trusted(run, tmp_path, canary, name):
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "status.json").write_text('{"status": "interrupted"}') if name == "resume" else None
    assert main.run_command_line(commands(copy, tmp_path / "out")[name]) == 0
    assert canary.exists()
    assert not list(copy.rglob("*.pyc"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("change", UNTRUSTED_CHANGES, ids=lambda change: change.__name__)
def test_untrusted_code_is_not_run(run, tmp_path, canary, capsys, name, change):
    copy = shutil.copytree(run, tmp_path / "run")
    change(copy)
    assert main.run_command_line(commands(copy, tmp_path / "out")[name]) == 5
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(error) == 1
    assert "--trust" in error[0]
    assert not canary.exists()


@pytest.mark.parametrize("name", NAMES)
def test_untrusted_code_is_run_with_trust(run, tmp_path, canary, name):
    copy = shutil.copytree(run, tmp_path / "run")
    no_env(copy)
    (copy / "status.json").write_text('{"status": "interrupted"}')
    assert main.run_command_line([*commands(copy, tmp_path / "out")[name], "--trust"]) == 0
    assert canary.exists()


def test_another_key_is_another_machine(run, tmp_path, canary, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert main.run_command_line(["eval", str(run)]) == 5
    assert not canary.exists()
    key = tmp_path / "state" / "cvlab" / "signing-key"
    assert key.stat().st_mode & 0o777 == 0o600
    assert len(key.read_bytes()) == trust.KEY_BYTES
    assert [path.name for path in key.parent.iterdir()] == [key.name]


def test_without_a_signing_key_trust_is_required(run, tmp_path, canary, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert trust.sign(run) is None
    assert main.run_command_line(["eval", str(run)]) == 5


def test_a_run_without_code_is_trusted(tmp_path):
    assert main.run_command_line(["train", "quickstart", *OVERRIDES, f"--runs-dir={tmp_path}", "-q"]) == 0
    run = next(tmp_path.glob("2*"))
    (run / "env.json").unlink()
    assert main.run_command_line(["train", str(run), "--dry-run"]) == 0


@pytest.mark.parametrize("flag", ["--trust", "--allow-changes"])
def test_changed_code_is_run_only_with_a_flag(run, tmp_path, canary, flag):
    copy = shutil.copytree(run, tmp_path / "run")
    other_code(copy)
    (copy / "status.json").write_text('{"status": "interrupted"}')
    shutil.rmtree(copy / "checkpoints")
    (copy / "metrics.jsonl").unlink()
    assert main.run_command_line(["resume", str(copy)]) == 5
    assert not canary.exists()
    assert main.run_command_line(["resume", str(copy), flag]) == 0
    assert main.run_command_line(["eval", str(copy), "--split=val"]) == 0  # signed again
    assert canary.exists()


def test_a_configuration_with_a_long_name_is_an_error(tmp_path):
    assert main.run_command_line(["train", "x" * 5000]) == 2
