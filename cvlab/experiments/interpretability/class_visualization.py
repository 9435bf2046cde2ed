"""Draw what a net has learned of a class: climb the class's score, starting from noise or from a photo.

Paper: Simonyan et al., 2014, section 2; Yosinski et al., 2015 (jitter and blur); Olah et al., 2017 (Fourier
coefficients, robustness to movements).
Differs: the picture is judged as an 8-bit file that is read back, and, where `second_model` names one, by a second net.
Expect: `probability`: the smallest, over the targets, that the file is classified as its target; `second_top5`: the
share of the pictures that have their target in the second net's top 5.
Command: cvlab classvis --target gorilla
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Le
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from cvlab.config import schema
from cvlab.data import photos
from cvlab.engine import image_optimizer, loop
from cvlab.experiments.common import photo_batches
from cvlab.experiments.common.photo_batches import NetConfig
from cvlab.experiments.interpretability import visualizer
from cvlab.models import pretrained
from cvlab.runs.run_dir import RunDir


class Config(NetConfig):
    """Which classes, and how they are drawn."""

    targets: tuple[str, ...] = Field(("gorilla",), description="classes to draw, a picture for each")
    init: Literal["noise", "image"] = Field("noise", description="start from noise, or from the photo in `images`")
    images: tuple[str, ...] = Field((photos.SAMPLE,), description="with init: image, the photo to start from")
    parametrization: Literal["fourier", "pixels"] = Field(
        "fourier", description="what is optimised: decorrelated Fourier coefficients, or the pixels themselves"
    )
    steps: Annotated[schema.Count, Le(100_000)] = Field(384, description="steps of the optimisation")
    lr: schema.Positive = Field(0.02, description="fourier: Adam's; pixels: length of a step over the whole picture")
    octaves: Annotated[schema.Count, Le(8)] = Field(1, description="fourier: scales, coarse ones first")
    l2: schema.NonNegative = Field(1e-4, description="weight of the squared distance from mid-grey")
    tv: schema.NonNegative = Field(0.3, description="weight of the squared differences of neighbours")
    jitter_px: schema.Index = Field(0, description="roll by up to so many pixels before each step")
    turn_degrees: Annotated[schema.NonNegative, Le(180)] = Field(30.0, description="turn by up to so much")
    zoom: schema.BelowOne = Field(0.4, description="zoom by a factor of up to 1 plus or minus this")
    shift: schema.BelowOne = Field(0.2, description="shift by up to this share of the side")
    blur: schema.NonNegative = Field(3.0, description="see it through a blur of up to so many pixels more than 0.3")
    grey: schema.Fraction = Field(1.0, description="mix it with its grey by up to so much")
    contrast: schema.Fraction = Field(0.6, description="weaken its contrast by up to so much")
    blur_every: schema.Index = Field(0, description="pixels: blur the picture itself every so many steps; 0: never")
    blur_sigma: schema.Positive = Field(0.5, description="pixels: that blur's standard deviation in pixels")
    frames: Annotated[schema.Count, Le(200)] = Field(12, description="pictures along the way")
    second_model: str | None = Field(None, description="a second net that judges the pictures")
    second_weights: str | None = Field(None, description="a file with its weights")

    @field_validator("targets")
    @classmethod
    def _some(cls, targets: tuple[str, ...]) -> tuple[str, ...]:
        if not targets:
            raise ValueError("give at least one class")
        return targets

    @field_validator("images")
    @classmethod
    def _absolute_images(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return photo_batches.absolute(names)

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        if self.octaves > 1 and self.parametrization == "pixels":
            raise ValueError("octaves go with parametrization: fourier")
        if self.blur_every and self.parametrization == "fourier":
            raise ValueError("blur_every goes with parametrization: pixels")
        if self.init == "image" and len(self.images) != 1:
            raise ValueError("init: image starts from exactly one photo")
        return self


def run(config: Config, out: RunDir) -> dict[str, float]:
    """Draw all targets together."""
    where, model = config.build()
    easel = visualizer.Easel(config, model, where, [model.index(name) for name in config.targets], out)
    job = image_optimizer.Painting(
        pixels=loop.Pixels([easel.start()]),
        objective=easel.objective,
        update=easel.update,
        steps=config.steps,
        where=where,
        digest=config.digest(),
        frames=frozenset(round(k * config.steps / config.frames) for k in range(config.frames + 1)),
        keep_frame=easel.keep_frame,
    )
    last = image_optimizer.paint(job, out, "classvis")
    rows = easel.finish(job.pixels)
    second = second_judge(config, where.device)
    if second is not None:
        easel.ask(second, rows)
    out.facts["results"] = rows
    found = {"num_pictures": len(rows), "probability": min(row["score_target"] for row in rows), **last}
    if second is not None:
        found["second_top5"] = sum(row["second_rank"] <= 5 for row in rows) / len(rows)
    return found


def second_judge(config: Config, device: torch.device) -> Callable[[Tensor], Tensor] | None:
    """Return what gives the second net's probabilities of photos (N, 3, S, S), None where none is named."""
    if config.second_model is None:
        return None
    second = pretrained.build(config.second_model, config.second_weights, device)
    size = second.frame.size_px

    def probabilities(pictures: Tensor) -> Tensor:
        resized = torch.nn.functional.interpolate(pictures, size=(size, size), mode="bicubic", antialias=True)
        return second.probabilities(resized.clamp(0, 1))

    return probabilities


def metric_names(config: Config) -> set[str]:
    """Return the names that an expectation can speak of."""
    second = {"second_top5"} if config.second_model is not None else set()
    return {"num_pictures", "probability", "steps", "seconds_of_steps", "loss", *second}


def plan(config: Config, base: Path) -> dict[str, Any]:
    """Say what a run would do. ConfigError where there is no such class, DataError where there is no such photo."""
    where, model = config.build()
    for name in config.targets:
        model.index(name)
    if config.init == "image":
        photos.load(photos.find(config.images)[0])
    second_judge(config, where.device)
    shape = visualizer.shape(config, model)
    return {
        "targets": ", ".join(model.classes[model.index(name)] for name in config.targets),
        "parameters": math.prod(shape),
        "steps": config.steps,
        "model": config.model,
        **where.told(),
    }
