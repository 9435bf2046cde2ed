"""Feature inversion: reconstruct a photo from the features of each of several layers.

References:
    Mahendran and Vedaldi, 2015, "Understanding deep image representations by inverting them"; EECS 498, assignment 5
    (style transfer without a style, from uniform noise).

Differences from the papers:
    All layers are inverted in one run. The loss of a layer is relative to the variance of its features.

Metrics:
    `psnr_db/LAYER`: PSNR of the saved reconstruction from a layer; `psnr_db_first` and `psnr_db_last` of the first and
    the last layer.
    `largest_rise_db`: largest increase from a layer to the next.

Command:
    cvlab run configs/feature_inversion.yaml
"""

import itertools
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Le
from pydantic import Field, field_validator
from torch import Tensor

from cvlab.config import schema
from cvlab.config.metrics import Metric
from cvlab.data import photos, rng
from cvlab.engine import image_optimizer
from cvlab.engine.device import ComputeContext
from cvlab.engine.image_optimizer import ImageState
from cvlab.engine.loop import Losses
from cvlab.experiments.base import Experiment
from cvlab.experiments.common import photo_batches
from cvlab.experiments.common.photo_batches import PretrainedConfig
from cvlab.models.features import FeatureExtractor
from cvlab.models.pretrained import PretrainedClassifier
from cvlab.ops import style
from cvlab.reports import images
from cvlab.runs.results import Column, PhotoResult, summarize
from cvlab.runs.run_dir import RunDir

LATE = 0.9  # of the steps, from which on the learning rate is a fifth


COLUMNS = (
    Column("layer", "layer"),
    Column("psnr_db", "PSNR", "dB", is_detail=True),
    Column("panel", "panel", is_file=True),
)


