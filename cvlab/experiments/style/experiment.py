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

from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le
from pydantic import Field, field_validator, model_validator

from cvlab.config import schema
from cvlab.data import photos
from cvlab.engine import image_optimizer, loop
from cvlab.experiments.common import photo_batches
from cvlab.experiments.common.photo_batches import NetConfig
from cvlab.experiments.style import targets, transfer
from cvlab.experiments.style.transfer import Stylist
from cvlab.reports import images
from cvlab.runs.run_dir import Row, RunDir

ANIMATION_PX = 384  # longer side
LOSSES = ("content_loss", "style_loss", "tv_loss")
Side = Annotated[int, Ge(32), Le(8192)]


class Config(NetConfig):
    """Which pictures, and how one is made of them."""

    content: str | None = Field(photos.SAMPLE, description="the photo; null: none, a texture is made")
    styles: tuple[str, ...] = Field(
        (photos.PAINTING,), description=f"pictures whose style is taken; `{photos.PAINTING}` comes along"
    )
    mix: tuple[schema.Positive, ...] | None = Field(None, description="a weight for each of the styles; null: equal")
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
    strength: schema.Positive = Field(1.0, description="all style weights are multiplied by it")
    keep_colors: bool = Field(False, description="paint in grey, then take over the photo's colours")
    init: Literal["content", "noise"] = Field("content", description="what painting starts from")
    style_layers: tuple[str, ...] | None = Field(None, description="names of modules; null: those of the net's family")
    content_layer: str | None = Field(None, description="the same for the photo")
    style_weights: tuple[schema.NonNegative, ...] | None = Field(
        None, description=f"one for each style layer; null: {targets.STYLE_WEIGHT:g} each"
    )
    content_weight: schema.NonNegative = Field(1000.0, description="weight of the content loss")
    tv_weight: schema.NonNegative = Field(15_000.0, description="weight of the squared differences of neighbours")
    scaling: Literal["relative", "absolute"] = Field("relative", description="what weights are multiplied by")
    space: Literal["pixels", "normalized"] = Field(
        "pixels", description="optimise pixels in [0, 1], or normalised as the net wants them"
    )
    optimizer: Literal["adam", "lbfgs"] = Field("adam", description="lbfgs keeps ten pictures and gradients")
    lr: schema.Positive = Field(0.05, description="length of Adam's steps; 1 is right for lbfgs")
    late_lr: schema.Positive = Field(0.01, description="adam: for the last tenth of a scale's steps")
    steps: Annotated[schema.Count, Le(100_000)] = Field(200, description="of all scales together")
    preview_every: schema.Count = Field(25, description="steps from one preview to the next")

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
    job = image_optimizer.Painting(
        pixels=loop.Pixels([stylist.start()]),
        objective=stylist.objective,
        update=stylist.update,
        steps=config.steps,
        where=stylist.where,
        digest=config.digest(),
        frames=frozenset([*range(0, config.steps, config.preview_every), config.steps]),
        keep_frame=lambda step, pixels: transfer.keep_frame(out, stylist.image(pixels.tensors[0]), step),
    )
    last = image_optimizer.paint(job, out, "style")
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
    where, model = config.build()
    stylist = Stylist(config, model, where)
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
        **stylist.where.told(),
    }
