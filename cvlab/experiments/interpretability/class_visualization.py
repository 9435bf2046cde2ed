"""Class visualization: maximize the logit of a class by gradient ascent, starting from noise or from a photo.

References:
    Simonyan et al., 2014, section 2; Yosinski et al., 2015 (jitter and blur); Olah et al., 2017 (Fourier coefficients,
    transformation robustness).

Differences from the papers:
    The saved 8-bit image is read back and evaluated, by a second model too if `second_model` names one.

Metrics:
    `probability`: lowest probability of a target class in its saved image.
    `second_top5`: fraction of the images that have their target in the top 5 of the second model.

Command:
    cvlab classvis --target gorilla
"""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Le
from PIL import Image
from pydantic import Field, field_validator, model_validator
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
from cvlab.models import pretrained
from cvlab.models.pretrained import PretrainedClassifier
from cvlab.ops import visualize
from cvlab.reports import images
from cvlab.runs.results import Column, PhotoResult, summarize
from cvlab.runs.run_dir import RunDir

START_DEVIATION = 0.225  # of noise around mid-grey: that of ImageNet's colours
START_FOURIER = 0.01
BLURRED_SHARE = 0.7  # of the steps, where there is a blur


COLUMNS = (
    Column("label", "prediction"),
    Column("second_label", "second model"),
    Column("frames", "frames", is_file=True),
    Column("animation", "animation", is_file=True),
)


