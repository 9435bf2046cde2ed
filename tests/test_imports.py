"""What each command imports: none of the slow packages that its answer does not need."""

import json
import subprocess
import sys

import pytest

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
CODE = f"""import json, sys
from cvlab.cli import main
code = main.run_command_line(sys.argv[1:])
print(json.dumps([code, [name for name in ("torch", "matplotlib", *{SLOW!r}) if name in sys.modules]]))"""
TRAIN = ("train", "quickstart", "duration={steps: 2}", "data.num_train=100", "batch_size=20", "evaluate_test=false")


@pytest.mark.parametrize(
    ("arguments", "allowed"),
    [
        (("--help",), ()),
        (("config", "cifar_bn"), ()),
        (("data", "list"), ("torch",)),
        (("classify", "sample"), ("torch",)),
        (("detect", "sample"), ("torch", "matplotlib")),
        (("caption", "sample"), ("torch",)),
        (("saliency", "sample"), ("torch", "matplotlib")),
        (("attack", "sample", "--target", "ostrich"), ("torch", "matplotlib")),
        (("embed", "sample", "--out", "features.npz"), ("torch",)),
        ((*TRAIN, "expect=[]"), ("torch", "matplotlib")),
    ],
    ids=lambda value: "-".join(value) if value and value[0] in ("config", "data") else None,
)
def test_a_command_imports_no_slow_package(arguments, allowed, tmp_path, data_root, monkeypatch):
    monkeypatch.setenv("CVLAB_DATA", str(data_root))
    monkeypatch.setenv("CVLAB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command = [sys.executable, "-c", CODE, *arguments]
    output = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert output.returncode == 0, output.stderr
    code, imported = json.loads(output.stdout.splitlines()[-1])
    assert code == 0, output.stderr
    assert set(imported) <= set(allowed)