class FeatureInversionConfig(PretrainedConfig):
    """Configuration of feature inversion."""

    image: str = Field(photos.SAMPLE, description="the photo to reconstruct")
    layers: tuple[str, ...] = Field(
        tuple(f"blocks.{k}" for k in range(7)), description="names of modules, from shallow to deep"
    )
    steps: Annotated[schema.PositiveInt, Le(100_000)] = Field(400, description="optimization steps")
    lr: schema.PositiveFloat = Field(0.05, description="learning rate of Adam")
    content_weight: schema.NonNegativeFloat = Field(
        1000.0, description="loss of an image that matches only the channel means of a layer"
    )
    tv_weight: schema.NonNegativeFloat = Field(
        300.0, description="weight of the total variation (mean squared difference of neighboring pixels)"
    )
    preview_every: schema.PositiveInt = Field(50, description="steps between previews")

    @field_validator("image")
    @classmethod
    def _absolute_image(cls, name: str) -> str:
        return photo_batches.absolute((name,))[0]

    @field_validator("layers")
    @classmethod
    def _some(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if not names or len(set(names)) != len(names):
            raise ValueError("name at least one layer, and each once")
        return names


class Inverter:
    """The photo as each of the layers sees it, and the losses of the pictures that are to be seen alike."""

    def __init__(self, config: FeatureInversionConfig, model: PretrainedClassifier, ctx: ComputeContext) -> None:
        self.config, self.ctx = config, ctx
        self.photo = model.transform(photos.load(photos.find_images([config.image])[0]))
        self.wanted = photos.to_tensor(self.photo).to(ctx.device)
        self.features = [FeatureExtractor(model, [name]) for name in config.layers]
        with torch.no_grad():
            self.seen = [self._look(k, self.wanted) for k in range(len(config.layers))]
        varied = [(seen - seen.mean((1, 2), keepdim=True)).square().sum() for seen in self.seen]
        self.factors = [config.content_weight / max(float(value), 1e-30) for value in varied]

    def _look(self, k: int, picture: Tensor) -> Tensor:
        with self.ctx.autocast():
            return self.features[k](picture)[self.config.layers[k]].float()

    def start(self) -> list[Tensor]:
        """Return uniform noise, the same for all layers."""
        noise = rng.uniform(self.config.seed, 0, torch.arange(self.wanted.numel()), "inversion").float()
        return [noise.view(self.wanted.shape).to(self.ctx.device) for _ in self.config.layers]

    def objective(self, pixels: ImageState) -> Losses:
        """Return the sum over the layers of the relative distances, and of the smoothness."""
        pairs = enumerate(pixels.tensors)
        content = torch.stack(
            [self.factors[k] * style.content_loss(self._look(k, picture), self.seen[k]) for k, picture in pairs]
        ).sum()
        size = self.wanted.shape[1] * self.wanted.shape[2]
        tv = self.config.tv_weight / size * torch.stack([style.tv_loss(p) for p in pixels.tensors]).sum()
        return {"loss": content + tv, "content_loss": content, "tv_loss": tv}

    def lr(self, step: int) -> float:
        """Return the learning rate of a step."""
        return self.config.lr * (0.2 if step >= LATE * self.config.steps else 1.0)


def judge(inverter: Inverter, pixels: ImageState, out: RunDir) -> list[PhotoResult]:
    """Write the pictures and a panel of them; return how near to the photo the files are."""
    rows, tiles = [], [("photo", inverter.photo)]
    for name, picture in zip(inverter.config.layers, pixels.tensors, strict=True):
        file = f"images/{name.replace('/', '_')}.png"
        out.write_bytes(file, images.png(photos.to_image(picture)))
        image = photos.load(out.path / file)
        found = style.psnr_db(photos.to_tensor(image), inverter.wanted.cpu())
        tiles.append((f"{name}: {found:.1f} dB", image))
        rows.append(PhotoResult(file, {"layer": name, "psnr_db": found}, {"panel": "images/panel.png"}))
    out.write_bytes("images/panel.png", images.png(images.panel(tiles)))
    return rows


class FeatureInversionExperiment(Experiment[FeatureInversionConfig]):
    """Feature inversion: reconstruct a photo from the features of each of several layers."""

    name = "feature_inversion"
    Config = FeatureInversionConfig
    metrics = (
        Metric("num_pictures"),
        Metric("steps"),
        Metric("seconds_of_steps", "s", "lower"),
        *(Metric(name, better="lower") for name in ("loss", "content_loss", "tv_loss")),
        Metric("psnr_db_first", "dB", "higher"),
        Metric("psnr_db_last", "dB", "higher"),
        Metric("largest_rise_db", "dB", "lower"),
        Metric("psnr_db/*", "dB", "higher"),
    )

    def run(self, config: FeatureInversionConfig, run: RunDir) -> dict[str, float]:
        """Invert all layers together."""
        ctx, model = config.build()
        inverter = Inverter(config, model, ctx)
        adam = image_optimizer.adam(inverter.lr)

        def update(pixels: ImageState, gradients: list[Tensor]) -> None:
            adam(pixels, gradients)
            pixels.tensors = [picture.clamp(0, 1) for picture in pixels.tensors]

        def keep_frame(step: int, pixels: ImageState) -> None:
            run.folder("images")
            shown = images.strip([photos.to_image(picture) for picture in pixels.tensors])
            run.write_bytes("images/preview.png", images.png(shown))

        job = image_optimizer.ImageOptimization(
            state=image_optimizer.ImageState(inverter.start()),
            objective=inverter.objective,
            update=update,
            steps=config.steps,
            ctx=ctx,
            config_digest=config.digest(),
            frame_steps=frozenset([*range(0, config.steps, config.preview_every), config.steps]),
            save_frame=keep_frame,
        )
        last = image_optimizer.optimize_image(job, run, "inversion")
        rows = judge(inverter, job.state, run)
        run.extra_summary |= summarize(rows, COLUMNS)
        found = [row.values["psnr_db"] for row in rows]
        rises = [later - earlier for earlier, later in itertools.pairwise(found)]
        by_layer = {f"psnr_db/{row.values['layer']}": row.values["psnr_db"] for row in rows}
        ends = {"psnr_db_first": found[0], "psnr_db_last": found[-1], "largest_rise_db": max(rises, default=0.0)}
        return {"num_pictures": len(rows), **by_layer, **ends, **last}

    def plan(self, config: FeatureInversionConfig, base: Path) -> dict[str, Any]:
        """Say what a run would do. ConfigError for a layer that is not there, DataError for such a photo."""
        ctx, model = config.build()
        inverter = Inverter(config, model, ctx)
        return {
            "image": config.image,
            "layers": ", ".join(config.layers),
            "parameters": inverter.wanted.numel() * len(config.layers),
            "steps": config.steps,
            "model": config.model,
            **ctx.as_dict(),
        }
