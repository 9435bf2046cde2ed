"""Features of photos: what the last layer before the classifier of a pretrained model gives, of unit length."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from cvlab import console
from cvlab.console import Progress
from cvlab.data import photos
from cvlab.errors import DataError
from cvlab.models import split
from cvlab.models.pretrained import PretrainedClassifier

BATCH_SIZE = 32


@dataclass(frozen=True)
class Embedder:
    """A pretrained model without its classifier."""

    model: PretrainedClassifier
    features: nn.Module

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """Return the features (N, F), float32 of unit length, of RGB images of any size."""
        module = self.model.module
        batch = torch.stack([photos.to_tensor(self.model.transform(image)) for image in images])
        batch = batch.to(module.scale.device, memory_format=torch.channels_last)
        return F.normalize(self.features(module.normalize(batch)).float(), dim=1).cpu()


def build(model: PretrainedClassifier) -> Embedder:
    """Return the embedder of a pretrained model. ConfigError if it has no features (N, F)."""
    return Embedder(model, split.split(model, 0).trunk)


def embed_files(embedder: Embedder, paths: Sequence[Path]) -> tuple[list[Path], Tensor]:
    """Compute the features of photos; those that cannot be read are reported.

    Args:
        embedder: The model.
        paths: N photos.

    Returns:
        The M photos that could be read, and their features (M, F).

    Raises:
        DataError: None of them could be read.
    """
    readable: list[Path] = []
    features: list[Tensor] = []
    error: DataError | None = None
    with Progress("embed", len(paths), 0) as progress:
        for start in range(0, len(paths), BATCH_SIZE):
            batch = []
            for path in paths[start : start + BATCH_SIZE]:
                try:
                    batch.append((path, photos.load(path)))
                except DataError as photo_error:
                    error = photo_error
                    console.info(f"warning: {photo_error}")
            if batch:
                readable += [path for path, _ in batch]
                features.append(embedder([image for _, image in batch]))
            if progress.due():
                progress.update(min(start + BATCH_SIZE, len(paths)), "")
    if error is not None and not readable:
        raise error
    return readable, torch.cat(features)


def nearest(features: Tensor, query: Tensor, count: int) -> list[tuple[int, float]]:
    """Return the rows of `features` (N, F) that are nearest to `query` (F,), with their cosine similarity."""
    similarity, indices = (features @ query).topk(min(count, len(features)))
    return list(zip(indices.tolist(), similarity.tolist(), strict=True))


def near_pairs(features: Tensor, threshold: float) -> list[tuple[int, int, float]]:
    """Return all pairs of rows (N, F) with a cosine similarity of at least `threshold`, the most similar first."""
    similarity = (features @ features.T).triu(1)
    rows, columns = (similarity >= threshold).nonzero(as_tuple=True)
    pairs = zip(rows.tolist(), columns.tolist(), similarity[rows, columns].tolist(), strict=True)
    return sorted(pairs, key=lambda pair: -pair[2])
