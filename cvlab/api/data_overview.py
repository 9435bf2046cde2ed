"""`cvlab data show`: look at a data set before training; `cvlab embed`: features of photos and their neighbors."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cvlab import registry
from cvlab.config.loading import Loaded
from cvlab.data import photo_paths
from cvlab.data.resolve import DownloadPolicy
from cvlab.errors import ConfigError
from cvlab.experiments.base import ShowsData
from cvlab.experiments.common import data_overview, embedding
from cvlab.models import pretrained
from cvlab.reports import html, images
from cvlab.runs.records import to_json_value
from cvlab.storage import atomic

FILES = ("samples.png", "data.json", "data.html")


def show(loaded: Loaded, policy: DownloadPolicy, out: Path | None, num_samples: int) -> dict[str, Any]:
    """Write a sheet of samples, the numbers about a data set, and a page with both.

    Args:
        loaded: A configuration with a data set.
        policy: What may be done about data that is missing.
        out: The folder to write to; None for `data-NAME` in the current folder.
        num_samples: Number of training images that are shown.

    Returns:
        The numbers, and the paths of the files.

    Raises:
        ConfigError: The experiment has no data set.
        DataError: The data set cannot be read.
    """
    experiment = registry.get_experiment(loaded.config.experiment)
    if not isinstance(experiment, ShowsData):
        raise ConfigError(f"{loaded.config.experiment} has no data set to show", "give a configuration that trains")
    config = experiment.prepare(loaded, policy)
    overview = experiment.data_overview(config, loaded.base, num_samples)
    document = data_overview.describe(overview, data_overview.find_near_copies(overview))
    folder = out or Path(f"data-{loaded.config.name}")
    picture = images.png(data_overview.sheet(overview))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise atomic.disk_error(folder, error, "choose another folder with --out") from error
    atomic.write(folder / FILES[0], lambda file: file.write(picture))
    atomic.write_text(folder / FILES[1], json.dumps(to_json_value(document), indent=2))
    atomic.write_text(folder / FILES[2], html.data_page(document, picture))
    return {"ok": True, **document, "files": [str(folder / name) for name in FILES]}


def embed(
    names: Sequence[str], model: str, weights: str | None, out: Path | None, query: str | None, count: int
) -> dict[str, Any]:
    """Compute the features of photos, write them, and find the nearest ones of a photo.

    Args:
        names: Files, folders and patterns.
        model: A pretrained model.
        weights: File with its weights; None for those on this machine.
        out: An `.npz` file for `features`, float32 (N, F) of unit length, and `files`, (N,); None for no file.
        query: The photo whose neighbors are wanted, or None.
        count: How many neighbors.

    Returns:
        Number of photos and features, the file, and the neighbors with their cosine similarity.

    Raises:
        DataError: No photo can be read.
    """
    embedder = embedding.build(pretrained.build(model, weights))
    paths, features = embedding.embed_files(embedder, photo_paths.find_images(names))
    document: dict[str, Any] = {"ok": True, "photos": len(paths), "features": features.shape[1]}
    if out is not None:
        buffer = io.BytesIO()
        np.savez(buffer, features=features.numpy(), files=np.array([str(path) for path in paths]))
        atomic.write(out, lambda file: file.write(buffer.getvalue()))
        document["file"] = str(out)
    if query is not None:
        (query_path,), query_features = embedding.embed_files(embedder, photo_paths.find_images([query])[:1])
        pairs = embedding.nearest(features, query_features[0], count + 1)
        others = [(paths[k], similarity) for k, similarity in pairs if paths[k].resolve() != query_path.resolve()]
        document["nearest"] = [{"image": str(path), "similarity": similarity} for path, similarity in others[:count]]
    return document
