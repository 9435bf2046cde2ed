"""DeepDream: change photos so that a layer of a network responds more strongly, from coarse to fine."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cvlab.data import photos, rng
from cvlab.engine import image_optimizer
from cvlab.engine.device import ComputeContext
from cvlab.engine.image_optimizer import ImageState
from cvlab.engine.loop import Losses
from cvlab.errors import ConfigError
from cvlab.experiments.common import saved_images
from cvlab.experiments.common.photo_batches import CheckInterrupt, Photo
from cvlab.experiments.interpretability.config import DreamConfig, split_layer
from cvlab.models import backbone, features
from cvlab.models.features import FeatureExtractor
from cvlab.models.pretrained import PretrainedClassifier
from cvlab.ops import visualize
from cvlab.reports import images
from cvlab.runs.results import PhotoResult
from cvlab.runs.run_dir import RunDir

DEFAULT_STRIDE = 16  # in pixels; deep enough for parts of objects, fine enough for many of them
MIN_OCTAVE_PX = 48  # shorter side; a coarser image has too few pixels for the patterns of a deep layer


def octave_sizes(width: int, height: int, octaves: int, scale: float) -> list[tuple[int, int]]:
    """Return the width and height of each octave, from coarse to fine.

    Octaves whose shorter side has less than MIN_OCTAVE_PX pixels are left out, but never the last one.
    """
    factors = [scale**-k for k in reversed(range(octaves))]
    sizes = [(max(1, round(width * factor)), max(1, round(height * factor))) for factor in factors]
    return [size for size in sizes[:-1] if min(size) >= MIN_OCTAVE_PX] + sizes[-1:]


def reduce_photo(photo: Image.Image, size_px: int) -> Image.Image:
    """Return a photo whose longer side has at most `size_px` pixels; it is not enlarged."""
    factor = min(1.0, size_px / max(photo.size))
    width, height = (max(1, round(side * factor)) for side in photo.size)
    return photo.resize((width, height), Image.Resampling.LANCZOS) if factor < 1 else photo


class Dreamer:
    """Dreams of photos, one after the other, and saves the results."""

    def __init__(self, config: DreamConfig, model: PretrainedClassifier, ctx: ComputeContext, run: RunDir) -> None:
        self.config, self.ctx, self.run = config, ctx, run
        self.extractor, self.channel = build_extractor(config.layer, model, ctx)
        self.layer = config.layer or self.extractor.names[0]

    def __call__(self, batch: list[Photo], check_interrupt: CheckInterrupt) -> list[PhotoResult]:
        """Return one result for each photo; a photo that is too small for the layer has an error instead."""
        results = []
        for photo in batch:
            try:
                results.append(self._dream_and_save(photo, check_interrupt))
            except ConfigError as error:
                self.run.log(f"warning: {photo.path.name}: {error.message}")
                results.append(PhotoResult(str(photo.path), error=f"{photo.path.name}: {error.message}"))
        return results

    def dream(self, photo: Tensor, check_interrupt: CheckInterrupt) -> Tensor:
        """Return the dream of a photo.

        Args:
            photo: (3, H, W) in [0, 1].
            check_interrupt: Called before each step.

        Returns:
            pixels (3, H, W) in [0, 1].
        """
        config = self.config
        sizes = octave_sizes(photo.shape[2], photo.shape[1], config.octaves, config.octave_scale)
        done, total = 0, config.steps * sum(width * height for width, height in sizes)
        detail = torch.zeros_like(photo)  # what the octaves so far have added to the photo
        for octave, size in enumerate(sizes):
            reduced = _resize(photo, size)
            state = ImageState([(reduced + _resize(detail, size)).clamp(0, 1)])
            for step in range(config.steps):
                check_interrupt(f"octave {octave + 1} of {len(sizes)}, step {step + 1}", done / total)
                next(self._steps(state, octave * config.steps + step))
                done += size[0] * size[1]
            detail = state.tensors[0] - reduced
        return state.tensors[0]

    def _steps(self, state: ImageState, step: int) -> Iterator[Losses]:
        """Yield after each step of gradient ascent on an image, which is rolled by a random offset of this step."""
        uniform = rng.uniform(self.config.seed, step, torch.arange(2), "dream")

        def objective(state: ImageState) -> Losses:
            rolled = visualize.random_roll(state.tensors[0][None], lambda _: uniform, self.config.jitter_px)
            return {"loss": -self.response(rolled)}

        return image_optimizer.optimization_steps(state, objective, self._update)

    def response(self, inputs: Tensor) -> Tensor:
        """Return how strongly the layer responds to images (1, 3, H, W) in [0, 1]: what is maximized.

        For a whole layer it is the mean square of its features, for a channel the mean of its activations.
        """
        with self.ctx.autocast():
            output = self.extractor.batch(inputs)[self.extractor.names[0]].float()
        return output.square().mean() if self.channel is None else output[:, self.channel].mean()

    def _update(self, state: ImageState, gradients: list[Tensor]) -> None:
        """Add the gradient, smoothed and normalized, so that a step has the same size in each octave."""
        gradient = -gradients[0]
        if self.config.smoothing:
            gradient = visualize.multiscale_blur(gradient, self.config.smoothing)
        step = self.config.lr * gradient / gradient.abs().mean().clamp(min=1e-30)
        state.tensors = [(state.tensors[0] + step).clamp(0, 1)]

    def _dream_and_save(self, photo: Photo, check_interrupt: CheckInterrupt) -> PhotoResult:
        """Save the dream of a photo, read it back and evaluate it."""
        reduced = reduce_photo(photo.image, self.config.size)
        pixels = photos.to_tensor(reduced).to(self.ctx.device)
        dream = self.dream(pixels, check_interrupt)
        files = {"dream": f"images/{photo.label}-dream.png", "panel": f"images/{photo.label}-panel.png"}
        self.run.write_bytes(files["dream"], images.png(photos.to_image(dream), photos.read_metadata(photo.path)))
        saved = saved_images.load(self.run, files["dream"])
        with torch.inference_mode():
            before = float(self.response(pixels[None]))
            after = float(self.response(photos.to_tensor(saved).to(self.ctx.device)[None]))
        tiles = [("photo", reduced), (f"dream of {self.layer}", saved)]
        panel = images.panel(tiles, f"dream: {photo.path.name}")
        self.run.write_bytes(files["panel"], images.png(panel))
        values = {
            "layer": self.layer,
            "width": saved.width,
            "height": saved.height,
            "response_before": before,
            "response_after": after,
        }
        return PhotoResult(str(photo.path), values, files)


def default_layer(model: PretrainedClassifier) -> str:
    """Return the last layer of stride 16, or of the largest stride below it. ConfigError if there is none."""
    try:
        layers = backbone.LAYERS_BY_STRIDE.get(model.name) or features.last_layer_by_stride(model)
    except (AssertionError, RuntimeError, ValueError):  # the model does not take images of 224 pixels
        layers = {}
    strides = [stride for stride in layers if stride <= DEFAULT_STRIDE]
    if not strides:
        raise ConfigError(f"{model.name}: its feature maps are not known", "name a layer: --layer LAYER")
    return layers[max(strides)]


def build_extractor(
    layer: str | None, model: PretrainedClassifier, ctx: ComputeContext
) -> tuple[FeatureExtractor, int | None]:
    """Return the features of a layer, by default `default_layer`, and the channel if it is given as LAYER:CHANNEL.

    Raises:
        ConfigError: The model has no such layer or channel, the layer gives no feature maps, or the model takes images
            of one size only.
    """
    name, channel = split_layer(layer or default_layer(model))
    extractor = FeatureExtractor(model, [name])
    size_px = model.transform.size_px
    with torch.inference_mode():
        num_channels = extractor.batch(torch.full((1, 3, size_px, size_px), 0.5, device=ctx.device))[name].shape[1]
        try:
            extractor.batch(torch.full((1, 3, size_px + 32, size_px + 64), 0.5, device=ctx.device))
        except (AssertionError, RuntimeError, ValueError, ConfigError) as error:
            raise ConfigError(
                f"layer {name!r} of {model.name}: computed for images of {size_px} x {size_px} pixels only",
                "name a convolutional model, or a layer before its linear ones",
            ) from error
    if channel is not None and channel >= num_channels:
        raise ConfigError(f"layer {name!r} has no channel {channel}", f"its channels are 0 to {num_channels - 1}")
    return extractor, channel


def _resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Return an image (3, H, W), resized to a width and height; values may leave [0, 1] a little."""
    width, height = size
    if image.shape[1:] == (height, width):
        return image
    is_smaller = width < image.shape[2]
    return F.interpolate(image[None], (height, width), mode="bicubic", antialias=is_smaller, align_corners=False)[0]
