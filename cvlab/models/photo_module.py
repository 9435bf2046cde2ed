"""Trained models with their preprocessing inside, for images in memory: what `Run.model()` returns."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from cvlab.errors import ConfigError
from cvlab.models.pretrained import PretrainedClassifier
from cvlab.ops.resample import build_resize

BATCH_SIZE = 16  # photos that are in memory as tensors at a time
TOP = 5


class PhotoModule(nn.Module):
    """A trained model that takes images of any size; `forward` takes tensors, `predict` photos.

    Attributes:
        classes: Names of the classes; empty if the model has none.
    """

    classes: tuple[str, ...] = ()

    def predict(self, images: Sequence[Image.Image]) -> list[dict[str, Any]]:
        """Return for each RGB photo what the command on photos reports about it, without paths and files."""
        chunks = (images[start : start + BATCH_SIZE] for start in range(0, len(images), BATCH_SIZE))
        with torch.inference_mode():
            return [row for chunk in chunks for row in self.predict_batch(chunk)]

    def predict_batch(self, images: Sequence[Image.Image]) -> list[dict[str, Any]]:
        """Return the predictions for a few photos, which are processed together."""
        raise NotImplementedError


def require_batch(images: Tensor) -> Tensor:
    """Return images (N, 3, H, W) as float32 in [0, 1]; those of 8 bits are scaled. ConfigError for another shape."""
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] not in (1, 3):
        shape = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ConfigError(f"expected images (N, 3, H, W) in [0, 1], got {shape}", "`run.predict` also takes photos")
    images = images.float() / 255 if images.dtype == torch.uint8 else images
    return images.expand(-1, 3, -1, -1)


class PhotoClassifier(PhotoModule):
    """A classifier of images (N, 3, H, W) in [0, 1], or of 8 bits: resize, crop, normalization, model.

    It is differentiable. Its resize differs from that of `predict`, which is Pillow's, by the rounding to 8 bits.
    """

    def __init__(self, classifier: PretrainedClassifier) -> None:
        super().__init__()
        self.classifier = classifier
        self.module = classifier.module
        self.classes = classifier.classes

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (N, num_classes), float32."""
        images = require_batch(images)
        n, c, h, w = images.shape
        resize = build_resize(self.classifier.transform, w, h, images.device)
        resized = resize(resize.crop(images.reshape(n * c, h, w)))  # (N*C, S, S)
        logits: Tensor = self.module(resized.view(n, c, *resized.shape[1:]).clamp(0, 1))
        return logits.float()

    def predict_batch(self, images: Sequence[Image.Image]) -> list[dict[str, Any]]:
        """Return `label`, `class_index` and `score` of the most likely class, and the `top` classes, of each photo."""
        return self.classifier.top_classes(images, TOP)
