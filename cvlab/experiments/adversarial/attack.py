"""Change photos so little that nobody sees it, until a net takes them for something else; judged on the written file.

Paper: Szegedy et al., 2014, "Intriguing properties of neural networks"; Goodfellow et al., 2015 (fgsm); Madry et al.,
2018 (pgd). Differs: the photo keeps its own size, for the resize is differentiated too; the result is rounded to 8
bits, written, read back and classified as any photo is, and only that counts.
Expect: `fooled` (share of the photos that were not the target before), medians `steps`, `l2` (of what the net sees),
`linf_255`, `psnr_db`, and `fooled_jpeg95`, `fooled_jpeg85`, `fooled_jpeg75`.
Command: cvlab attack --target ostrich img.jpg
"""

import statistics
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le
from pydantic import Field

from cvlab.config import schema
from cvlab.experiments.adversarial import example
from cvlab.experiments.adversarial.example import JPEG_QUALITIES
from cvlab.experiments.common import photo_batches
from cvlab.experiments.common.photo_batches import PhotoConfig
from cvlab.runs.run_dir import Row, RunDir

MEDIANS = ("steps", "l2", "l2_photo", "linf_255", "psnr_db")


class Config(PhotoConfig):
    """Which photos, what they are to be taken for, and how."""

    target: str | None = Field(None, description="what the net is to see; null: anything but what it sees now")
    method: Literal["l2", "fgsm", "pgd"] = Field(
        "l2", description="small steps of a fixed length, one step to the bound, or many steps within the bound"
    )
    size: Literal["original", "model"] = Field(
        "original", description="change the photo at its own size, or the square picture that the net sees"
    )
    steps: Annotated[schema.Count, Le(10_000)] = Field(100, description="at most so many (pgd, l2)")
    extra_steps: schema.Index = Field(3, description="go on so many steps after the net is fooled, for stability")
    lr: schema.Positive = Field(0.5, description="l2: length of a step, in [0, 1] over what the net sees")
    eps: Annotated[float, Ge(0.5), Le(255)] = Field(
        8.0, description="fgsm, pgd: largest change of a pixel, in 1/255; less than 0.5 is lost in a file of 8 bits"
    )
    alpha: Annotated[float, Gt(0), Le(255)] = Field(1.0, description="pgd: length of a step, in 1/255")
    random_start: bool = Field(True, description="pgd: start at a random point within eps")
    then: Literal["saliency"] | None = Field(
        None, description="saliency: also show what the attacked photo is judged by"
    )


def run(config: Config, out: RunDir) -> dict[str, float]:
    """Attack all photos."""
    where, model = config.build()
    target = model.index(config.target) if config.target is not None else None
    out.folder("images")

    return summary(photo_batches.run(config, out, example.Attack(config, model, where, target, out), "attack"))


def summary(rows: list[Row]) -> dict[str, float]:
    """Return the shares and medians over the photos; those that were the target before count in none."""
    tried = [row for row in rows if not row["already"]]
    found: dict[str, float] = {"num_photos": len(rows), "num_attacked": len(tried)}
    if tried:
        found["fooled"] = statistics.fmean(row["fooled"] for row in tried)
        found |= {name: statistics.median(row[name] for row in tried) for name in MEDIANS}
        for quality in JPEG_QUALITIES:
            found[f"fooled_jpeg{quality}"] = statistics.fmean(row[f"fooled_jpeg{quality}"] for row in tried)
    return found


def metric_names(config: Config) -> set[str]:
    """Return the names that an expectation can speak of."""
    jpegs = {f"fooled_jpeg{quality}" for quality in JPEG_QUALITIES}
    return {"num_photos", "num_attacked", "fooled", *MEDIANS, *jpegs}


def plan(config: Config, base: Path) -> dict[str, Any]:
    """Say what a run would do. ConfigError where there is no such class."""
    where, model = config.build()
    target = model.index(config.target) if config.target is not None else None
    aim = "anything else" if target is None else model.classes[target]
    return {"target": aim, "method": config.method, **photo_batches.plan(config, where, model)}
