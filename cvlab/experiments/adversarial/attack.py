"""Adversarial attacks on photos: optimize, save as PNG, evaluate the saved file, continue until it fools the model.

References:
    Szegedy et al., 2014, "Intriguing properties of neural networks" (l2); Goodfellow et al., 2015 (fgsm); Madry et
    al., 2018 (pgd).

Differences from the papers:
    The resize to the model's input is part of the computation graph, so attacks work at the photo's own resolution.
    Success is measured on the saved 8-bit PNG after reading it back.

Metrics:
    `fooled`: success rate over the photos that were not classified as the target before.
    `steps`, `l2` (of the model's input), `l2_photo`, `linf_255`, `psnr_db`: medians over those photos.
    `fooled_jpeg95`, `fooled_jpeg85`, `fooled_jpeg75`: success rates after JPEG compression of that quality.

Command:
    cvlab attack --target ostrich img.jpg
"""

import io
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Le
from PIL import Image
from pydantic import Field, model_validator
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
from cvlab.experiments.common.photo_batches import Photo, PhotoConfig
from cvlab.models.pretrained import PretrainedClassifier
from cvlab.ops import attacks, saliency
from cvlab.ops.resample import DifferentiableResize, EvalTransform, build_resize
from cvlab.reports import images
from cvlab.runs.records import Row
from cvlab.runs.results import Column, PhotoResult
from cvlab.runs.run_dir import RunDir

JPEG_QUALITIES = (95, 85, 75)
MEDIANS = ("steps", "l2", "l2_photo", "linf_255", "psnr_db")
DIFFERENCE_TIMES = 10
DEFAULT_EPS = 8.0
COLUMNS = (
    Column("before", "before"),
    Column("label", "after"),
    Column("fooled", "success"),
    Column("steps", "steps"),
    Column("l2", "L2"),
    Column("linf_255", "largest change", "1/255", is_detail=True),
    Column("psnr_db", "PSNR", "dB", is_detail=True),
    Column(
        "jpeg",
        f"success as JPEG {', '.join(map(str, JPEG_QUALITIES))}",
        keys=tuple(f"fooled_jpeg{quality}" for quality in JPEG_QUALITIES),
        is_detail=True,
    ),
    Column("attacked", "attacked photo", is_file=True),
    Column("panel", "panel", is_file=True),
    Column("saliency", "saliency", is_file=True),
)


class AttackConfig(PhotoConfig):
    """Configuration of an attack: the photos, the target class, the method."""

    target: str | None = Field(None, description="target class; null: any class but the predicted one")
    method: Literal["l2", "fgsm", "pgd"] = Field(
        "l2",
        description="gradient steps of a fixed L2 norm, or one step (fgsm) or many (pgd) within an L-infinity bound",
    )
    size: Literal["original", "model"] = Field(
        "original", description="attack the photo at its own resolution, or the square crop that is the model's input"
    )
    steps: Annotated[schema.PositiveInt, Le(10_000)] = Field(100, description="l2, pgd: maximum number of steps")
    extra_steps: schema.NonNegativeInt = Field(3, description="further steps after the first success, for robustness")
    lr: schema.PositiveFloat = Field(0.5, description="l2: L2 norm of a step, of the model's input in [0, 1]")
    eps: Annotated[float, Ge(0.5), Le(255)] | None = Field(
        None,
        description="fgsm, pgd: maximum change of a pixel, in 1/255; less than 0.5 would be lost in an 8-bit file; "
        f"null: {DEFAULT_EPS:g}",
    )
    alpha: Annotated[float, Gt(0), Le(255)] = Field(1.0, description="pgd: step size, in 1/255")
    random_start: bool = Field(True, description="pgd: start from a random point within eps")
    then: Literal["saliency"] | None = Field(
        None, description="saliency: also compute saliency maps before and after the attack"
    )

    @model_validator(mode="after")
    def _eps_has_a_use(self) -> "AttackConfig":
        if self.eps is not None and self.method == "l2":
            raise ValueError("eps: the method l2 has no such bound; use method fgsm or pgd")
        return self

    @property
    def bound(self) -> float:
        """The largest change of a pixel, in [0, 1]."""
        return (self.eps if self.eps is not None else DEFAULT_EPS) / attacks.MAX_UINT8


