"""Classify photos with an ImageNet-pretrained model: the most likely classes and their probabilities.

References: Russakovsky et al., 2015, "ImageNet Large Scale Visual Recognition Challenge"; Tan and Le, 2019
(EfficientNet).
Metrics: `num_photos`, `mean_probability` of the predicted class.
Command: cvlab classify photo.jpg
"""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Le
from pydantic import Field

from cvlab.config import schema
from cvlab.config.metrics import Metric
from cvlab.data import photos
from cvlab.experiments.base import PhotoExperiment
from cvlab.experiments.common import photo_batches
from cvlab.experiments.common.photo_batches import Photo
from cvlab.experiments.common.photo_config import PhotoConfig
from cvlab.runs.results import Column, PhotoResult
from cvlab.runs.run_dir import RunDir


class ClassifyPhotosConfig(PhotoConfig):
    """Which photos, and which model."""

    top: Annotated[schema.PositiveInt, Le(1000)] = Field(5, description="number of classes to report for each photo")
    batch_size: schema.PositiveInt = Field(32, description="photos per forward pass")


COLUMNS = (Column("top", "prediction", has_lines=True),)


class ClassifyPhotosExperiment(PhotoExperiment[ClassifyPhotosConfig]):
    """Classify photos with an ImageNet-pretrained model: the most likely classes and their probabilities."""

    name = "classify_photos"
    Config = ClassifyPhotosConfig
    columns = COLUMNS
    metrics = (Metric("num_photos"), Metric("mean_probability", "fraction"))

    def run(self, config: ClassifyPhotosConfig, run: RunDir) -> dict[str, float]:
        """Classify all photos."""
        ctx, model = config.build()

        def classify(batch: list[Photo], check_interrupt: Callable[[], None]) -> list[PhotoResult]:
            images = torch.stack([photos.to_tensor(model.transform(photo.image)) for photo in batch])
            with torch.inference_mode():
                probabilities = model.probabilities(images.to(ctx.device))
            values, indices = probabilities.topk(min(config.top, probabilities.shape[1]))
            results = []
            for photo, scores, classes in zip(batch, values.tolist(), indices.tolist(), strict=True):
                predictions = [model.class_score(k, score) for k, score in zip(classes, scores, strict=True)]
                results.append(PhotoResult(str(photo.path), {**predictions[0], "top": predictions}))
            return results

        results = photo_batches.run(config, run, classify, "classify", self.columns)
        mean = statistics.fmean(result.values["score"] for result in results)
        return {"num_photos": len(results), "mean_probability": mean}

    def plan(self, config: ClassifyPhotosConfig, base: Path) -> dict[str, Any]:
        """Return what a run would do."""
        ctx, model = config.build()
        return photo_batches.plan(config, ctx, model)
