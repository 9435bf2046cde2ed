"""A trained classifier for photos: `classifier.json` in its run directory says how it takes them."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cvlab import registry
from cvlab.data.datasets import DatasetSize
from cvlab.errors import RunDirError
from cvlab.experiments.classification import setup
from cvlab.experiments.classification.config import ClassifyConfig
from cvlab.experiments.classification.setup import ClassificationSetup
from cvlab.models.pretrained import NormalizedModel, PretrainedClassifier
from cvlab.ops.resample import FILTERS, EvalTransform
from cvlab.runs import checkpoint
from cvlab.runs.records import read_json
from cvlab.runs.run_dir import RunDir

FILE = "classifier.json"
MAX_SIDE = 4096
LUMINANCE = (0.299, 0.587, 0.114)  # of ITU-R BT.601, as Pillow's conversion to gray


def write(run: RunDir, built: ClassificationSetup) -> None:
    """Write the classes, and how images are brought in, into a run directory."""
    mean, std = built.normalize.mean_and_std()
    transform = built.dataset.photo_transform()
    about = {"classes": built.dataset.classes, "mean": mean, "std": std, "transform": asdict(transform)}
    run.write_json(FILE, about)


def load(config: ClassifyConfig, base: Path, state: dict[str, Any], device: str) -> PretrainedClassifier:
    """Return the model of a checkpoint for photos.

    Args:
        config: The run's configuration.
        base: The run directory.
        state: The checkpoint.
        device: Where to put it.

    Returns:
        The classifier, named after its run.

    Raises:
        RunDirError: `classifier.json` is missing or was changed.
        CheckpointError: The weights do not fit.
    """
    about = _read(base)
    mean, std, transform = about["mean"], about["std"], about["transform"]
    size = DatasetSize(0, 0, transform.size_px, len(mean), len(about["classes"]))
    model = setup.build_model(config, base, size, is_restored=True)
    model = model.double() if config.precision == "float64" else model  # the dtype of the checkpoint
    checkpoint.load_eval_weights(model, state, str(base))
    model = model.float().eval().requires_grad_(False)
    classes = about["classes"]
    if registry.is_user_file(config.model.name):
        classes = (*classes, *_other_outputs(model, size))
    module = NormalizedModel(GrayscaleModel(model) if len(mean) == 1 else model, tuple(mean), tuple(std)).eval()
    module = module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return PretrainedClassifier(base.name, module, transform, tuple(classes))


@torch.no_grad()
def _other_outputs(model: nn.Module, size: DatasetSize) -> list[str]:
    """Return names for the outputs of a user's model that stand for no class, of which it may have some."""
    logits = model(torch.zeros(1, size.channels, size.image_px, size.image_px))
    return [f"output {index}" for index in range(size.num_classes, logits.shape[1])]


class GrayscaleModel(nn.Module):
    """A model of images with one channel, given images (N, 3, H, W): it takes their luminance."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.weights: Tensor
        self.register_buffer("weights", torch.tensor(LUMINANCE).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of normalized images with one or three channels."""
        gray = (images * self.weights).sum(1, keepdim=True) if images.shape[1] == 3 else images
        logits: Tensor = self.model(gray)
        return logits


def _read(base: Path) -> dict[str, Any]:
    path = base / FILE
    about = read_json(path)
    if not about:
        raise RunDirError(f"{path}: no such file", f"the run has not started to train; `cvlab resume {base.name}`")
    try:
        transform = EvalTransform(**about["transform"])
        is_valid = (
            isinstance(transform.size_px, int)
            and 1 <= transform.size_px <= transform.resize_px <= MAX_SIDE
            and transform.filter in FILTERS
            and isinstance(transform.squash, bool)
            and all(isinstance(name, str) for name in about["classes"])
            and len(about["classes"]) > 1
            and all(isinstance(value, float) for key in ("mean", "std") for value in about[key])
            and all(value > 0 for value in about["std"])
            and len(about["mean"]) == len(about["std"]) in (1, 3)
        )
    except (TypeError, KeyError, AttributeError):
        is_valid = False
    if not is_valid:
        raise RunDirError(f"{path}: not what a training run writes", "the file was changed")
    return {**about, "transform": transform}
