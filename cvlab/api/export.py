"""A run's net in a file that other programs read: safetensors or ONNX, which says what it takes and what it gives.

A file is read again and compared with the net before it is called written.
"""

import importlib
import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cvlab import registry
from cvlab.api import evaluate
from cvlab.config import loading
from cvlab.engine.task import ExportSpec
from cvlab.errors import CheckpointError, ConfigError
from cvlab.experiments.base import Exportable
from cvlab.runs import checkpoint
from cvlab.runs.find import config_path
from cvlab.storage import atomic

FORMATS = ("safetensors", "onnx")
KEY = "cvlab_export"  # of the metadata, an object of JSON
TOLERANCE = 1e-4  # of a value, and of the largest one
BATCHES = (1, 3)  # photos that the ONNX file is tried with
OPSET = 18
Outputs = list[Tensor]


def export(path: Path, kind: str, which: str, file: Path | None) -> dict[str, Any]:
    """Write the net of a run; return where, what it says of itself, and how far its outputs are from the net's.

    ConfigError for a run without a net, or a format that its net cannot have.
    """
    if kind not in FORMATS:
        raise registry.unknown_name_error("format", kind, FORMATS)
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if kind == "onnx" and importlib.util.find_spec(package) is None:
            raise ConfigError(f"{package} is not installed", "pip install 'cvlab[onnx]'")
    chosen = loading.load(str(config_path(path)), ["device=cpu", "precision=float32"]).config
    experiment = registry.get_experiment(chosen.experiment)
    if not isinstance(experiment, Exportable):
        raise ConfigError(f"{path.name}: a run of {chosen.experiment} has no net to export")
    made = experiment.export_spec(chosen, path, evaluate.state_of(path, which))
    about = {"run": path.name, "checkpoint": which, "experiment": chosen.experiment, **made.metadata}
    file = file or path / f"export.{kind}"
    net = made.model.eval().requires_grad_(False)
    content = _safetensors(made, about) if kind == "safetensors" else _onnx(made, net, about)
    largest = _compare_safetensors(content, made) if kind == "safetensors" else _compare_onnx(content, made, net)
    atomic.write(file, lambda out: out.write(content))
    return {"ok": True, "files": [str(file)], "largest_difference": largest, "bytes": len(content), **about}


def _safetensors(made: ExportSpec, about: dict[str, Any]) -> bytes:
    from safetensors.torch import save

    tensors = {name: tensor.contiguous() for name, tensor in made.weights.state_dict().items()}
    content: bytes = save(tensors, {KEY: json.dumps(about)})
    return content


def _compare_safetensors(content: bytes, made: ExportSpec) -> float:
    from safetensors.torch import load

    own, read = made.weights.state_dict(), load(content)
    checkpoint.match_model(made.weights, read, "the exported file")
    return _difference(list(own.values()), [read[name] for name in own])


def _onnx(made: ExportSpec, net: nn.Module, about: dict[str, Any]) -> bytes:
    if not made.outputs:
        raise ConfigError("onnx: this net has no graph of its own", "--to safetensors takes it")
    onnx = importlib.import_module("onnx")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter warns of its own parts
        example = made.example.expand(max(BATCHES), *made.example.shape[1:]).contiguous()
        program: Any = torch.onnx.export(
            net,
            (example,),
            dynamo=True,
            input_names=["images"],
            output_names=list(made.outputs),
            dynamic_shapes={"images": {0: torch.export.Dim("photos", min=1, max=1024)}},
            opset_version=OPSET,
            verbose=False,
        )
    model = program.model_proto
    onnx.helper.set_model_props(model, {KEY: json.dumps(about)})
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString()
    return content


def _compare_onnx(content: bytes, made: ExportSpec, net: nn.Module) -> float:
    session = importlib.import_module("onnxruntime").InferenceSession(content, providers=["CPUExecutionProvider"])
    largest = 0.0
    for count in BATCHES:
        images = torch.rand(count, *made.example.shape[1:], generator=torch.Generator().manual_seed(count))
        theirs = [torch.from_numpy(value) for value in session.run(None, {"images": images.numpy()})]
        largest = max(largest, _difference(_outputs(net(images)), theirs))
    return largest


def _outputs(found: Any) -> Outputs:
    return [found] if isinstance(found, Tensor) else list(found)


def _difference(mine: Outputs, theirs: Outputs) -> float:
    """Return the largest difference as a share of the largest value. CheckpointError where it is too large."""
    largest = 0.0
    for own, other in zip(mine, theirs, strict=True):
        if own.shape != other.shape:
            raise CheckpointError(f"the exported net gives {tuple(other.shape)}, the run's {tuple(own.shape)}")
        scale = max(float(own.abs().max()), 1.0)
        share = float((own - other).abs().max()) / scale
        if not share <= TOLERANCE:
            raise CheckpointError(f"the exported net differs by {share:.2g} of its largest value; nothing was written")
        largest = max(largest, share)
    return largest
