"""Commands do not import slow packages that they do not need."""

import json
import os
import subprocess
import sys

SLOW = (
    "torchvision",
    "timm",
    "torch._dynamo",
    "sympy",
    "scipy",
    "pandas",
    "wandb",
    "sklearn",
    "huggingface_hub",
    "onnx",
)
TRAIN = ("train", "quickstart", "duration={steps: 2}", "data.num_train=100", "batch_size=20", "evaluate_test=false")
COMMANDS = {  # command -> allowed packages besides torch
    ("classify", "sample"): (),
    ("detect", "sample"): (),
    ("caption", "sample"): (),
    ("saliency", "sample"): (),
    ("attack", "sample"): (),
    ("classvis", "--target", "gorilla", "steps=1"): ("matplotlib",),
    ("dream", "sample", "--octaves", "1", "--steps", "1", "--size", "64"): (),
    ("look", "efficientnet_lite0", "sample"): (),
    ("embed", "sample", "--out", "features.npz"): (),
    (*TRAIN, "expect=[]"): ("matplotlib",),
}
WITHOUT_TORCH = (("--help",), ("config", "cifar_bn"), ("data", "list"), ("runs",), ("show", "latest"))
CODE = f"""
import json, os, sys
first, *commands = json.loads(sys.argv[1])
if first:
    __import__(first)
from cvlab.cli import main

for args in commands:
    pid = os.fork()
    if pid == 0:
        code = main.run_command_line(args)
        imported = [name for name in ("torch", "matplotlib", *{SLOW!r}) if name in sys.modules]
        print(json.dumps([code, imported]), file=sys.stderr, flush=True)
        os._exit(0)
    os.waitpid(pid, 0)
"""


def imports_of(first, commands, folder, data_root):
    """Run commands, each in a fork of a process that has imported one package; return codes and imported packages."""
    environment = os.environ | {"CVLAB_DATA": str(data_root), "CVLAB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    arguments = json.dumps([first, *([*args, "-q"] if first else args for args in commands)])
    command = [sys.executable, "-c", CODE, arguments]
    output = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in output.stderr.splitlines() if line.startswith("[")]
    assert len(lines) == len(commands), output.stderr
    return lines


def test_commands_that_compute_import_no_slow_package(tmp_path, data_root):
    lines = imports_of("torch", COMMANDS, tmp_path, data_root)
    for (args, allowed), (code, imported) in zip(COMMANDS.items(), lines, strict=True):
        assert code == 0, args
        assert set(imported) <= {"torch", *allowed}, args


def test_commands_that_only_list_import_no_torch(tmp_path, data_root):
    imports_of("torch", [("classify", "sample")], tmp_path, data_root)  # creates the run for `show`
    lines = imports_of("", WITHOUT_TORCH, tmp_path, data_root)
    assert lines == [[0, []]] * len(WITHOUT_TORCH)
