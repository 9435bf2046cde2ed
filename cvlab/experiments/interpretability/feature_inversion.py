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
from cvlab.experiments.base import PhotoExperiment
from cvlab.experiments.common import photo_config
from cvlab.experiments.common.photo_config import PretrainedConfig
from cvlab.models.features import FeatureExtractor
from cvlab.models.pretrained import PretrainedClassifier
from cvlab.ops import style
from cvlab.reports import images
from cvlab.runs.results import Column, PhotoResult, summarize
from cvlab.runs.run_dir import RunDir

LATE_FRACTION = 0.9  # of the steps, after which the learning rate is reduced
LATE_LR_FACTOR = 0.2

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
        return photo_config.absolute_image_paths((name,))[0]

    @field_validator("layers")
    @classmethod
    def _check_layers(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if not names or len(set(names)) != len(names):
            raise ValueError("name at least one layer, and each once")
        return names


class FeatureInverter:
    """The features of the photo at each layer, and the losses of the images that are to reproduce them."""

    def __init__(self, config: FeatureInversionConfig, model: PretrainedClassifier, ctx: ComputeContext) -> None:
        self.config, self.ctx = config, ctx
        self.photo = model.transform(photos.load(photos.find_images([config.image])[0]))
        self.photo_pixels = photos.to_tensor(self.photo).to(ctx.device)  # (3, S, S) in [0, 1]
        self.extractors = [FeatureExtractor(model, [name]) for name in config.layers]
        with torch.no_grad():
            self.targets = [self._extract_features(k, self.photo_pixels) for k in range(len(config.layers))]
        variations = [(target - target.mean((1, 2), keepdim=True)).square().sum() for target in self.targets]
        self.layer_weights = [config.content_weight / max(float(variation), 1e-30) for variation in variations]
        self._adam = image_optimizer.adam(self._lr)

    def _extract_features(self, k: int, pixels: Tensor) -> Tensor:
        """Return the features (C, h, w) of an image at layer number `k`."""
        with self.ctx.autocast():
            return self.extractors[k](pixels)[self.config.layers[k]].float()

    def initial_pixels(self) -> list[Tensor]:
        """Return uniform noise, the same for each layer."""
        noise = rng.uniform(self.config.seed, 0, torch.arange(self.photo_pixels.numel()), "inversion").float()
        return [noise.view(self.photo_pixels.shape).to(self.ctx.device) for _ in self.config.layers]

    def objective(self, state: ImageState) -> Losses:
        """Return the feature distances and the total variation, summed over the layers' images."""
        distances = [
            self.layer_weights[k] * style.content_loss(self._extract_features(k, pixels), self.targets[k])
            for k, pixels in enumerate(state.tensors)
        ]
        content_loss = torch.stack(distances).sum()
        num_pixels = self.photo_pixels.shape[1] * self.photo_pixels.shape[2]
        variations = torch.stack([style.tv_loss(pixels) for pixels in state.tensors])
        tv_loss = self.config.tv_weight / num_pixels * variations.sum()
        return {"loss": content_loss + tv_loss, "content_loss": content_loss, "tv_loss": tv_loss}

    def update(self, state: ImageState, gradients: list[Tensor]) -> None:
        """Take a step of Adam and clamp the pixels."""
        self._adam(state, gradients)
        state.tensors = [pixels.clamp(0, 1) for pixels in state.tensors]

    def _lr(self, step: int) -> float:
        return self.config.lr * (LATE_LR_FACTOR if step >= LATE_FRACTION * self.config.steps else 1.0)


def save_preview(run: RunDir, state: ImageState) -> None:
    """Save the intermediate images side by side."""
    run.folder("images")
    strip = images.strip([photos.to_image(pixels) for pixels in state.tensors])
    run.write_bytes("images/preview.png", images.png(strip))


def save_and_evaluate(inverter: FeatureInverter, state: ImageState, run: RunDir) -> list[PhotoResult]:
    """Save the images and a panel of them; return the PSNR of the saved files."""
    results, tiles = [], [("photo", inverter.photo)]
    for layer, pixels in zip(inverter.config.layers, state.tensors, strict=True):
        path = f"images/{layer.replace('/', '_')}.png"
        run.write_bytes(path, images.png(photos.to_image(pixels)))
        image = photos.load(run.path / path)
        psnr_db = style.psnr_db(photos.to_tensor(image), inverter.photo_pixels.cpu())
        tiles.append((f"{layer}: {psnr_db:.1f} dB", image))
        results.append(PhotoResult(path, {"layer": layer, "psnr_db": psnr_db}, {"panel": "images/panel.png"}))
    run.write_bytes("images/panel.png", images.png(images.panel(tiles)))
    return results


class FeatureInversionExperiment(PhotoExperiment[FeatureInversionConfig]):
    """Feature inversion: reconstruct a photo from the features of each of several layers."""

    name = "feature_inversion"
    Config = FeatureInversionConfig
    columns = COLUMNS
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
        """Optimize the images of all layers together."""
        ctx, model = config.build()
        inverter = FeatureInverter(config, model, ctx)
        task = image_optimizer.ImageOptimization(
            state=image_optimizer.ImageState(inverter.initial_pixels()),
            objective=inverter.objective,
            update=inverter.update,
            steps=config.steps,
            ctx=ctx,
            config_digest=config.digest(),
            frame_steps=frozenset([*range(0, config.steps, config.preview_every), config.steps]),
            save_frame=lambda _step, state: save_preview(run, state),
        )
        losses = image_optimizer.optimize_image(task, run, "inversion")
        results = save_and_evaluate(inverter, task.state, run)
        run.extra_summary |= summarize(results, self.columns)
        psnrs = [result.values["psnr_db"] for result in results]
        rises = [deeper - shallower for shallower, deeper in itertools.pairwise(psnrs)]
        by_layer = {f"psnr_db/{result.values['layer']}": result.values["psnr_db"] for result in results}
        ends = {"psnr_db_first": psnrs[0], "psnr_db_last": psnrs[-1], "largest_rise_db": max(rises, default=0.0)}
        return {"num_pictures": len(results), **by_layer, **ends, **losses}

    def plan(self, config: FeatureInversionConfig, base: Path) -> dict[str, Any]:
        """Return what a run would do. Raises ConfigError for an unknown layer, DataError for a missing photo."""
        ctx, model = config.build()
        inverter = FeatureInverter(config, model, ctx)
        return {
            "image": config.image,
            "layers": ", ".join(config.layers),
            "parameters": inverter.photo_pixels.numel() * len(config.layers),
            "steps": config.steps,
            "model": config.model,
            **ctx.as_dict(),
        }