class ClassVisualizationConfig(PretrainedConfig):
    """Configuration of class visualization: the classes, the parametrization, the regularization."""

    targets: tuple[str, ...] = Field(("gorilla",), description="classes to visualize, one image each")
    init: Literal["noise", "image"] = Field("noise", description="start from noise or from the photo in `images`")
    images: tuple[str, ...] = Field((), description="with init: image, the photo to start from")
    parametrization: Literal["fourier", "pixels"] = Field(
        "fourier", description="what is optimized: decorrelated Fourier coefficients, or the pixels"
    )
    steps: Annotated[schema.PositiveInt, Le(100_000)] = Field(384, description="optimization steps")
    lr: schema.PositiveFloat = Field(0.02, description="fourier: learning rate of Adam; pixels: L2 norm of a step")
    octaves: Annotated[schema.PositiveInt, Le(8)] = Field(
        1, description="fourier: number of frequency bands, added from coarse to fine"
    )
    l2: schema.NonNegativeFloat = Field(1e-4, description="weight of the squared distance from mid-gray")
    tv: schema.NonNegativeFloat = Field(
        0.3, description="weight of the total variation (squared differences of neighboring pixels)"
    )
    jitter_px: schema.NonNegativeInt = Field(0, description="roll by up to N pixels before each step")
    turn_degrees: Annotated[schema.NonNegativeFloat, Le(180)] = Field(30.0, description="rotate by up to N degrees")
    zoom: schema.FractionBelowOne = Field(0.4, description="scale by a factor of 1 - zoom to 1 + zoom")
    shift: schema.FractionBelowOne = Field(0.2, description="translate by up to this fraction of the side")
    blur: schema.NonNegativeFloat = Field(
        3.0, description="random Gaussian blur, its standard deviation from 0.3 to 0.3 + this, in pixels"
    )
    grey: schema.Fraction = Field(1.0, description="desaturate by up to this fraction")
    contrast: schema.Fraction = Field(0.6, description="reduce the contrast by up to this fraction")
    blur_every: schema.NonNegativeInt = Field(0, description="pixels: blur the image every N steps; 0: never")
    blur_sigma: schema.PositiveFloat = Field(0.5, description="pixels: standard deviation of that blur, in pixels")
    frames: Annotated[schema.PositiveInt, Le(200)] = Field(12, description="number of intermediate images to save")
    second_model: str | None = Field(None, description="a second model to evaluate the images with")
    second_weights: str | None = Field(None, description="file with its weights")

    @field_validator("targets")
    @classmethod
    def _some(cls, targets: tuple[str, ...]) -> tuple[str, ...]:
        if not targets:
            raise ValueError("give at least one class")
        return targets

    @field_validator("images")
    @classmethod
    def _absolute_images(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return photo_batches.absolute(names) if names else names

    @model_validator(mode="after")
    def _fits(self) -> "ClassVisualizationConfig":
        if self.octaves > 1 and self.parametrization == "pixels":
            raise ValueError("octaves go with parametrization: fourier")
        if self.blur_every and self.parametrization == "fourier":
            raise ValueError("blur_every goes with parametrization: pixels")
        if self.init == "image" and len(self.images) != 1:
            raise ValueError(f"init: image starts from exactly one photo, {len(self.images)} are named")
        return self


class Easel:
    """What is done to the pictures; `config` is that of the experiment `class_visualization`."""

    def __init__(
        self,
        config: ClassVisualizationConfig,
        model: PretrainedClassifier,
        ctx: ComputeContext,
        classes: list[int],
        out: RunDir,
    ) -> None:
        self.config, self.model, self.ctx, self.out = config, model, ctx, out
        self.classes = torch.tensor(classes, device=ctx.device)
        self.names = [f"{index}-{re.sub(r'[^a-zA-Z0-9]+', '_', model.classes[index])}" for index in classes]
        self.is_fourier = config.parametrization == "fourier"
        self.adam = image_optimizer.adam(lambda step: config.lr * (1 - step / config.steps))

    def start(self) -> Tensor:
        """Return what the optimisation starts from: coefficients or pixels."""
        config, size = self.config, self.model.transform.size_px
        noise = rng.normal(config.seed, 0, parameter_shape(config, self.model), "classvis").to(self.ctx.device)
        if config.init == "image":
            view = self.model.transform(photos.load(photos.find_images(config.images)[0]))
            pixels = photos.to_tensor(view).to(self.ctx.device).expand(len(self.classes), 3, size, size)
            return visualize.images_to_spectrum(pixels) if self.is_fourier else pixels.clone()
        return noise * START_FOURIER if self.is_fourier else (0.5 + START_DEVIATION * noise).clamp(0, 1)

    def _uniform(self, step: int, use: str) -> Callable[[int], Tensor]:
        return lambda count: rng.uniform(self.config.seed, step, torch.arange(count), f"classvis {use}").float()

    def _decoded(self, pixels: ImageState) -> Tensor:
        if not self.is_fourier:
            return pixels.tensors[0]
        octave = min(self.config.octaves - 1, pixels.step * self.config.octaves // self.config.steps)
        band = 2.0 ** (octave - self.config.octaves + 1)
        return visualize.spectrum_to_images(pixels.tensors[0], self.model.transform.size_px, band)

    def objective(self, pixels: ImageState) -> Losses:
        """Return the loss: minus the classes' scores, of the pictures as they are seen through random movements."""
        config, step = self.config, pixels.step
        drawn = self._decoded(pixels)
        seen = drawn
        if config.jitter_px:
            seen = visualize.random_roll(seen, self._uniform(step, "jitter"), config.jitter_px)
        if config.turn_degrees or config.zoom or config.shift:
            limits = {"rotate_degrees": config.turn_degrees, "zoom": config.zoom, "shift": config.shift}
            seen = visualize.random_affine(seen, self._uniform(step, "move"), **limits)
        blurs, by = self._uniform(step, "blur")(2).tolist()
        if config.blur and blurs < BLURRED_SHARE:
            seen = visualize.gaussian_blur(seen, 0.3 + by * config.blur)
        if config.grey or config.contrast:
            colour = self._uniform(step, "colour")
            seen = visualize.color_jitter(seen, colour, gray=config.grey, contrast=config.contrast)
        with self.ctx.autocast():
            scores = self.model.module(seen.contiguous(memory_format=torch.channels_last)).float()
        picked = scores.gather(1, self.classes[:, None])[:, 0]
        loss = -picked.sum()
        if config.l2:
            loss = loss + config.l2 * ((drawn - 0.5) / START_DEVIATION).square().sum()
        if config.tv:
            across, down = drawn.diff(dim=3).square().sum(), drawn.diff(dim=2).square().sum()
            loss = loss + config.tv * (across + down)
        return {"loss": loss, "score": picked.detach().mean()}

    def update(self, pixels: ImageState, gradients: list[Tensor]) -> None:
        """Step: Adam on coefficients; on pixels a step of fixed length, into [0, 1], blurred now and then."""
        if self.is_fourier:
            self.adam(pixels, gradients)
            return
        norms = gradients[0].flatten(1).norm(dim=1).clamp(min=1e-20).view(-1, 1, 1, 1)
        moved = (pixels.tensors[0] - self.config.lr * gradients[0] / norms).clamp_(0, 1)
        if self.config.blur_every and (pixels.step + 1) % self.config.blur_every == 0:
            moved = visualize.gaussian_blur(moved, self.config.blur_sigma)
        pixels.tensors[0] = moved

    @torch.no_grad()
    def _images(self, pixels: ImageState) -> list[Image.Image]:
        return [photos.to_image(picture) for picture in self._decoded(pixels)]

    def keep_frame(self, step: int, pixels: ImageState) -> None:
        """Write the pictures as they are, a file each."""
        folder = self.out.folder("images") / "frames"
        folder.mkdir(exist_ok=True)
        for name, image in zip(self.names, self._images(pixels), strict=True):
            self.out.write_bytes(f"images/frames/{name}-{step:06d}.png", images.png(image))

    def finish(self, pixels: ImageState) -> list[PhotoResult]:
        """Write the pictures, their strips and animations; return how the files are classified."""
        files = [f"images/{name}.png" for name in self.names]
        for file, image in zip(files, self._images(pixels), strict=True):
            self.out.write_bytes(file, images.png(image))
        probabilities = self.model.probabilities(self._read(files)).cpu()
        rows = []
        for name, file, p, index in zip(self.names, files, probabilities, self.classes.tolist(), strict=True):
            frames = [photos.load(path) for path in sorted((self.out.path / "images" / "frames").glob(f"{name}-*.png"))]
            self.out.write_bytes(f"images/{name}-frames.png", images.png(images.strip(frames)))
            self.out.write_bytes(f"images/{name}.gif", images.gif(frames))
            values = self.model.class_score(int(p.argmax()), float(p.max()))
            values |= {"target": self.model.classes[index], "score_target": float(p[index])}
            strips = {"frames": f"images/{name}-frames.png", "animation": f"images/{name}.gif"}
            rows.append(PhotoResult(file, values, strips))
        return rows

    def _read(self, files: list[str]) -> Tensor:
        return torch.stack([photos.to_tensor(photos.load(self.out.path / file)) for file in files]).to(self.ctx.device)

    def ask(self, second: Callable[[Tensor], Tensor], rows: list[PhotoResult]) -> None:
        """Add to the results what a second net sees in the files: its top class, and the target's rank from 1."""
        probabilities = second(self._read([row.image for row in rows])).cpu()
        for row, p, index in zip(rows, probabilities, self.classes.tolist(), strict=True):
            row.values["second_label"] = self.model.classes[int(p.argmax())]
            row.values["second_rank"] = int((p > p[index]).sum()) + 1


def parameter_shape(config: ClassVisualizationConfig, model: PretrainedClassifier) -> tuple[int, ...]:
    """Return the shape of what is optimised."""
    count, size = len(config.targets), model.transform.size_px
    return visualize.spectrum_shape(count, size) if config.parametrization == "fourier" else (count, 3, size, size)


def second_judge(config: ClassVisualizationConfig, device: torch.device) -> Callable[[Tensor], Tensor] | None:
    """Return what gives the second net's probabilities of photos (N, 3, S, S), None where none is named."""
    if config.second_model is None:
        return None
    second = pretrained.build(config.second_model, config.second_weights, device)
    size = second.transform.size_px

    def probabilities(pictures: Tensor) -> Tensor:
        resized = torch.nn.functional.interpolate(pictures, size=(size, size), mode="bicubic", antialias=True)
        return second.probabilities(resized.clamp(0, 1))

    return probabilities


class ClassVisualizationExperiment(Experiment[ClassVisualizationConfig]):
    """Class visualization: maximize the logit of a class by gradient ascent, starting from noise or from a photo."""

    name = "class_visualization"
    Config = ClassVisualizationConfig
    metrics = (
        Metric("num_pictures"),
        Metric("probability", "fraction", "higher"),
        Metric("steps"),
        Metric("seconds_of_steps", "s", "lower"),
        Metric("loss", better="lower"),
        Metric("second_top5", "fraction", "higher", lambda config: config.second_model is not None),
    )

    def run(self, config: ClassVisualizationConfig, run: RunDir) -> dict[str, float]:
        """Draw all targets together."""
        ctx, model = config.build()
        easel = Easel(config, model, ctx, [model.class_index(name) for name in config.targets], run)
        job = image_optimizer.ImageOptimization(
            state=image_optimizer.ImageState([easel.start()]),
            objective=easel.objective,
            update=easel.update,
            steps=config.steps,
            ctx=ctx,
            config_digest=config.digest(),
            frame_steps=frozenset(round(k * config.steps / config.frames) for k in range(config.frames + 1)),
            save_frame=easel.keep_frame,
        )
        last = image_optimizer.optimize_image(job, run, "classvis")
        rows = easel.finish(job.state)
        second = second_judge(config, ctx.device)
        if second is not None:
            easel.ask(second, rows)
        run.extra_summary |= summarize(rows, COLUMNS)
        found = {"num_pictures": len(rows), "probability": min(row.values["score_target"] for row in rows), **last}
        if second is not None:
            found["second_top5"] = sum(row.values["second_rank"] <= 5 for row in rows) / len(rows)
        return found

    def plan(self, config: ClassVisualizationConfig, base: Path) -> dict[str, Any]:
        """Say what a run would do. ConfigError where there is no such class, DataError where there is no such photo."""
        ctx, model = config.build()
        for name in config.targets:
            model.class_index(name)
        if config.init == "image":
            photos.load(photos.find_images(config.images)[0])
        second_judge(config, ctx.device)
        shape = parameter_shape(config, model)
        return {
            "targets": ", ".join(model.classes[model.class_index(name)] for name in config.targets),
            "parameters": math.prod(shape),
            "steps": config.steps,
            "model": config.model,
            **ctx.as_dict(),
        }
