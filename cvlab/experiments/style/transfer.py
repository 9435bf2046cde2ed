"""Style transfer from coarse to fine: the losses of a picture, the update of its pixels, the sizes in between."""

import functools
import math
from dataclasses import dataclass
from pathlib import Path

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
from cvlab.experiments.style.targets import Target, Targets, fitted
from cvlab.models.pretrained import PretrainedClassifier
from cvlab.ops import style
from cvlab.runs.records import Row

COARSEST_PX = 320  # pictures up to this size need no coarser one
COARSE_SHARE = 1.5  # a scale has so many times the steps of the next finer one
LATE = 0.9  # of a scale's steps, from which on the learning rate is the late one: 180 of 200 in EECS 498
NORMALIZED_MOST, FREE_FROM = 1.5, 0.95  # EECS 498: clamped to so many deviations, until step 190 of 200
FREE_SHARE = 0.9  # of the free memory, that a picture may take
STATE_BYTES = 200  # for each pixel: three colours, their gradient, Adam's memory and what is computed on the way


@dataclass(frozen=True)
class Scale:
    """One of the sizes that a picture is painted at, for the steps from `start` up to `end`."""

    width: int
    height: int
    start: int
    end: int


def scales(width: int, height: int, count: int | None, steps: int) -> list[Scale]:
    """Return the sizes to paint at, each half of the next; `count` None: until the coarsest is small."""
    if count is None:
        count = 1 + max(0, math.ceil(math.log2(max(width, height) / COARSEST_PX)))
    count = min(count, steps)
    weights = [COARSE_SHARE ** (count - 1 - k) for k in range(count)]
    ends = [max(k + 1, round(steps * sum(weights[: k + 1]) / sum(weights))) for k in range(count)]
    halvings = [2 ** (count - 1 - k) for k in range(count)]
    return [
        Scale(max(1, round(width / by)), max(1, round(height / by)), start, end)
        for by, start, end in zip(halvings, [0, *ends], ends, strict=False)
    ]


