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
from cvlab.experiments.base import PhotoExperiment
from cvlab.experiments.common import photo_config
from cvlab.experiments.common.photo_config import PretrainedConfig
from cvlab.models import pretrained
from cvlab.models.pretrained import PretrainedClassifier
from cvlab.ops import visualize
from cvlab.reports import images
from cvlab.runs.results import Column, PhotoResult, summarize
from cvlab.runs.run_dir import RunDir

PIXEL_NOISE_STD = 0.225  # of the initial noise around mid-gray; ImageNet's standard deviation
FOURIER_NOISE_STD = 0.01
BLUR_PROBABILITY = 0.7  # of a step
MIN_BLUR_SIGMA = 0.3  # pixels

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
    l2_weight: schema.NonNegativeFloat = Field(1e-4, description="weight of the squared distance from mid-gray")
    tv_weight: schema.NonNegativeFloat = Field(
        0.3, description="weight of the total variation (squared differences of neighboring pixels)"
    )
    jitter_px: schema.NonNegativeInt = Field(0, description="roll by up to N pixels before each step")
    rotate_degrees: Annotated[schema.NonNegativeFloat, Le(180)] = Field(30.0, description="rotate by up to N degrees")
    zoom: schema.FractionBelowOne = Field(0.4, description="scale by a factor of 1 - zoom to 1 + zoom")
    shift: schema.FractionBelowOne = Field(0.2, description="translate by up to this fraction of the side")
    blur: schema.NonNegativeFloat = Field(
        3.0, description="random Gaussian blur, its standard deviation from 0.3 to 0.3 + this, in pixels"
    )
    gray: schema.Fraction = Field(1.0, description="desaturate by up to this fraction")
    contrast: schema.Fraction = Field(0.6, description="reduce the contrast by up to this fraction")
    blur_every: schema.NonNegativeInt = Field(0, description="pixels: blur the image every N steps; 0: never")
    blur_sigma: schema.PositiveFloat = Field(0.5, description="pixels: standard deviation of that blur, in pixels")
    frames: Annotated[schema.PositiveInt, Le(200)] = Field(12, description="number of intermediate images to save")
    second_model: str | None = Field(None, description="a second model to evaluate the images with")
    second_weights: str | None = Field(None, description="file with its weights")

    @field_validator("targets")
    @classmethod
    def _check_targets(cls, targets: tuple[str, ...]) -> tuple[str, ...]:
        if not targets:
            raise ValueError("give at least one class")
        return targets

    @field_validator("images")
    @classmethod
    def _absolute_images(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return photo_config.absolute_image_paths(names) if names else names

    @model_validator(mode="after")
    def _check(self) -> "ClassVisualizationConfig":
        if self.octaves > 1 and self.parametrization == "pixels":
            raise ValueError("octaves go with parametrization: fourier")
        if self.blur_every and self.parametrization == "fourier":
            raise ValueError("blur_every goes with parametrization: pixels")
        if self.init == "image" and len(self.images) != 1:
            raise ValueError(f"init: image starts from exactly one photo, {len(self.images)} are named")
        return self


class ClassVisualizer:
    """The optimization of one image for each class: its initial values, losses and update, and its evaluation."""

    def __init__(
        self,
        config: ClassVisualizationConfig,
        model: PretrainedClassifier,
        ctx: ComputeContext,
        classes: list[int],
        run: RunDir,
    ) -> None:
        self.config, self.model, self.ctx, self.run = config, model, ctx, run
        self.classes = torch.tensor(classes, device=ctx.device)
        self.names = [f"{index}-{re.sub(r'[^a-zA-Z0-9]+', '_', model.classes[index])}" for index in classes]
        self.is_fourier = config.parametrization == "fourier"
        self._adam = image_optimizer.adam(lambda step: config.lr * (1 - step / config.steps))

    def initial_parameters(self) -> Tensor:
        """Return the initial Fourier coefficients or pixels of all images."""
        config, size = self.config, self.model.transform.size_px
        noise = rng.normal(config.seed, 0, parameter_shape(config, self.model), "classvis").to(self.ctx.device)
        if config.init == "image":
            photo = self.model.transform(photos.load(photos.find_images(config.images)[0]))
            pixels = photos.to_tensor(photo).to(self.ctx.device).expand(len(self.classes), 3, size, size)
            return visualize.images_to_spectrum(pixels) if self.is_fourier else pixels.clone()
        return noise * FOURIER_NOISE_STD if self.is_fourier else (0.5 + PIXEL_NOISE_STD * noise).clamp(0, 1)

    def _uniform(self, step: int, purpose: str) -> Callable[[int], Tensor]:
        return lambda count: rng.uniform(self.config.seed, step, torch.arange(count), f"classvis {purpose}").float()

    def _decode(self, state: ImageState) -> Tensor:
        """Return the images (N, 3, S, S) that the parameters stand for."""
        if not self.is_fourier:
            return state.tensors[0]
        octave = min(self.config.octaves - 1, state.step * self.config.octaves // self.config.steps)
        band = 2.0 ** (octave - self.config.octaves + 1)
        return visualize.spectrum_to_images(state.tensors[0], self.model.transform.size_px, band)

    def _augment(self, images: Tensor, step: int) -> Tensor:
        """Return the images after the random transformations of a step."""
        config = self.config
        if config.jitter_px:
            images = visualize.random_roll(images, self._uniform(step, "jitter"), config.jitter_px)
        if config.rotate_degrees or config.zoom or config.shift:
            limits = {"rotate_degrees": config.rotate_degrees, "zoom": config.zoom, "shift": config.shift}
            images = visualize.random_affine(images, self._uniform(step, "move"), **limits)
        choice, strength = self._uniform(step, "blur")(2).tolist()
        if config.blur and choice < BLUR_PROBABILITY:
            images = visualize.gaussian_blur(images, MIN_BLUR_SIGMA + strength * config.blur)
        if config.gray or config.contrast:
            uniform = self._uniform(step, "colour")  # codespell:ignore - names a stream of random numbers
            images = visualize.color_jitter(images, uniform, gray=config.gray, contrast=config.contrast)
        return images

    def objective(self, state: ImageState) -> Losses:
        """Return the loss: the negative logits of the classes for the transformed images, and the regularization."""
        config = self.config
        decoded = self._decode(state)
        augmented = self._augment(decoded, state.step)
        with self.ctx.autocast():
            logits = self.model.module(augmented.contiguous(memory_format=torch.channels_last)).float()
        target_logits = logits.gather(1, self.classes[:, None])[:, 0]
        loss = -target_logits.sum()
        if config.l2_weight:
            loss = loss + config.l2_weight * ((decoded - 0.5) / PIXEL_NOISE_STD).square().sum()
        if config.tv_weight:
            horizontal, vertical = decoded.diff(dim=3).square().sum(), decoded.diff(dim=2).square().sum()
            loss = loss + config.tv_weight * (horizontal + vertical)
        return {"loss": loss, "score": target_logits.detach().mean()}

    def update(self, state: ImageState, gradients: list[Tensor]) -> None:
        """Take a step of Adam on coefficients, or of a fixed L2 norm on pixels, which are clamped and blurred."""
        if self.is_fourier:
            self._adam(state, gradients)
            return
        norms = gradients[0].flatten(1).norm(dim=1).clamp(min=1e-20).view(-1, 1, 1, 1)
        pixels = (state.tensors[0] - self.config.lr * gradients[0] / norms).clamp_(0, 1)
        if self.config.blur_every and (state.step + 1) % self.config.blur_every == 0:
            pixels = visualize.gaussian_blur(pixels, self.config.blur_sigma)
        state.tensors[0] = pixels

    @torch.no_grad()
    def _to_images(self, state: ImageState) -> list[Image.Image]:
        return [photos.to_image(pixels) for pixels in self._decode(state)]

    def save_frames(self, step: int, state: ImageState) -> None:
        """Save the intermediate images, one file for each class."""
        folder = self.run.folder("images") / "frames"
        folder.mkdir(exist_ok=True)
        for name, image in zip(self.names, self._to_images(state), strict=True):
            self.run.write_bytes(f"images/frames/{name}-{step:06d}.png", images.png(image))

    def save_and_evaluate(self, state: ImageState) -> list[PhotoResult]:
        """Save the images, their strips of frames and animations; return the predictions for the saved files."""
        paths = [f"images/{name}.png" for name in self.names]
        for path, image in zip(paths, self._to_images(state), strict=True):
            self.run.write_bytes(path, images.png(image))
        probabilities = self.model.probabilities(self._load(paths)).cpu()
        results = []
        for name, path, p, index in zip(self.names, paths, probabilities, self.classes.tolist(), strict=True):
            values = self.model.class_score(int(p.argmax()), float(p.max()))
            values |= {"target": self.model.classes[index], "score_target": float(p[index])}
            results.append(PhotoResult(path, values, self._save_animation(name)))
        return results

    def _save_animation(self, name: str) -> dict[str, str]:
        """Save the frames of a class as a strip and as an animation; return their paths."""
        files = {"frames": f"images/{name}-frames.png", "animation": f"images/{name}.gif"}
        frames = [photos.load(path) for path in sorted((self.run.path / "images" / "frames").glob(f"{name}-*.png"))]
        self.run.write_bytes(files["frames"], images.png(images.strip(frames)))
        self.run.write_bytes(files["animation"], images.gif(frames))
        return files

    def _load(self, paths: list[str]) -> Tensor:
        return torch.stack([photos.to_tensor(photos.load(self.run.path / path)) for path in paths]).to(self.ctx.device)

    def evaluate_second(self, second: Callable[[Tensor], Tensor], results: list[PhotoResult]) -> None:
        """Add the second model's predicted class and the rank of the target, from 1, to the results."""
        probabilities = second(self._load([result.image for result in results])).cpu()
        for result, p, index in zip(results, probabilities, self.classes.tolist(), strict=True):
            result.values["second_label"] = self.model.classes[int(p.argmax())]
            result.values["second_rank"] = int((p > p[index]).sum()) + 1


def parameter_shape(config: ClassVisualizationConfig, model: PretrainedClassifier) -> tuple[int, ...]:
    """Return the shape of the optimized parameters of all images."""
    count, size = len(config.targets), model.transform.size_px
    return visualize.spectrum_shape(count, size) if config.parametrization == "fourier" else (count, 3, size, size)


def build_second_model(config: ClassVisualizationConfig, device: torch.device) -> Callable[[Tensor], Tensor] | None:
    """Return a function from images (N, 3, S, S) to the second model's probabilities, or None if none is named."""
    if config.second_model is None:
        return None
    second = pretrained.build(config.second_model, config.second_weights, device)
    size = second.transform.size_px

    def probabilities(images: Tensor) -> Tensor:
        resized = torch.nn.functional.interpolate(images, size=(size, size), mode="bicubic", antialias=True)
        return second.probabilities(resized.clamp(0, 1))

    return probabilities


class ClassVisualizationExperiment(PhotoExperiment[ClassVisualizationConfig]):
    """Class visualization: maximize the logit of a class by gradient ascent, starting from noise or from a photo."""

    name = "class_visualization"
    Config = ClassVisualizationConfig
    columns = COLUMNS
    metrics = (
        Metric("num_pictures"),
        Metric("probability", "fraction", "higher"),
        Metric("steps"),
        Metric("seconds_of_steps", "s", "lower"),
        Metric("loss", better="lower"),
        Metric("second_top5", "fraction", "higher", lambda config: config.second_model is not None),
    )

    def run(self, config: ClassVisualizationConfig, run: RunDir) -> dict[str, float]:
        """Optimize the images of all targets together."""
        ctx, model = config.build()
        visualizer = ClassVisualizer(config, model, ctx, [model.class_index(name) for name in config.targets], run)
        task = image_optimizer.ImageOptimization(
            state=image_optimizer.ImageState([visualizer.initial_parameters()]),
            objective=visualizer.objective,
            update=visualizer.update,
            steps=config.steps,
            ctx=ctx,
            config_digest=config.digest(),
            frame_steps=frozenset(round(k * config.steps / config.frames) for k in range(config.frames + 1)),
            save_frame=visualizer.save_frames,
        )
        losses = image_optimizer.optimize_image(task, run, "classvis")
        results = visualizer.save_and_evaluate(task.state)
        second = build_second_model(config, ctx.device)
        if second is not None:
            visualizer.evaluate_second(second, results)
        run.extra_summary |= summarize(results, self.columns)
        probability = min(result.values["score_target"] for result in results)
        metrics = {"num_pictures": len(results), "probability": probability, **losses}
        if second is not None:
            metrics["second_top5"] = sum(result.values["second_rank"] <= 5 for result in results) / len(results)
        return metrics

    def plan(self, config: ClassVisualizationConfig, base: Path) -> dict[str, Any]:
        """Return what a run would do. Raises ConfigError for an unknown class, DataError for a missing photo."""
        ctx, model = config.build()
        for name in config.targets:
            model.class_index(name)
        if config.init == "image":
            photos.load(photos.find_images(config.images)[0])
        build_second_model(config, ctx.device)
        shape = parameter_shape(config, model)
        return {
            "targets": ", ".join(model.classes[model.class_index(name)] for name in config.targets),
            "parameters": math.prod(shape),
            "steps": config.steps,
            "model": config.model,
            **ctx.as_dict(),
        }
