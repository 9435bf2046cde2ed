"""Style transfer from coarse to fine: the losses of an image, the update of its pixels, the schedule of its sizes."""

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cvlab.data import photos, rng
from cvlab.engine import image_optimizer, memory
from cvlab.engine.device import ComputeContext
from cvlab.engine.image_optimizer import ImageState
from cvlab.engine.loop import Losses
from cvlab.errors import ConfigError
from cvlab.experiments.style.config import StyleConfig
from cvlab.experiments.style.feedforward import FeedForwardStyle
from cvlab.experiments.style.inputs import scaled_size
from cvlab.experiments.style.targets import LossTargets, TargetBuilder, resize_to_tensor
from cvlab.models.pretrained import PretrainedClassifier
from cvlab.ops import style

MAX_COARSEST_PX = 320  # longer side of the coarsest scale
COARSE_STEPS_RATIO = 1.5  # steps of a scale, relative to the next finer one
CHROMA_DIVISOR = 2  # size of the image relative to that of its chroma
CHROMA_UNIT = 0.3  # of the chroma values, so that a step of Adam changes colors less than the luminance
LATE_FRACTION = 0.9  # of a scale's steps, after which `late_lr` is used; 180 of 200 in EECS 498
CLAMP_NORMALIZED = 1.5  # standard deviations; EECS 498
CLAMP_FRACTION = 0.95  # of the steps, in which normalized pixels are clamped; 190 of 200 in EECS 498
MAX_MEMORY_FRACTION = 0.9  # of the free memory
STATE_BYTES_PER_PIXEL = 200  # three channels, their gradient, Adam's moments and temporary tensors


@dataclass(frozen=True)
class Scale:
    """A size of the image, optimized for the steps from `start` up to, and not including, `end`."""

    width: int
    height: int
    start: int
    end: int


def make_scales(width: int, height: int, num_scales: int | None, steps: int) -> list[Scale]:
    """Return the scales from coarse to fine, each half the size of the next.

    Args:
        width: Width of the finest scale in pixels.
        height: Height of the finest scale in pixels.
        num_scales: Number of scales; None: as many as it takes for the coarsest to have at most MAX_COARSEST_PX pixels
            on its longer side.
        steps: Number of steps of all scales together.
    """
    if num_scales is None:
        num_scales = 1 + max(0, math.ceil(math.log2(max(width, height) / MAX_COARSEST_PX)))
    num_scales = min(num_scales, steps)
    weights = [COARSE_STEPS_RATIO ** (num_scales - 1 - k) for k in range(num_scales)]
    ends = [max(k + 1, round(steps * sum(weights[: k + 1]) / sum(weights))) for k in range(num_scales)]
    divisors = [2 ** (num_scales - 1 - k) for k in range(num_scales)]
    return [
        Scale(max(1, round(width / divisor)), max(1, round(height / divisor)), start, end)
        for divisor, start, end in zip(divisors, [0, *ends], ends, strict=False)
    ]


