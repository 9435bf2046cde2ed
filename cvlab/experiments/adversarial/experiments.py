"""Adversarial attacks on photos. The methods import torch."""

from pathlib import Path
from typing import Any

from cvlab.config.metrics import Metric
from cvlab.config.validation import Problems
from cvlab.experiments.adversarial.config import JPEG_NAMES, AttackConfig
from cvlab.experiments.base import PhotoExperiment
from cvlab.runs.results import Column
from cvlab.runs.run_dir import RunDir

COLUMNS = (
    Column("before", "before"),
    Column("label", "after"),
    Column("outcome", "outcome"),
    Column("steps", "steps"),
    Column("l2", "L2"),
    Column("linf_255", "largest change", "1/255", is_detail=True),
    Column("psnr_db", "PSNR", "dB", is_detail=True),
    Column(
        "jpeg",
        f"success as JPEG {', '.join(name.removeprefix('jpeg') for name in JPEG_NAMES)}",
        keys=tuple(f"success_{name}" for name in JPEG_NAMES),
        is_detail=True,
    ),
    Column("survives", "survives"),
    Column("attacked", "attacked photo", is_file=True, is_part=True),
    Column("panel", "panel", is_file=True),
    Column("saliency", "saliency", is_file=True),
)


def _survives(config: AttackConfig) -> bool:
    return bool(config.survive)


class AttackExperiment(PhotoExperiment[AttackConfig]):
    """Adversarial attacks on photos, evaluated on the saved file.

    References:
        Szegedy et al., 2014, "Intriguing properties of neural networks" (l2); Goodfellow et al., 2015 (fgsm); Madry
        et al., 2018 (pgd); Moosavi-Dezfooli et al., 2016 (deepfool); Carlini and Wagner, 2017 (cw); Athalye et al.,
        2018 (survive).

    Differences from the papers:
        The resize to the model's input is part of the computation graph, so attacks work at the photo's own
        resolution. Success is measured on the saved 8-bit PNG after reading it back.

    Metrics:
        `success_rate`: success rate over the photos that were not classified as the target before.
        `steps`, `l2` (of the model's input), `l2_photo`, `linf_255`, `psnr_db`: medians over those photos.
        `success_rate_jpeg95`, `success_rate_jpeg85`, `success_rate_jpeg75`: success rates after JPEG compression.
        With `survive`, `success_rate_CHANGE`: success rates after a change of the saved file (`resize`: at 1/2 and at
        3/4 of its sides; `crop`: 9/10 of both sides, at all corners and in the center), and `survival_rate`: after all.

    Command:
        cvlab attack --target ostrich img.jpg
    """

    name = "attack"
    Config = AttackConfig
    columns = COLUMNS
    metrics = (
        Metric("num_photos"),
        Metric("num_attacked"),
        Metric("success_rate", "fraction", "higher"),
        Metric("steps", better="lower"),
        Metric("l2", better="lower"),
        Metric("l2_photo", better="lower"),
        Metric("linf_255", better="lower"),
        Metric("psnr_db", "dB", "higher"),
        *(Metric(f"success_rate_{name}", "fraction", "higher") for name in JPEG_NAMES),
        Metric("success_rate_*", "fraction", "higher", when=_survives),
        Metric("survival_rate", "fraction", "higher", when=_survives),
    )

    def problems(self, config: AttackConfig, base: Path) -> Problems:
        """Return what is wrong with a configuration; also classes that the model does not have."""
        return super().problems(config, base) + config.class_problems("target", [config.target])

    def run(self, config: AttackConfig, run: RunDir) -> dict[str, float]:
        """Attack all photos."""
        from cvlab.experiments.adversarial.attack import Attack, compute_metrics, survival_headline
        from cvlab.experiments.common import photo_batches

        ctx, model = config.build()
        target = model.class_index(config.target) if config.target is not None else None
        run.folder("images")
        attack = Attack(config, model, ctx, target, run)
        metrics = compute_metrics(config, photo_batches.run(config, run, attack, "attack", self.columns))
        if config.survive and metrics["num_attacked"]:
            run.extra_summary["headline"] = survival_headline(config, metrics)
        return metrics

    def plan(self, config: AttackConfig, base: Path) -> dict[str, Any]:
        """Return what a run would do. Raises ConfigError for an unknown class."""
        from cvlab.experiments.common import photo_batches

        ctx, model = config.build()
        target = model.class_index(config.target) if config.target is not None else None
        target_name = "anything else" if target is None else model.classes[target]
        return {"target": target_name, "method": config.method, **photo_batches.plan(config, ctx, model)}
