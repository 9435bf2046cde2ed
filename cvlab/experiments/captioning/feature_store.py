"""What a frozen backbone sees in whole photos, computed once and kept on the disk, checksummed and mapped into memory.

`<data>/features-v1/<key>.npy` holds float16 (N, L, C); the key says from what it was made: backbone, layer, size and
the photos' names, sizes and times. Beside it lies `<key>.json` with a checksum.
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
BATCH = 32
CHUNK = 2**24


@dataclass(frozen=True)
class Request:
    """Which maps: photos squeezed to `size_px` squares, mirrored or not; with `pool` the mean over a map."""

    size_px: int
    pool: bool
    mirrored: bool = False


def squeezed(photo: Image.Image, size_px: int, mirrored: bool = False) -> Tensor:
    """Return a photo as (3, S, S) in [0, 1], both sides made `size_px`: nothing is cut off."""
    found = photos.to_tensor(photo.resize((size_px, size_px), Image.Resampling.BILINEAR, reducing_gap=2.0))
    return found.flip(2) if mirrored else found


@torch.inference_mode()
def look(features: FeatureExtractor, batch: Tensor, ctx: ComputeContext, pool: bool) -> Tensor:
    """Return the maps of a batch (N, 3, S, S) cell by cell: (N, L, C), or (N, 1, C) pooled, float32 on the CPU.

    The cells are those of the first map; finer maps are averaged over them, coarser ones repeated.
    """
    with ctx.autocast():
        maps = features.batch(batch.to(ctx.device))
    height, width = maps[features.names[0]].shape[2:]
    found = torch.cat([F.adaptive_avg_pool2d(maps[name].float(), (height, width)) for name in features.names], 1)
    cells = found.flatten(2).mT
    return (cells.mean(1, keepdim=True) if pool else cells).cpu()


def load(
    features: FeatureExtractor,
    paths: Sequence[Path],
    ctx: ComputeContext,
    request: Request,
    check_interrupt: Callable[[], None],
) -> Tensor:
    """Return the maps of photos, float16 (N, L, C), from the disk if they are there, else computed and kept.

    Where the disk refuses they are held in memory. DataError for a photo that cannot be read.
    """
    digest, about = _key(features, paths, ctx, request)
    path = data_root() / FOLDER / f"{digest}.npy"
    try:
        return _read(path)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError) as error:
        console.info(f"warning: {path}: {error}; computed again")
    made = _compute(features, paths, ctx, request, check_interrupt)
    try:
        _keep(path, made, about)
        return _read(path)
    except (CvlabError, OSError) as error:
        console.info(f"warning: the maps are not kept: {error}")
        return made


def _compute(
    features: FeatureExtractor,
    paths: Sequence[Path],
    ctx: ComputeContext,
    request: Request,
    check_interrupt: Callable[[], None],
) -> Tensor:
    made: Tensor | None = None
    with Progress("maps of photos", len(paths), 0) as progress:
        for start in range(0, len(paths), BATCH):
            some = paths[start : start + BATCH]
            views = [squeezed(photos.load(path), request.size_px, request.mirrored) for path in some]
            found = look(features, torch.stack(views), ctx, request.pool).half()
            if made is None:
                made = torch.empty(len(paths), *found.shape[1:], dtype=torch.float16)
            made[start : start + len(some)] = found
            check_interrupt()
            if progress.due():
                progress.update(start + len(some), some[-1].name)
    if made is None:
        raise DataError("no photo to look at")
    return made


def _key(
    features: FeatureExtractor, paths: Sequence[Path], ctx: ComputeContext, request: Request
) -> tuple[str, dict[str, Any]]:
    about = {
        "backbone": features.model.name,
        "weights": checkpoint.weights_digest(features.model.module.state_dict()),
        "layers": features.names,
        "size_px": request.size_px,
        "pool": request.pool,
        "mirrored": request.mirrored,
        "precision": ctx.precision,
        "photos": len(paths),
    }
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for path in paths:
        try:
            state = path.stat()
        except OSError as error:
            raise DataError(f"{path}: {error.strerror or error}", "put the photo back, or leave it out") from error
        digest.update(f"{path.name}\0{state.st_size}\0{state.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:24], about


def _keep(path: Path, made: Tensor, about: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(path, lambda file: np.save(file, made.numpy(), allow_pickle=False))
    atomic.write_text(path.with_suffix(".json"), json.dumps(about | {"sha256": _sha256(path)}, indent=1))


def _read(path: Path) -> Tensor:
    """Map a file into memory, once its checksum is right."""
    told = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    if _sha256(path) != told["sha256"]:
        raise ValueError("not what was written")
    # copy-on-write: torch wants memory that it may write to
    return torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
