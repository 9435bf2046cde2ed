"""Paint a photo in the manner of a picture: match the photo's features and the Gram matrices of the picture's.

Paper: Gatys, Ecker and Bethge, 2016, "Image style transfer using convolutional neural networks"; Gatys et al., 2017,
"Controlling perceptual factors in neural style transfer" (regions, colours, coarse to fine). Without a photo it is
texture synthesis (Gatys et al., 2015).
Differs: weights are relative, so that they mean the same for every net: each style layer starts at its weight, the
content loss is its weight where nothing is left of the photo but the mean. `scaling: absolute` is the papers' way.
Expect: of the written file, read back: `content_loss`, `style_loss`, `tv_loss`; `style_drop`, how many times lower the
style loss is than at the photo (or the noise); `ssim`, the structural similarity of its luminance with the photo's.
Command: cvlab style tubingen.jpg starry_night.jpg
"""

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le
from PIL import Image
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from cvlab.config import schema
from cvlab.data import photos, rng
from cvlab.engine import image_optimizer, memory
from cvlab.engine.device import ComputeContext
from cvlab.engine.image_optimizer import ImageState
from cvlab.engine.loop import Losses
from cvlab.errors import ConfigError
from cvlab.experiments.common import photo_batches
from cvlab.experiments.common.photo_batches import PretrainedConfig
from cvlab.experiments.style import targets
from cvlab.experiments.style.targets import Target, Targets, fitted
from cvlab.models.pretrained import PretrainedClassifier
from cvlab.ops import style
from cvlab.reports import images
from cvlab.runs.records import Row
from cvlab.runs.run_dir import RunDir

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


class Stylist:
    """What is done to the picture; `config` is that of the experiment `style`."""

    def __init__(self, config: Any, model: PretrainedClassifier, ctx: ComputeContext) -> None:
        self.config, self.model, self.ctx = config, model, ctx
        self.targets = Targets(config, model, ctx)
        self.content, self.layers = self.targets.content, self.targets.layers
        width, height = (config.size, config.size)
        if self.content is not None:
            width, height = fitted(self.content, config.size, config.side)
        self.scales = scales(width, height, None if config.scales == "auto" else config.scales, config.steps)
        adam = image_optimizer.adam(self._lr, lambda step: self.scale_at(step).start)
        self.move = adam if config.optimizer == "adam" else image_optimizer.lbfgs(config.lr)
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
        net = self.model.net
        return picture * net.scale[0] + net.shift[0] if self.config.space == "normalized" else picture

    def _decoded(self, values: Tensor) -> Tensor:
        net = self.model.net
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
        elif self.config.optimizer == "adam":  # L-BFGS would lose its curvature
            picture = picture.clamp(0, 1)
        size = (following.height, following.width)
        if picture.shape[1:] != size:
            picture = F.interpolate(picture[None], size=size, mode="bicubic", antialias=True)[0]
            pixels.memory = {}
        pixels.tensors[0] = picture

    @torch.no_grad()
    def image(self, values: Tensor) -> Image.Image:
        """Return the picture that values stand for, with the photo's colours where they are kept."""
        picture = self._decoded(values)
        photo = self.targets.photo(picture.shape[2], picture.shape[1])
        if self.config.keep_colors and photo is not None:
            picture = style.recolored(picture.clamp(0, 1), photo)
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


def keep_frame(out: RunDir, image: Image.Image, step: int) -> None:
    """Write a picture on the way, and as the preview that is always the newest."""
    (out.folder("images") / "frames").mkdir(exist_ok=True)
    data = images.png(image)
    out.write_bytes(f"images/frames/{step:06d}.png", data)
    out.write_bytes("images/preview.png", data)


ANIMATION_PX = 384  # longer side


LOSSES = ("content_loss", "style_loss", "tv_loss")


Side = Annotated[int, Ge(32), Le(8192)]