@dataclass(eq=False)
class Victim:
    """A photo on its way: `image` is what is changed, the photo itself or what the net sees of it.

    `start` is the part (3, h, w) in [0, 1] of it that the net sees, `lens` how that is resized; `region` what it has
    become. `aim` is the class to be seen, or the one to get away from.
    """

    photo: Photo
    image: Image.Image
    frame: EvalTransform
    lens: DifferentiableResize
    start: Tensor
    region: Tensor
    before: torch.Tensor  # probabilities (classes,) of the photo as it was
    aim: int
    steps: int = 0
    left: int | None = None  # steps to go on, once the net is fooled


class Attack:
    """An attack on photos by one net; `config` is that of the experiment `attack`, `target` None: see anything else."""

    def __init__(
        self, config: AttackConfig, model: PretrainedClassifier, ctx: ComputeContext, target: int | None, out: RunDir
    ) -> None:
        self.config, self.model, self.ctx, self.target, self.out = config, model, ctx, target, out

    def __call__(self, batch: list[Photo], check_interrupt: Callable[[], None]) -> list[PhotoResult]:
        """Attack photos together, write their pictures, return a result for each, checking for interrupts."""
        victims = self.victims(batch)
        rows = {victim: self._judge(victim) for victim in victims if self._already(victim)}
        todo = [victim for victim in victims if victim not in rows]
        while todo:
            self.optimise(todo, check_interrupt)
            rows |= {victim: self._judge(victim) for victim in todo}
            todo = [victim for victim in todo if not rows[victim].values["fooled"] and victim.steps < self._most_steps]
        for victim in victims:
            rows[victim].files |= self._panel(victim, rows[victim])
        return [rows[victim] for victim in victims]

    @property
    def _most_steps(self) -> int:
        return 1 if self.config.method == "fgsm" else int(self.config.steps)

    def _already(self, victim: Victim) -> bool:
        return self.target is not None and int(victim.before.argmax()) == self.target

    def victims(self, batch: list[Photo]) -> list[Victim]:
        """Look at photos as the net does, and make ready what is changed of each."""
        views = [self.model.transform(photo.image) for photo in batch]
        with torch.inference_mode():
            stacked = torch.stack([photos.to_tensor(view) for view in views]).to(self.ctx.device)
            probabilities = self.model.probabilities(stacked).cpu()
        victims = []
        for photo, view, p in zip(batch, views, probabilities, strict=True):
            image, frame = photo.image, self.model.transform
            if self.config.size == "model":
                image, frame = view, EvalTransform(frame.size_px, frame.size_px, frame.filter)
            glass = build_resize(frame, *image.size, self.ctx.device)
            start = glass.crop(photos.to_tensor(image)).contiguous().to(self.ctx.device)
            aim = int(p.argmax()) if self.target is None else self.target
            begin = self._begin(photo, start)
            victims.append(Victim(photo, image, frame, glass, start, begin, p, aim))
        return victims

    def _begin(self, photo: Photo, start: Tensor) -> Tensor:
        if self.config.method != "pgd" or not self.config.random_start:
            return start.clone()
        numbers = torch.arange(start.numel()).view(start.shape)
        noise = rng.uniform(self.config.seed, 0, numbers, f"pgd {photo.label}").float().to(start.device)
        return attacks.random_start(start, noise, self.config.bound)

    def optimise(self, active: list[Victim], check_interrupt: Callable[[], None]) -> None:
        """Take steps until each photo is fooled and `extra_steps` further, or its steps are used up."""
        for victim in active:
            victim.left = None
        while active:
            check_interrupt()
            pixels = ImageState([victim.region for victim in active])
            losses = next(image_optimizer.optimization_steps(pixels, self._objective(active), self._update(active)))
            for victim, region, fooled in zip(active, pixels.tensors, losses["fooled"].tolist(), strict=True):
                victim.region = region
                victim.steps += 1
                if fooled and victim.left is None:  # as it was before this step, which is the first of the extra ones
                    victim.left = self.config.extra_steps
                victim.left = victim.left - 1 if victim.left is not None else None
            active = [v for v in active if v.steps < self._most_steps and (v.left is None or v.left > 0)]

    def _objective(self, active: list[Victim]) -> Callable[[ImageState], Losses]:
        targeted = self.target is not None
        aims = torch.tensor([victim.aim for victim in active], device=self.ctx.device)

        def objective(pixels: ImageState) -> Losses:
            pairs = zip(active, pixels.tensors, strict=True)
            views = torch.stack([victim.lens(tensor) for victim, tensor in pairs])
            with self.ctx.autocast():
                scores = self.model.module(views.contiguous(memory_format=torch.channels_last))
            fooled = attacks.attack_succeeded(scores, aims, targeted)
            return {"loss": attacks.attack_loss(scores, aims, targeted).sum(), "fooled": fooled}

        return objective

    def _update(self, active: list[Victim]) -> image_optimizer.Update:
        config, eps = self.config, self.config.bound
        alpha = eps if config.method == "fgsm" else config.alpha / attacks.MAX_UINT8

        def update(pixels: ImageState, gradients: list[Tensor]) -> None:
            for k, (victim, gradient) in enumerate(zip(active, gradients, strict=True)):
                region = pixels.tensors[k]
                if config.method == "l2":  # the same mean change of a pixel at any size
                    pixels.tensors[k] = attacks.l2_step(region, gradient, config.lr * victim.lens.scale)
                else:
                    pixels.tensors[k] = attacks.linf_step(region, gradient, victim.start, alpha, eps)

        return update

    def _judge(self, victim: Victim) -> PhotoResult:
        """Write the picture, read the file and classify it as any photo is; then as JPEG of several qualities."""
        changed = victim.image.copy()
        if not self._already(victim):
            changed.paste(photos.to_image(victim.region), victim.lens.region[:2])
        name = f"images/{victim.photo.label}-attacked.png"
        self.out.write_bytes(name, images.png(changed))
        read = photos.load(self.out.path / name)
        variants = [read, *(_as_jpeg(read, quality) for quality in JPEG_QUALITIES)]
        views = torch.stack([photos.to_tensor(victim.frame(image)) for image in variants])
        with torch.inference_mode():
            probabilities = self.model.probabilities(views.to(self.ctx.device)).cpu()
        aims = torch.full((len(views),), victim.aim)
        fooled = attacks.attack_succeeded(probabilities, aims, self.target is not None).tolist()
        small = attacks.distances(photos.to_tensor(victim.frame(victim.image)), views[0])
        large = attacks.distances(photos.to_tensor(victim.image), photos.to_tensor(read))
        values = {
            **self._told(victim, probabilities[0]),
            "fooled": fooled[0],
            "already": self._already(victim),
            "steps": victim.steps,
            "l2": small["l2"],
            "l2_photo": large["l2"],
            "linf_255": large["linf_255"],
            "psnr_db": large["psnr_db"],
            **{f"fooled_jpeg{quality}": held for quality, held in zip(JPEG_QUALITIES, fooled[1:], strict=True)},
        }
        return PhotoResult(str(victim.photo.path), values, {"attacked": name})

    def _told(self, victim: Victim, after: Tensor) -> Row:
        """Say what the net saw before and sees now, and how sure it was of the target."""
        row = {
            **self.model.class_score(int(after.argmax()), float(after.max())),
            "before": self.model.class_score(int(victim.before.argmax()), float(victim.before.max())),
        }
        if self.target is None:
            return row
        name, k = self.model.classes[self.target], self.target
        return row | {"target": name, "target_before": float(victim.before[k]), "target_after": float(after[k])}

    def _panel(self, victim: Victim, result: PhotoResult) -> dict[str, str]:
        row = result.values
        before, after = victim.image, photos.load(self.out.path / result.files["attacked"])
        told = f"L2 {row['l2']:.2f}, at most {row['linf_255']:.0f}/255, {row['steps']} steps"
        tiles = [
            (f"before: {row['before']['label']} {row['before']['score']:.2f}", before),
            (f"after: {row['label']} {row['score']:.2f}", after),
            (f"difference: {told}", images.difference(before, after, 1)),
            (f"difference x{DIFFERENCE_TIMES}", images.difference(before, after, DIFFERENCE_TIMES)),
        ]
        name = f"images/{victim.photo.label}-panel.png"
        self.out.write_bytes(name, images.png(images.panel(tiles, victim.photo.path.name)))
        return {"panel": name} | (self._explained(victim, before, after) if self.config.then else {})

    def _explained(self, victim: Victim, before: Image.Image, after: Image.Image) -> dict[str, str]:
        """Show what the net's answer depends on, for the photo and for the attacked picture."""
        views = torch.stack([photos.to_tensor(victim.frame(image)) for image in (before, after)])
        views = views.to(self.ctx.device).contiguous(memory_format=torch.channels_last)
        classes = self.model.module(views).argmax(1)
        maps = saliency.vanilla_gradient(self.model.module, views, classes)
        tiles = []
        for when, image, values, index in zip(
            ("before", "after"), (before, after), maps, classes.tolist(), strict=True
        ):
            shown = images.scaled(values)
            label = f"{when}: {self.model.classes[index]}"
            tiles += [
                (label, images.heat(shown)),
                ("", images.overlay(image, shown, victim.frame.crop_box(*image.size))),
            ]
        name = f"images/{victim.photo.label}-saliency.png"
        self.out.write_bytes(name, images.png(images.panel(tiles, victim.photo.path.name)))
        return {"saliency": name}