class StyleTransfer:
    """What is done to the picture; `config` is that of the experiment `style`."""

    def __init__(self, config: StyleConfig, model: PretrainedClassifier, ctx: ComputeContext) -> None:
        self.config, self.model, self.ctx = config, model, ctx
        self.targets = Targets(config, model, ctx)
        self.content, self.layers = self.targets.content, self.targets.layers
        width, height = (config.size, config.size)
        if self.content is not None:
            width, height = fitted(self.content, config.size, config.side)
        self.scales = scales(width, height, None if config.scales == "auto" else config.scales, config.steps)
        self.move = image_optimizer.adam(self._lr, lambda step: self.scale_at(step).start)
        self.target = functools.lru_cache(maxsize=1)(self._target)

    def scale_at(self, step: int) -> Scale:
        """Return the scale that a step belongs to."""
        return next((scale for scale in self.scales if step < scale.end), self.scales[-1])

    def _target(self, scale: Scale) -> Target:
        return self.targets.at(scale.width, scale.height, scale.width / self.scales[-1].width)

    def bytes_needed(self) -> float:
        """Estimate the memory of a step at the largest size."""
        last = self.scales[-1]
        features = self.targets.features
        return features.bytes_for_gradient(last.height, last.width) + STATE_BYTES * last.width * last.height

    def require_memory(self) -> None:
        """Raise ConfigError, with the size that fits, where a step would take more memory than is free."""
        needed, free = self.bytes_needed(), memory.free_bytes(self.ctx.device)
        if free is not None and needed > FREE_SHARE * free:
            fits = int(self.config.size * math.sqrt(FREE_SHARE * free / needed)) // 8 * 8
            raise ConfigError(
                f"size {self.config.size} needs about {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free",
                f"size={fits} fits",
            )

    def start(self) -> Tensor:
        """Return what is optimised, as it starts: (3, H, W), or (1, H, W) where the photo's colours are kept."""
        picture = self.beginning(self.scales[0])
        picture = style.luminance(picture) if self.config.keep_colors else picture
        return self._encoded(picture)

    def beginning(self, scale: Scale) -> Tensor:
        """Return the picture that painting starts from, at the size of a scale."""
        photo = self.targets.photo(scale.width, scale.height)
        if self.config.init == "content" and photo is not None:
            return photo
        count = 3 * scale.height * scale.width
        noise = rng.uniform(self.config.seed, 0, torch.arange(count), "style").float()
        return noise.view(3, scale.height, scale.width).to(self.ctx.device)

    def _encoded(self, picture: Tensor) -> Tensor:
        net = self.model.module
        return picture * net.scale[0] + net.shift[0] if self.config.space == "normalized" else picture

    def _decoded(self, values: Tensor) -> Tensor:
        net = self.model.module
        return (values - net.shift[0]) / net.scale[0] if self.config.space == "normalized" else values

    def losses(self, values: Tensor, target: Target) -> Losses:
        """Return the losses of the picture that values stand for; smoothness is that of the values."""
        maps = self.targets.maps(self._decoded(values))
        parts = [factor * target.style_loss(maps, name) for name, factor in target.style_factors.items()]
        style_loss = torch.stack(parts).sum()
        tv_loss = target.tv_factor * style.tv_loss(values)
        content_loss = torch.zeros_like(tv_loss)
        if target.content is not None and target.content_factor:
            content_loss = target.content_factor * style.content_loss(maps[self.layers.content], target.content)
        total = content_loss + style_loss + tv_loss
        return {"loss": total, "content_loss": content_loss, "style_loss": style_loss, "tv_loss": tv_loss}

    def objective(self, pixels: ImageState) -> Losses:
        """Return the losses at the scale of the step."""
        return self.losses(pixels.tensors[0], self.target(self.scale_at(pixels.step)))

    def _lr(self, step: int) -> float:
        scale = self.scale_at(step)
        is_late = step >= scale.start + LATE * (scale.end - scale.start)
        return float(self.config.late_lr if is_late else self.config.lr)

    def update(self, pixels: ImageState, gradients: list[Tensor]) -> None:
        """Step, back to colours that exist; after the last step of a scale on to the next, with an empty memory."""
        self.move(pixels, gradients)
        following = self.scale_at(pixels.step + 1)
        picture = pixels.tensors[0]
        if self.config.space == "normalized":
            if pixels.step < FREE_FROM * self.config.steps:
                picture = picture.clamp(-NORMALIZED_MOST, NORMALIZED_MOST)
        else:
            picture = picture.clamp(0, 1)
        size = (following.height, following.width)
        if picture.shape[1:] != size:
            picture = F.interpolate(picture[None], size=size, mode="bicubic", antialias=True)[0]
            pixels.optimizer_state = {}
        pixels.tensors[0] = picture

    @torch.no_grad()
    def image(self, values: Tensor) -> Image.Image:
        """Return the picture that values stand for, with the photo's colours where they are kept."""
        picture = self._decoded(values)
        photo = self.targets.photo(picture.shape[2], picture.shape[1])
        if self.config.keep_colors and photo is not None:
            picture = style.transfer_color(picture.clamp(0, 1), photo)
        return photos.to_image(picture)

    @torch.no_grad()
    def judge(self, path: Path) -> Row:
        """Return the losses of a written file, how far the style's fell, and how like the photo it is."""
        read = photos.to_tensor(photos.load(path)).to(self.ctx.device)
        last = self.scales[-1]
        target = self.target(last)
        found = {name: value.item() for name, value in self.losses(self._encoded(read), target).items()}
        before = float(self.losses(self._encoded(self.beginning(last)), target)["style_loss"])
        found["style_drop"] = before / max(found["style_loss"], 1e-30)
        photo = self.targets.photo(last.width, last.height)
        if photo is not None and min(read.shape[1:]) >= style.SSIM_WINDOW:
            found["ssim"] = style.ssim(style.luminance(read), style.luminance(photo))
        return found


def prepare(config: StyleConfig) -> StyleTransfer:
    """Build what paints. ConfigError where the picture would not fit into the memory."""
    ctx, model = config.build()
    transfer = StyleTransfer(config, model, ctx)
    transfer.require_memory()
    return transfer
