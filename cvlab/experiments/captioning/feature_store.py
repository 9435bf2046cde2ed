"""Backbone features of whole photos, computed once and kept on the disk, checksummed and memory-mapped.

`<data>/features-v1/<key>.npy` holds float16 (N, L, C). The key is a hash of what the features depend on: backbone,
weights, layers, size, and the photos' names, sizes and modification times. `<key>.json` holds a checksum.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cvlab import console
from cvlab.console import Progress
from cvlab.data import photos
from cvlab.engine.device import ComputeContext
from cvlab.errors import CvlabError, DataError
from cvlab.models.features import FeatureExtractor
from cvlab.runs import checkpoint
from cvlab.storage import atomic
from cvlab.storage.cache import data_root

FOLDER = "features-v1"
BATCH_SIZE = 32
CHUNK_BYTES = 2**24
EPSILON = 1e-12  # of a mean square


@dataclass(frozen=True)
class FeatureSource:
    """The feature maps of a backbone.

    Attributes:
        extractor: The backbone's layers.
        size_px: Photos are resized to squares of this size.
    """

    extractor: FeatureExtractor
    size_px: int

    def maps(self, images: Sequence[Image.Image], ctx: ComputeContext, mirrored: bool = False) -> list[Tensor]:
        """Return the maps (N, C_k, H_k, W_k) of N photos, float32, one for each layer."""
        squares = torch.stack([resize_square(image, self.size_px, mirrored) for image in images])
        with ctx.autocast():
            by_layer = self.extractor.batch(squares.to(ctx.device))
        return [by_layer[name].float() for name in self.extractor.names]


@dataclass(frozen=True)
class FeatureSpec:
    """How features are computed.

    Attributes:
        pool: Average over the spatial positions, L = 1.
        mirrored: Flip the photos horizontally.
    """

    pool: bool
    mirrored: bool = False


def resize_square(photo: Image.Image, size_px: int, mirrored: bool = False) -> Tensor:
    """Return a photo as (3, size_px, size_px) in [0, 1], resized without keeping the aspect ratio: nothing is cropped.

    Args:
        photo: The photo.
        size_px: Width and height of the result.
        mirrored: Flip it horizontally.
    """
    image = photos.to_tensor(photo.resize((size_px, size_px), Image.Resampling.BILINEAR, reducing_gap=2.0))
    return image.flip(2) if mirrored else image


@torch.inference_mode()
def compute_maps(
    sources: Sequence[FeatureSource], images: Sequence[Image.Image], ctx: ComputeContext, mirrored: bool = False
) -> list[Tensor]:
    """Return the feature maps (N, C_k, H_k, W_k) of N photos, those of the first source first."""
    return [feature_map for source in sources for feature_map in source.maps(images, ctx, mirrored)]


@torch.inference_mode()
def extract_features(
    sources: Sequence[FeatureSource], images: Sequence[Image.Image], ctx: ComputeContext, spec: FeatureSpec
) -> Tensor:
    """Compute the features of a batch of photos.

    Args:
        sources: The first layer of the first one defines the spatial positions; finer feature maps are averaged to this
            resolution, coarser ones are repeated, and all are concatenated. The maps of several sources are then
            scaled to a mean square of 1 in each photo: those of one backbone may be many times as large as another's.
        images: N photos.
        ctx: Device and precision.
        spec: How the features are computed.

    Returns:
        float32 (N, L, C) on the CPU, or (N, 1, C) if pooled.
    """
    return combine_maps(compute_maps(sources, images, ctx, spec.mirrored), spec.pool, len(sources) > 1).cpu()


def combine_maps(maps: Sequence[Tensor], pool: bool, is_scaled: bool) -> Tensor:
    """Return the features of feature maps (N, C_k, H_k, W_k); see `extract_features`."""
    height, width = maps[0].shape[2:]
    resized = [F.adaptive_avg_pool2d(feature_map, (height, width)) for feature_map in maps]
    features = torch.cat([_normalize_scale(m) for m in resized] if is_scaled else resized, 1).flatten(2).mT
    return features.mean(1, keepdim=True) if pool else features


def _normalize_scale(feature_map: Tensor) -> Tensor:
    """Divide the features of each photo by their root mean square."""
    return feature_map * feature_map.square().mean((1, 2, 3), keepdim=True).clamp(min=EPSILON).rsqrt()


def load_features(
    sources: Sequence[FeatureSource],
    paths: Sequence[Path],
    ctx: ComputeContext,
    spec: FeatureSpec,
    check_interrupt: Callable[[], None],
) -> Tensor:
    """Return the features of photos from the disk if present, else compute and keep them.

    If they cannot be kept, a warning is logged and they stay in memory.

    Args:
        sources: The backbones; see `extract_features`.
        paths: N photos.
        ctx: Device and precision.
        spec: How the features are computed.
        check_interrupt: Called after each batch; may raise to stop.

    Returns:
        float16 (N, L, C) on the CPU.

    Raises:
        DataError: A photo cannot be read.
    """
    key, description = _key(sources, paths, ctx, spec)
    path = data_root() / FOLDER / f"{key}.npy"
    try:
        return _read(path)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError) as error:
        console.info(f"warning: {path}: {error}; computing it again")
    features = _compute(sources, paths, ctx, spec, check_interrupt)
    try:
        _write(path, features, description)
        return _read(path)
    except (CvlabError, OSError) as error:
        console.info(f"warning: the features could not be cached: {error}")
        return features


def _compute(
    sources: Sequence[FeatureSource],
    paths: Sequence[Path],
    ctx: ComputeContext,
    spec: FeatureSpec,
    check_interrupt: Callable[[], None],
) -> Tensor:
    features: Tensor | None = None
    with Progress("features of photos", len(paths), 0) as progress:
        for start in range(0, len(paths), BATCH_SIZE):
            batch = paths[start : start + BATCH_SIZE]
            batch_features = extract_features(sources, [photos.load(path) for path in batch], ctx, spec).half()
            if features is None:
                features = torch.empty(len(paths), *batch_features.shape[1:], dtype=torch.float16)
            features[start : start + len(batch)] = batch_features
            check_interrupt()
            if progress.due():
                progress.update(start + len(batch), batch[-1].name)
    if features is None:
        raise DataError("there are no photos to compute features of")
    return features


def _key(
    sources: Sequence[FeatureSource], paths: Sequence[Path], ctx: ComputeContext, spec: FeatureSpec
) -> tuple[str, dict[str, Any]]:
    """Return the key of features, and what they depend on besides the photos."""
    first, *extra = [_describe(source) for source in sources]
    description = first | {
        "pool": spec.pool,
        "mirrored": spec.mirrored,
        "precision": ctx.precision,
        "photos": len(paths),
    }
    if extra:
        description["extra"] = extra
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for path in paths:
        try:
            status = path.stat()
        except OSError as error:
            raise DataError(
                f"{path}: {error.strerror or error}", "restore the photo, or remove it from the list"
            ) from error
        digest.update(f"{path.name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:24], description


def _describe(source: FeatureSource) -> dict[str, Any]:
    return {
        "backbone": source.extractor.model.name,
        "weights": checkpoint.weights_digest(source.extractor.model.module.state_dict()),
        "layers": source.extractor.names,
        "size_px": source.size_px,
    }


def _write(path: Path, features: Tensor, description: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(path, lambda file: np.save(file, features.numpy(), allow_pickle=False))
    atomic.write_text(path.with_suffix(".json"), json.dumps(description | {"sha256": _sha256(path)}, indent=1))


def _read(path: Path) -> Tensor:
    """Verify the checksum of a file and map it into memory."""
    description = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    if _sha256(path) != description["sha256"]:
        raise ValueError("its checksum differs")
    # copy-on-write: torch needs writable memory
    return torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