class Config(PretrainedConfig):
    """Which pictures, and how one is made of them."""

    content: str | None = Field(photos.SAMPLE, description="the photo; null: none, a texture is made")
    styles: tuple[str, ...] = Field(
        (photos.SAMPLE_PAINTING,), description=f"pictures whose style is taken; `{photos.SAMPLE_PAINTING}` comes along"
    )
    mix: tuple[schema.PositiveFloat, ...] | None = Field(
        None, description="a weight for each of the styles; null: equal"
    )
    masks: tuple[str, ...] = Field((), description="a mask of the photo for each style: where it is white")
    style_masks: tuple[str, ...] = Field((), description="for each mask, one of its style: where that is taken from")
    size: Side = Field(512, description="the picture's longer side in pixels")
    side: Literal["longer", "shorter"] = Field("longer", description="which side of a picture `size` speaks of")
    style_size: Side | None = Field(
        None, description="the same for the styles; null: as `size`. Larger: broader strokes"
    )
    scales: Annotated[int, Ge(1), Le(6)] | Literal["auto"] = Field(
        "auto", description="sizes to paint at, from coarse to fine, each twice the one before"
    )
    strength: schema.PositiveFloat = Field(1.0, description="all style weights are multiplied by it")
    keep_colors: bool = Field(False, description="paint in grey, then take over the photo's colours")
    init: Literal["content", "noise"] = Field("content", description="what painting starts from")
    style_layers: tuple[str, ...] | None = Field(None, description="names of modules; null: those of the net's family")
    content_layer: str | None = Field(None, description="the same for the photo")
    style_weights: tuple[schema.NonNegativeFloat, ...] | None = Field(
        None, description=f"one for each style layer; null: {targets.STYLE_WEIGHT:g} each"
    )
    content_weight: schema.NonNegativeFloat = Field(1000.0, description="weight of the content loss")
    tv_weight: schema.NonNegativeFloat = Field(15_000.0, description="weight of the squared differences of neighbours")
    scaling: Literal["relative", "absolute"] = Field("relative", description="what weights are multiplied by")
    space: Literal["pixels", "normalized"] = Field(
        "pixels", description="optimise pixels in [0, 1], or normalised as the net wants them"
    )
    optimizer: Literal["adam", "lbfgs"] = Field("adam", description="lbfgs keeps ten pictures and gradients")
    lr: schema.PositiveFloat = Field(0.05, description="length of Adam's steps; 1 is right for lbfgs")
    late_lr: schema.PositiveFloat = Field(0.01, description="adam: for the last tenth of a scale's steps")
    steps: Annotated[schema.PositiveInt, Le(100_000)] = Field(200, description="of all scales together")
    preview_every: schema.PositiveInt = Field(25, description="steps from one preview to the next")

    @field_validator("content")
    @classmethod
    def _absolute_content(cls, name: str | None) -> str | None:
        return photo_batches.absolute((name,))[0] if name is not None else None

    @field_validator("styles", "masks", "style_masks")
    @classmethod
    def _absolute_pictures(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return photo_batches.absolute(names) if names else names

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        several = len(self.styles) > 1
        if not self.styles:
            raise ValueError("give at least one style")
        if self.masks and several and len(self.masks) != len(self.styles):
            raise ValueError(f"{len(self.masks)} masks for {len(self.styles)} styles: give one mask for each")
        if self.style_masks and len(self.style_masks) != len(self.masks):
            raise ValueError(f"{len(self.style_masks)} style_masks for {len(self.masks)} masks: give one for each")
        if self.mix is not None and len(self.mix) != max(len(self.styles), len(self.masks)):
            raise ValueError(f"mix has {len(self.mix)} weights for {max(len(self.styles), len(self.masks))} styles")
        if self.content is None and (self.init == "content" or self.masks or self.keep_colors):
            raise ValueError("without a photo: init is noise, and there are neither masks nor keep_colors")
        if self.keep_colors and self.space == "normalized":
            raise ValueError("keep_colors goes with space: pixels")
        return self


def run(config: Config, out: RunDir) -> dict[str, float]:
    """Paint the picture."""
    stylist = prepare(config)
    job = image_optimizer.ImageOptimization(
        pixels=image_optimizer.ImageState([stylist.start()]),
        objective=stylist.objective,
        update=stylist.update,
        steps=config.steps,
        ctx=stylist.ctx,
        digest=config.digest(),
        frames=frozenset([*range(0, config.steps, config.preview_every), config.steps]),
        keep_frame=lambda step, pixels: keep_frame(out, stylist.image(pixels.tensors[0]), step),
    )
    last = image_optimizer.optimize_image(job, out, "style")
    image = stylist.image(job.pixels.tensors[0])
    out.write_bytes("images/style.png", images.png(image))
    found = stylist.judge(out.path / "images" / "style.png")
    made = show(config, stylist, out)
    row = {"image": "images/style.png", "content": config.content, "styles": list(config.styles), **found, **made}
    out.facts["results"] = [row]
    times = {name: last[name] for name in ("steps", "seconds_of_steps")}
    return {"width": image.width, "height": image.height, **found, **times}


def prepare(config: Config) -> Stylist:
    """Build what paints. ConfigError where the picture would not fit into the memory."""
    ctx, model = config.build()
    stylist = Stylist(config, model, ctx)
    stylist.require_memory()
    return stylist


def show(config: Config, stylist: Stylist, out: RunDir) -> Row:
    """Write the panel, and the way to the picture as an animation; return their names."""
    result = photos.load(out.path / "images" / "style.png")
    names = (
        ["style"]
        if len(stylist.targets.styles) == 1
        else [f"style {k + 1}" for k in range(len(stylist.targets.styles))]
    )
    tiles = [("content", stylist.content)] if stylist.content is not None else []
    tiles += [*zip(names, stylist.targets.styles, strict=True), ("result", result)]
    out.write_bytes("images/style-panel.png", images.png(images.panel(tiles)))
    frames = [photos.load(path) for path in sorted((out.path / "images" / "frames").glob("*.png"))]
    small = tuple(max(1, round(side * min(1, ANIMATION_PX / max(result.size)))) for side in result.size)
    out.write_bytes("images/style.gif", images.gif([frame.resize(small) for frame in frames]))  # type: ignore[arg-type]
    return {"panel": "images/style-panel.png", "animation": "images/style.gif"}


def metric_names(config: Config) -> set[str]:
    """Return the names that an expectation can speak of."""
    photo = {"ssim"} if config.content is not None else set()
    return {"width", "height", "loss", *LOSSES, "style_drop", "steps", "seconds_of_steps", *photo}


def plan(config: Config, base: Path) -> dict[str, Any]:
    """Say what a run would do. DataError for a picture that is not there, ConfigError for one that is too large."""
    stylist = prepare(config)
    last = stylist.scales[-1]
    return {
        "content": config.content,
        "styles": ", ".join(config.styles),
        "scales": ", ".join(f"{s.width} x {s.height} for {s.end - s.start} steps" for s in stylist.scales),
        "parameters": last.width * last.height * (1 if config.keep_colors else 3),
        "steps": config.steps,
        "memory_gb": round(stylist.bytes_needed() / 1e9, 2),
        "model": config.model,
        "style_layers": ", ".join(stylist.layers.style),
        "content_layer": stylist.layers.content if stylist.content is not None else None,
        **stylist.ctx.told(),
    }
