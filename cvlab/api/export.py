"""`cvlab export`: a run's model as safetensors or ONNX, with metadata about its inputs and outputs.

A file is read back and compared with the model before it is written to its place.
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
from cvlab.config import loading
from cvlab.engine.task import ExportSpec
from cvlab.errors import CheckpointError, ConfigError, install_command
from cvlab.experiments.base import Exportable
from cvlab.runs import checkpoint
from cvlab.runs.find import config_path
from cvlab.storage import atomic

FORMATS = ("safetensors", "onnx")
METADATA_KEY = "cvlab_export"  # its value is a JSON object
TOLERANCE = 1e-4  # largest difference of an output, relative to the largest output
BATCH_SIZES = (1, 3)  # that the ONNX file is compared with
OPSET = 18
Outputs = list[Tensor]


def export(path: Path, file_format: str, weights: str, file: Path | None) -> dict[str, Any]:
    """Write the model of a run to a file.

    Args:
        path: The run directory.
        file_format: `safetensors` or `onnx`.
        weights: `last` or `best`.
        file: The file to write; None for `export.FORMAT` in the run directory.

    Returns:
        `ok`, `files`, `largest_difference` of the outputs relative to the largest one, `bytes`, and the metadata.

    Raises:
        ConfigError: The experiment has no model to export, or not in this format.
        CheckpointError: There is no such checkpoint, or the file differs from the model.
    """
    if file_format not in FORMATS:
        raise registry.unknown_name_error("format", file_format, FORMATS)
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if file_format == "onnx" and importlib.util.find_spec(package) is None:
            raise ConfigError(f"{package} is not installed", install_command("onnx"))
    config = loading.load(str(config_path(path)), ["device=cpu", "precision=float32"]).config
    experiment = registry.get_experiment(config.experiment)
    if not isinstance(experiment, Exportable):
        raise ConfigError(f"{path.name}: a run of {config.experiment} has no model to export")
    spec = experiment.export_spec(config, path, checkpoint.load_of_run(path, weights))
    metadata = {"run": path.name, "checkpoint": weights, "experiment": config.experiment, **spec.metadata}
    file = file or path / f"export.{file_format}"
    model = spec.model.eval().requires_grad_(False)
    if file_format == "safetensors":
        content = _safetensors(spec, metadata)
        largest = _compare_safetensors(content, spec)
    else:
        content = _onnx(spec, model, metadata)
        largest = _compare_onnx(content, spec, model)
    atomic.write(file, lambda out: out.write(content))
    return {"ok": True, "files": [str(file)], "largest_difference": largest, "bytes": len(content), **metadata}


def _safetensors(spec: ExportSpec, metadata: dict[str, Any]) -> bytes:
    from safetensors.torch import save

    # copies, for tied weights share their memory, which the format does not allow
    tensors = {name: tensor.clone().contiguous() for name, tensor in spec.weights.state_dict().items()}
    content: bytes = save(tensors, {METADATA_KEY: json.dumps(metadata)})
    return content


def _compare_safetensors(content: bytes, spec: ExportSpec) -> float:
    from safetensors.torch import load

    expected, read = spec.weights.state_dict(), load(content)
    checkpoint.match_model(spec.weights, read, "the exported file")
    return _largest_difference(list(expected.values()), [read[name] for name in expected])


def _onnx(spec: ExportSpec, model: nn.Module, metadata: dict[str, Any]) -> bytes:
    if not spec.outputs:
        raise ConfigError("onnx: this model cannot be exported as a graph", "use --to safetensors")
    onnx = importlib.import_module("onnx")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter warns about its own code
        example = spec.example.expand(max(BATCH_SIZES), *spec.example.shape[1:]).contiguous()
        try:
            program: Any = torch.onnx.export(
                model,
                (example,),
                dynamo=True,
                input_names=["images"],
                output_names=list(spec.outputs),
                dynamic_shapes={"images": {0: torch.export.Dim("photos", min=1, max=1024)}},
                opset_version=OPSET,
                verbose=False,
            )
        except Exception as error:  # of the exporter, whose errors are pages long
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            hint = "a branch on the values of a tensor is the usual reason; --to safetensors exports the weights"
            raise ConfigError(f"onnx: this model cannot be exported: {reason[:200]}", hint) from error
    graph = program.model_proto
    onnx.helper.set_model_props(graph, {METADATA_KEY: json.dumps(metadata)})
    onnx.checker.check_model(graph)
    content: bytes = graph.SerializeToString()
    return content


def _compare_onnx(content: bytes, spec: ExportSpec, model: nn.Module) -> float:
    session = importlib.import_module("onnxruntime").InferenceSession(content, providers=["CPUExecutionProvider"])
    largest = 0.0
    for count in BATCH_SIZES:
        images = torch.rand(count, *spec.example.shape[1:], generator=torch.Generator().manual_seed(count))
        outputs = [torch.from_numpy(value) for value in session.run(None, {"images": images.numpy()})]
        largest = max(largest, _largest_difference(_outputs(model(images)), outputs))
    return largest


def _outputs(result: Any) -> Outputs:
    return [result] if isinstance(result, Tensor) else list(result)


def _largest_difference(expected: Outputs, exported: Outputs) -> float:
    """Return the largest difference relative to the largest value. CheckpointError if it exceeds TOLERANCE."""
    largest = 0.0
    for reference, output in zip(expected, exported, strict=True):
        if reference.shape != output.shape:
            raise CheckpointError(
                f"the exported model returns {tuple(output.shape)}, the run's {tuple(reference.shape)}"
            )
        scale = max(float(reference.abs().max()), 1.0)
        share = float((reference - output).abs().max()) / scale
        if not share <= TOLERANCE:
            raise CheckpointError(
                f"the exported model differs by {share:.2g} of the largest output; nothing was written"
            )
        largest = max(largest, share)
    return largest