class StyleTransfer:
    """The optimization of one image: its initial values, losses and update, and its evaluation.

    What is optimized are the image's "values", a list of tensors: by `space`, its luminance (1, H, W) and its chroma
    (2, H/2, W/2), or its pixels (3, H, W) in [0, 1], or those normalized as the model's input; only the luminance if
    `keep_colors` is set.
    """

    def __init__(self, config: StyleConfig, model: PretrainedClassifier, ctx: ComputeContext) -> None:
        self.config, self.model, self.ctx = config, model, ctx
        self.targets = TargetBuilder(config, model, ctx)
        self.content, self.layers = self.targets.content, self.targets.layers
        width, height = (config.size, config.size)
        if self.content is not None:
            width, height = scaled_size(self.content, config.size, config.side)
        self.scales = make_scales(width, height, None if config.scales == "auto" else config.scales, config.steps)
        self._adam = image_optimizer.adam(self._lr, lambda step: self.scale_at(step).start)
        self.target = functools.lru_cache(maxsize=1)(self._build_target)

    def scale_at(self, step: int) -> Scale:
        """Return the scale of a step."""
        return next((scale for scale in self.scales if step < scale.end), self.scales[-1])

    def _build_target(self, scale: Scale) -> LossTargets:
        return self.targets.build(scale.width, scale.height, scale.width / self.scales[-1].width)

    def num_parameters(self) -> int:
        """Return the number of values that are optimized at the finest scale."""
        finest = self.scales[-1]
        if self.config.keep_colors or self.config.space != "ycbcr":
            return finest.width * finest.height * (1 if self.config.keep_colors else 3)
        chroma_size = math.ceil(finest.width / CHROMA_DIVISOR) * math.ceil(finest.height / CHROMA_DIVISOR)
        return finest.width * finest.height + 2 * chroma_size

    def estimate_bytes(self) -> float:
        """Estimate the memory of a step at the finest scale, in bytes."""
        finest = self.scales[-1]
        activations = memory.estimate_activation_bytes(
            self.targets.features, self.model.module.parameters(), finest.height, finest.width, self.ctx.device
        )
        return activations + STATE_BYTES_PER_PIXEL * finest.width * finest.height

    def check_memory(self) -> None:
        """Raise ConfigError, with the size that fits, if a step needs more memory than is free."""
        needed, free = self.estimate_bytes(), memory.free_bytes(self.ctx.device)
        if free is not None and needed > MAX_MEMORY_FRACTION * free:
            size = int(self.config.size * math.sqrt(MAX_MEMORY_FRACTION * free / needed)) // 8 * 8
            raise ConfigError(
                f"size {self.config.size} needs about {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free",
                f"size={size} fits",
            )

    def initial_values(self) -> list[Tensor]:
        """Return the values that the optimization starts from, at the coarsest scale."""
        image = self.initial_image(self.scales[0])
        values = self._image_to_values(style.luminance(image) if self.config.keep_colors else image)
        return [self._resize(tensor, k, self.scales[0]) for k, tensor in enumerate(values)]

    def initial_image(self, scale: Scale) -> Tensor:
        """Return the content photo, its fast style transfer or uniform noise (3, H, W) at a scale, by `init`."""
        if self.config.init == "fast":
            return resize_to_tensor(self._fast_image, (scale.width, scale.height), self.ctx.device)
        content = self.targets.content_image(scale.width, scale.height)
        if self.config.init == "content" and content is not None:
            return content
        count = 3 * scale.height * scale.width
        noise = rng.uniform(self.config.seed, 0, torch.arange(count), "style").float()
        return noise.view(3, scale.height, scale.width).to(self.ctx.device)

    @functools.cached_property
    def _fast_image(self) -> Image.Image:
        """The content photo, stylized in one pass of a network, at the size of the finest scale."""
        assert self.content is not None  # as the configuration makes sure
        finest = self.scales[-1]
        photo = self.content.resize((finest.width, finest.height), Image.Resampling.LANCZOS)
        network = FeedForwardStyle(torch.get_num_threads())
        return network.stylize(photo, self.targets.styles, self.config.shares)

    def _image_to_values(self, image: Tensor) -> list[Tensor]:
        """Return the values of an image (3, H, W), the chroma at its full size, or of a luminance (1, H, W)."""
        module = self.model.module
        if self.config.space == "ycbcr" and len(image) == 3:
            return [style.luminance(image), style.chroma(image) / CHROMA_UNIT]
        return [image * module.scale[0] + module.shift[0] if self.config.space == "normalized" else image]

    def _values_to_image(self, values: list[Tensor]) -> Tensor:
        """Return the image (3, H, W), or its luminance (1, H, W), that the values stand for."""
        module = self.model.module
        if len(values) == 2:
            return style.ycbcr_to_rgb(values[0], CHROMA_UNIT * values[1])
        return (values[0] - module.shift[0]) / module.scale[0] if self.config.space == "normalized" else values[0]

    def losses(self, values: list[Tensor], target: LossTargets) -> Losses:
        """Return the weighted losses; the total variation is that of normalized values, else of the image."""
        image = self._values_to_image(values)
        features = self.targets.extract_features(image)
        layer_losses = [weight * target.style_loss(features, name) for name, weight in target.style_weights.items()]
        style_loss = torch.stack(layer_losses).sum()
        tv_loss = target.tv_weight * style.tv_loss(values[0] if self.config.space == "normalized" else image)
        content_loss = torch.zeros_like(tv_loss)
        if target.content_features is not None and target.content_weight:
            distance = style.content_loss(features[self.layers.content], target.content_features)
            content_loss = target.content_weight * distance
        total = content_loss + style_loss + tv_loss
        return {"loss": total, "content_loss": content_loss, "style_loss": style_loss, "tv_loss": tv_loss}

    def objective(self, state: ImageState) -> Losses:
        """Return the losses at the scale of the current step."""
        return self.losses(state.tensors, self.target(self.scale_at(state.step)))

    def _lr(self, step: int) -> float:
        scale = self.scale_at(step)
        is_late = step >= scale.start + LATE_FRACTION * (scale.end - scale.start)
        return float(self.config.late_lr if is_late else self.config.lr)

    def update(self, state: ImageState, gradients: list[Tensor]) -> None:
        """Take a step of Adam and clamp; after the last step of a scale, upsample and reset Adam's moments."""
        self._adam(state, gradients)
        values = [self._clamp(tensor, state.step) for tensor in state.tensors]
        resized = [self._resize(tensor, k, self.scale_at(state.step + 1)) for k, tensor in enumerate(values)]
        if resized[0].shape != values[0].shape:
            state.optimizer_state = {}
        state.tensors = resized

    def _clamp(self, values: Tensor, step: int) -> Tensor:
        if len(values) == 2:  # chroma
            return values.clamp(-0.5 / CHROMA_UNIT, 0.5 / CHROMA_UNIT)
        if self.config.space != "normalized":
            return values.clamp(0, 1)
        is_clamped = step < CLAMP_FRACTION * self.config.steps
        return values.clamp(-CLAMP_NORMALIZED, CLAMP_NORMALIZED) if is_clamped else values

    def _resize(self, values: Tensor, index: int, scale: Scale) -> Tensor:
        """Return the tensor of an index among the values at a scale; the second one is the chroma."""
        divisor = CHROMA_DIVISOR if index else 1
        size = (math.ceil(scale.height / divisor), math.ceil(scale.width / divisor))
        if values.shape[1:] == size:
            return values
        return F.interpolate(values[None], size=size, mode="bicubic", antialias=True)[0]

    @torch.no_grad()
    def to_image(self, values: list[Tensor]) -> Image.Image:
        """Return the values as an 8-bit image, with the colors of the photo if `keep_colors` is set."""
        image = self._values_to_image(values)
        content = self.targets.content_image(image.shape[2], image.shape[1])
        if self.config.keep_colors and content is not None:
            image = style.transfer_color(image.clamp(0, 1), content)
        return photos.to_image(image)

    @torch.no_grad()
    def evaluate(self, saved: Image.Image) -> dict[str, float]:
        """Return the losses of a saved image, the reduction of the style loss, and the SSIM with the photo."""
        image = photos.to_tensor(saved).to(self.ctx.device)
        finest = self.scales[-1]
        target = self.target(finest)
        metrics = {name: value.item() for name, value in self.losses(self._image_to_values(image), target).items()}
        initial = self.losses(self._image_to_values(self.initial_image(finest)), target)
        metrics["style_loss_reduction"] = float(initial["style_loss"]) / max(metrics["style_loss"], 1e-30)
        content = self.targets.content_image(finest.width, finest.height)
        if content is not None and min(image.shape[1:]) >= style.SSIM_WINDOW:
            metrics["ssim"] = style.ssim(style.luminance(image), style.luminance(content))
        return metrics


def prepare(config: StyleConfig) -> StyleTransfer:
    """Build the style transfer of a configuration. Raises ConfigError if it does not fit into memory."""
    ctx, model = config.build()
    transfer = StyleTransfer(config, model, ctx)
    transfer.check_memory()
    return transfer
