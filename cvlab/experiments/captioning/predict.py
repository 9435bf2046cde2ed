"""Caption photos with a trained captioner.

References: Xu et al., 2015, "Show, attend and tell".
Differences from the paper: the weights file names its backbone and holds its vocabulary.
Metrics: `num_photos`, `mean_words`.
Command: cvlab caption photo.jpg
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge, Le
from pydantic import Field, field_validator
from torch import Tensor

from cvlab.config import schema
from cvlab.config.metrics import Metric
from cvlab.engine import device
from cvlab.errors import ConfigError
from cvlab.experiments.base import PhotoExperiment
from cvlab.experiments.captioning import checkpoint, decoding, drawing, feature_store
from cvlab.experiments.captioning.checkpoint import LoadedCaptioner
from cvlab.experiments.captioning.decoding import Hypothesis
from cvlab.experiments.common import photo_batches, weights
from cvlab.experiments.common.photo_batches import Photo
from cvlab.experiments.common.photo_config import ImagesConfig
from cvlab.reports import images
from cvlab.runs.results import Column, PhotoResult
from cvlab.runs.run_dir import RunDir


class CaptionConfig(ImagesConfig):
    """Which photos, which captioner, and how captions are decoded."""

    weights: str | None = Field(
        None, description="a training run of a captioner, or its weights file; null: the bundled weights"
    )
    beam: Annotated[int, Ge(1), Le(100)] = Field(5, description="beam width; 1 is greedy decoding")
    alpha: schema.Fraction = Field(
        0.7, description="length normalization of beam search: scores are divided by length ** alpha"
    )
    attention: bool = Field(False, description="also draw the attention map of each word")

    @field_validator("weights")
    @classmethod
    def _absolute_weights(cls, name: str | None) -> str | None:
        return weights.absolute_weights_path(name)


COLUMNS = (Column("sentence", "caption"), Column("picture", "attention", is_file=True))


class CaptionPhotos:
    """Captions batches of photos and, if asked for, draws their attention maps into the run directory."""

    def __init__(
        self, config: CaptionConfig, captioner: LoadedCaptioner, ctx: device.ComputeContext, run: RunDir
    ) -> None:
        self.config, self.captioner, self.ctx, self.run = config, captioner, ctx, run

    def __call__(self, batch: list[Photo], check_interrupt: Callable[[], None]) -> list[PhotoResult]:
        """Return the `sentence` of each photo, and its length-normalized log-probability as `score`."""
        check_interrupt()
        captioner, metadata = self.captioner, self.captioner.metadata
        squares = torch.stack([feature_store.resize_square(photo.image, metadata.size_px) for photo in batch])
        features = feature_store.extract_features(
            captioner.feature_extractor, squares, self.ctx, not captioner.model.has_attention
        ).to(self.ctx.device)
        with self.ctx.autocast():
            hypotheses = decoding.beam_search(
                captioner.model, features, self.config.beam, metadata.max_length - 1, self.config.alpha
            )
        results = []
        for k, (photo, hypothesis) in enumerate(zip(batch, hypotheses, strict=True)):
            tokens = captioner.vocabulary.decode(hypothesis.token_ids)
            result = PhotoResult(str(photo.path), {"sentence": " ".join(tokens), "score": hypothesis.score})
            if self.config.attention:
                result.files["picture"] = self._draw_attention(photo, features[k : k + 1], hypothesis, tokens)
            results.append(result)
        return results

    def _draw_attention(self, photo: Photo, features: Tensor, hypothesis: Hypothesis, tokens: list[str]) -> str:
        """Draw the attention maps of a caption; return the name of the file in the run directory."""
        maps = decoding.attention_weights(self.captioner.model, features, hypothesis.token_ids)
        maps = maps[: len(tokens)].float().cpu()
        side = round(maps.shape[1] ** 0.5)
        name = f"images/{photo.label}-attention.png"
        sheet = drawing.attention_sheet(photo.image, tokens, maps.view(-1, side, side))
        self.run.write_bytes(name, images.png(sheet))
        return name


def _load_captioner(config: CaptionConfig) -> tuple[device.ComputeContext, LoadedCaptioner]:
    """Select the device and load the captioner. Raises ConfigError if attention is asked for and it has none."""
    ctx = device.select_device(config.device, config.precision, config.threads)
    name = config.weights or str(weights.BUNDLED_WEIGHTS / checkpoint.WEIGHTS_FILE)
    path = weights.resolve_weights_path(name, checkpoint.WEIGHTS_FILE, "captioner")
    captioner = checkpoint.load(path, ctx.device)
    if config.attention and not captioner.model.has_attention:
        raise ConfigError(
            f"attention: a captioner with cell {captioner.model.cell} has no attention weights",
            "leave attention out, or use a captioner with cell attention_lstm",
        )
    return ctx, captioner


def _describe(config: CaptionConfig, captioner: LoadedCaptioner) -> str:
    source = config.weights or "bundled weights"
    trained_on = captioner.metadata.trained_on
    return f"{captioner.model.cell} ({source}): {len(captioner.vocabulary)} words, trained on {trained_on}"


class CaptionExperiment(PhotoExperiment[CaptionConfig]):
    """Caption photos with a trained captioner."""

    name = "caption"
    Config = CaptionConfig
    columns = COLUMNS
    metrics = (Metric("num_photos"), Metric("mean_words"))

    def run(self, config: CaptionConfig, run: RunDir) -> dict[str, float]:
        """Caption every photo."""
        ctx, captioner = _load_captioner(config)
        run.log(f"captioning with {_describe(config, captioner)}")
        if config.attention:
            run.folder("images")
        results = photo_batches.run(config, run, CaptionPhotos(config, captioner, ctx, run), "caption", self.columns)
        num_words = sum(len(result.values["sentence"].split()) for result in results)
        return {"num_photos": len(results), "mean_words": num_words / len(results)}

    def plan(self, config: CaptionConfig, base: Path) -> dict[str, Any]:
        """Describe what a run would do. Raises DataError if the weights or all photos are missing."""
        ctx, captioner = _load_captioner(config)
        return {
            "photos": len(photo_batches.resolve_images(config.images)[1]),
            "captioner": _describe(config, captioner),
            "parameters": sum(p.numel() for p in captioner.model.parameters()),
            **ctx.as_dict(),
        }
