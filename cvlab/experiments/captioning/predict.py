"""Say in a sentence what photos show.

References: Xu et al., 2015, "Show, attend and tell".
Differences from the paper: the weights say by themselves what they are and know.
Metrics: `num_photos`, `mean_words`.
Command: cvlab caption photo.jpg
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge, Le
from pydantic import Field, field_validator

from cvlab.config import schema
from cvlab.config.metrics import Metric
from cvlab.engine import device
from cvlab.errors import ConfigError
from cvlab.experiments.base import Experiment
from cvlab.experiments.captioning import checkpoint, decoding, drawing, feature_store
from cvlab.experiments.captioning.checkpoint import Made
from cvlab.experiments.common import photo_batches, weights
from cvlab.experiments.common.photo_batches import ImagesConfig, Photo
from cvlab.reports import images
from cvlab.runs.results import Column, PhotoResult
from cvlab.runs.run_dir import RunDir


class CaptionConfig(ImagesConfig):
    """Which photos, which captioner, and how its sentences are found."""

    weights: str | None = Field(None, description="a run that trained a captioner, or its file; null: what comes along")
    beam: Annotated[int, Ge(1), Le(100)] = Field(5, description="sentences that are followed at once; 1 is greedy")
    alpha: schema.Fraction = Field(0.7, description="a sentence's score is divided by its length to this power")
    attention: bool = Field(False, description="also draw where it looks for each word")

    @field_validator("weights")
    @classmethod
    def _absolute_weights(cls, name: str | None) -> str | None:
        return weights.absolute(name)


COLUMNS = (Column("sentence", "caption"), Column("picture", "attention", is_file=True))


class Caption:
    """The work of a command on photos: a sentence for each, and where its words were seen."""

    def __init__(self, config: CaptionConfig, made: Made, ctx: device.ComputeContext, out: RunDir) -> None:
        self.config, self.made, self.ctx, self.out = config, made, ctx, out

    def __call__(self, batch: list[Photo], check_interrupt: Callable[[], None]) -> list[PhotoResult]:
        """Return for each photo its `sentence`, and the mean log-probability of its words as `score`."""
        check_interrupt()
        made, about = self.made, self.made.about
        squeezed = torch.stack([feature_store.squeezed(photo.image, about.size_px) for photo in batch])
        seen = feature_store.look(made.features, squeezed, self.ctx, not made.net.is_attending)
        seen = seen.to(self.ctx.device)
        with self.ctx.autocast():
            found = decoding.search(made.net, seen, self.config.beam, about.length - 1, self.config.alpha)
        rows = []
        for k, (photo, said) in enumerate(zip(batch, found, strict=True)):
            words = made.vocabulary.decode(said.words)
            row = PhotoResult(str(photo.path), {"sentence": " ".join(words), "score": said.score})
            if self.config.attention:
                row.files["picture"] = self._looks(photo, seen[k : k + 1], said.words, words)
            rows.append(row)
        return rows

    def _looks(self, photo: Photo, seen: torch.Tensor, numbers: tuple[int, ...], words: list[str]) -> str:
        looked = decoding.looks(self.made.net, seen, numbers)[: len(words)].float().cpu()
        side = round(looked.shape[1] ** 0.5)
        name = f"images/{photo.label}-attention.png"
        drawn = drawing.strip(photo.image, words, looked.view(-1, side, side))
        self.out.write_bytes(name, images.png(drawn))
        return name


def _open(config: CaptionConfig) -> tuple[device.ComputeContext, Made]:
    """Choose the device and read the captioner. ConfigError where it cannot show what is asked for."""
    ctx = device.select_device(config.device, config.precision, config.threads)
    name = config.weights or str(weights.BUNDLED_WEIGHTS / checkpoint.FILE)
    made = checkpoint.load(weights.resolve_weights_path(name, checkpoint.FILE, "captioner"), ctx.device)
    if config.attention and not made.net.is_attending:
        raise ConfigError(f"attention: a captioner with a cell {made.net.cell} looks nowhere in particular")
    return ctx, made


def _told(config: CaptionConfig, made: Made) -> str:
    which = config.weights or "the weights that come along"
    return f"{made.net.cell} ({which}): {len(made.vocabulary)} words, trained on {made.about.trained_on}"


class CaptionExperiment(Experiment[CaptionConfig]):
    """Say in a sentence what photos show."""

    name = "caption"
    Config = CaptionConfig
    metrics = (Metric("num_photos"), Metric("mean_words"))

    def run(self, config: CaptionConfig, run: RunDir) -> dict[str, float]:
        """Say a sentence about every photo."""
        ctx, made = _open(config)
        run.log(f"looking with {_told(config, made)}")
        if config.attention:
            run.folder("images")
        results = photo_batches.run(config, run, Caption(config, made, ctx, run), "caption", COLUMNS)
        num_words = sum(len(result.values["sentence"].split()) for result in results)
        return {"num_photos": len(results), "mean_words": num_words / len(results)}

    def plan(self, config: CaptionConfig, base: Path) -> dict[str, Any]:
        """Say what a run would do. DataError where the weights or all of the photos are not there."""
        ctx, made = _open(config)
        return {
            "photos": len(photo_batches.resolve_images(config.images)[1]),
            "captioner": _told(config, made),
            "parameters": sum(p.numel() for p in made.net.parameters()),
            **ctx.as_dict(),
        }
