"""The images of class visualization: parameters, random transformations, objective, evaluation of the saved file."""

from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor

from cvlab.data import photo_paths, photos, rng
from cvlab.engine import image_optimizer
from cvlab.engine.device import ComputeContext
from cvlab.engine.image_optimizer import ImageState
from cvlab.engine.loop import Losses
from cvlab.errors import ConfigError
from cvlab.experiments.common import photo_config, saved_images
from cvlab.experiments.interpretability.config import ClassVisualizationConfig
from cvlab.experiments.interpretability.visualization_targets import ClassTargets, Similarity, Targets
from cvlab.models.pretrained import PretrainedClassifier
from cvlab.ops import visualize
from cvlab.reports import images
from cvlab.runs.results import PhotoResult, Row
from cvlab.runs.run_dir import RunDir

PIXEL_NOISE_STD = 0.225  # of the initial noise around mid-gray; ImageNet's standard deviation
FOURIER_NOISE_STD = 0.01
BLUR_PROBABILITY = 0.7  # of a step
MIN_BLUR_SIGMA = 0.3  # pixels
SATURATION_CELL_PX = 16


class ClassVisualizer:
    """The optimization of images for classes or channels: initial values, losses and update, and the evaluation."""

    def __init__(
        self,
        config: ClassVisualizationConfig,
        model: PretrainedClassifier,
        ctx: ComputeContext,
        targets: Targets,
        run: RunDir,
    ) -> None:
        self.config, self.model, self.ctx, self.targets, self.run = config, model, ctx, targets, run
        self.similarity = Similarity(config, model, targets.groups) if config.diversity > 1 else None
        self.is_fourier = config.parametrization == "fourier"
        self._adam = image_optimizer.adam(lambda step: config.lr * (1 - step / config.steps))

    def initial_parameters(self) -> Tensor:
        """Return the initial Fourier coefficients or pixels of all images."""
        config, size = self.config, self.model.transform.size_px
        noise = rng.normal(config.seed, 0, parameter_shape(config, self.model), "classvis").to(self.ctx.device)
        if config.init == "image":
            photo = self.model.transform(photos.load(photo_paths.find_images(config.images)[0]))
            pixels = photos.to_tensor(photo).to(self.ctx.device).expand(config.num_pictures, 3, size, size)
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
            is_padded = config.padding == "random"
            padding = self._uniform(step, "padding")(3 * len(images)).view(-1, 3) if is_padded else None
            images = visualize.random_affine(images, self._uniform(step, "move"), **limits, padding=padding)
        choice, strength = self._uniform(step, "blur")(2).tolist()
        if config.blur and choice < BLUR_PROBABILITY:
            images = visualize.gaussian_blur(images, MIN_BLUR_SIGMA + strength * config.blur)
        if config.gray or config.contrast:
            uniform = self._uniform(step, "colour")  # codespell:ignore - names a stream of random numbers
            images = visualize.color_jitter(images, uniform, gray=config.gray, contrast=config.contrast)
        return images

    def objective(self, state: ImageState) -> Losses:
        """Return the loss: the negative scores of the transformed images, their similarity, and the regularization."""
        config = self.config
        decoded = self._decode(state)
        augmented = self._augment(decoded, state.step)
        with self.ctx.autocast():
            scores = self.targets.scores(augmented)
        loss = -scores.sum()
        if self.similarity is not None and config.diversity_weight:
            with self.ctx.autocast():
                similarities = self.similarity(augmented)
            loss = loss + config.diversity_weight * similarities.sum() / (config.diversity - 1)
        if config.l2_weight:
            loss = loss + config.l2_weight * ((decoded - 0.5) / PIXEL_NOISE_STD).square().sum()
        if config.tv_weight:
            horizontal, vertical = decoded.diff(dim=3).square().sum(), decoded.diff(dim=2).square().sum()
            loss = loss + config.tv_weight * (horizontal + vertical)
        if config.saturation_weight:
            grayness = visualize.saturation_loss(decoded, config.saturation, SATURATION_CELL_PX)
            loss = loss + config.saturation_weight * grayness
        return {"loss": loss, "score": scores.detach().mean()}

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
        for name, image in zip(self.targets.names, self._to_images(state), strict=True):
            saved_images.save_frame(self.run, f"{name}-", step, images.png(image))

    def save_and_evaluate(self, state: ImageState) -> list[PhotoResult]:
        """Save the images, their strips of frames and animations, and a grid of them; return the results.

        What the results say is computed from the saved files.
        """
        paths = [f"images/{name}.png" for name in self.targets.names]
        for path, image in zip(paths, self._to_images(state), strict=True):
            self.run.write_bytes(path, images.png(image))
        rows = self.targets.describe(self._load(paths))
        files = {}
        if self.config.channel is not None or self.config.diversity > 1:
            files = {"grid": self._save_grid(paths, rows)}
        return [
            PhotoResult(path, values, {**self._save_animation(name, title), **files})
            for name, title, path, values in zip(self.targets.names, self.targets.titles, paths, rows, strict=True)
        ]

    def _save_grid(self, paths: list[str], rows: list[Row]) -> str:
        """Save all images in one; return its path."""
        tiles = []
        for title, path, values in zip(self.targets.titles, paths, rows, strict=True):
            number = f"response {values['response']:.2g}" if "response" in values else f"{values['score_target']:.2f}"
            tiles.append((f"{title}: {number}", saved_images.load(self.run, path)))
        title = f"{self.config.channel or 'class visualization'} of {self.config.model}"
        self.run.write_bytes("images/grid.png", images.png(images.panel(tiles, title)))
        return "images/grid.png"

    @torch.no_grad()
    def measure_diversity(self, results: list[PhotoResult]) -> float:
        """Return 1 minus the mean similarity of the saved images of one target."""
        assert self.similarity is not None
        return 1 - float(self.similarity(self._load([result.image for result in results])).mean())

    def _save_animation(self, name: str, title: str) -> dict[str, str]:
        """Save the frames of an image as a sheet and as an animation; return their paths."""
        files = {"frames": f"images/{name}-frames.png", "animation": f"images/{name}.gif"}
        frames = saved_images.load_frames(self.run, f"{name}-")
        title = f"class visualization of {title} by {self.config.model}"
        self.run.write_bytes(files["frames"], images.png(images.frames_sheet(title, frames)))
        self.run.write_bytes(files["animation"], images.gif([image for _, image in frames]))
        return files

    def _load(self, paths: list[str]) -> Tensor:
        return torch.stack([photos.to_tensor(saved_images.load(self.run, path)) for path in paths]).to(self.ctx.device)

    def evaluate_second(self, second: Callable[[Tensor], Tensor], results: list[PhotoResult]) -> None:
        """Add the second model's predicted class and the rank of the target, from 1, to the results."""
        assert isinstance(self.targets, ClassTargets)
        probabilities = second(self._load([result.image for result in results])).cpu()
        for result, p, index in zip(results, probabilities, self.targets.classes.tolist(), strict=True):
            result.values["second_label"] = self.model.classes[int(p.argmax())]
            result.values["second_rank"] = int((p > p[index]).sum()) + 1


def parameter_shape(config: ClassVisualizationConfig, model: PretrainedClassifier) -> tuple[int, ...]:
    """Return the shape of the optimized parameters of all images."""
    count, size = config.num_pictures, model.transform.size_px
    return visualize.spectrum_shape(count, size) if config.parametrization == "fourier" else (count, 3, size, size)


def build_second_model(
    config: ClassVisualizationConfig, model: PretrainedClassifier, device: torch.device
) -> Callable[[Tensor], Tensor] | None:
    """Return a function from images (N, 3, S, S) to the second model's probabilities, or None if none is named.

    Raises:
        ConfigError: The second model has other classes than the first one.
    """
    if config.second_model is None:
        return None
    second = photo_config.build_model(config.second_model, config.second_weights, device)
    if second.classes != model.classes:
        raise ConfigError(
            f"second_model {second.name} has other classes than {model.name}",
            "name a model that was trained on the same classes",
        )
    size = second.transform.size_px

    def probabilities(images: Tensor) -> Tensor:
        resized = torch.nn.functional.interpolate(images, size=(size, size), mode="bicubic", antialias=True)
        return second.probabilities(resized.clamp(0, 1))

    return probabilities