def _as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=quality)
    return Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")


def summary(results: list[PhotoResult]) -> dict[str, float]:
    """Return the shares and medians over the photos; those that were the target before count in none."""
    tried = [result.values for result in results if not result.values["already"]]
    found: dict[str, float] = {"num_photos": len(results), "num_attacked": len(tried)}
    if tried:
        found["fooled"] = statistics.fmean(row["fooled"] for row in tried)
        found |= {name: statistics.median(row[name] for row in tried) for name in MEDIANS}
        for quality in JPEG_QUALITIES:
            found[f"fooled_jpeg{quality}"] = statistics.fmean(row[f"fooled_jpeg{quality}"] for row in tried)
    return found


class AttackExperiment(Experiment[AttackConfig]):
    """Adversarial attacks on photos, evaluated on the saved file."""

    name = "attack"
    Config = AttackConfig
    metrics = (
        Metric("num_photos"),
        Metric("num_attacked"),
        Metric("fooled", "fraction", "higher"),
        Metric("steps", better="lower"),
        Metric("l2", better="lower"),
        Metric("l2_photo", better="lower"),
        Metric("linf_255", better="lower"),
        Metric("psnr_db", "dB", "higher"),
        *(Metric(f"fooled_jpeg{quality}", "fraction", "higher") for quality in JPEG_QUALITIES),
    )

    def run(self, config: AttackConfig, run: RunDir) -> dict[str, float]:
        """Attack all photos."""
        ctx, model = config.build()
        target = model.class_index(config.target) if config.target is not None else None
        run.folder("images")

        return summary(photo_batches.run(config, run, Attack(config, model, ctx, target, run), "attack", COLUMNS))

    def plan(self, config: AttackConfig, base: Path) -> dict[str, Any]:
        """Say what a run would do. ConfigError where there is no such class."""
        ctx, model = config.build()
        target = model.class_index(config.target) if config.target is not None else None
        aim = "anything else" if target is None else model.classes[target]
        return {"target": aim, "method": config.method, **photo_batches.plan(config, ctx, model)}
