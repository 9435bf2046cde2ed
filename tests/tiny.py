"""A training run of a second or less with everything a resume restores: dropout, BatchNorm, EMA, augmentation."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from cvlab.engine import device, loop, trainer
from cvlab.engine.config import TrainConfig
from cvlab.engine.task import TrainTask
from cvlab.experiments.classification.data.augment import Augmentation
from cvlab.experiments.classification.data.hard_examples import HardExampleLoader
from cvlab.experiments.classification.data.images import build_normalization, eval_batches
from cvlab.runs.run_dir import RunDir

STEPS = 32


def settings(optimizer="adamw", **overrides):
    """Return the configuration of the tiny training run."""
    from cvlab.engine.optimizers import OPTIMIZERS
    from cvlab.engine.schedules import SCHEDULES

    def component(table, **arguments):
        name = arguments.pop("name")
        return table.schema(name, Path())(name=name, **arguments)

    optimizer_arguments = {"momentum": 0.9} if optimizer == "sgd" else {}
    return TrainConfig(
        **{
            "experiment": "tiny",
            "name": "tiny",
            "seed": 3,
            "device": "cpu",
            "threads": 1,
            "precision": "float32",
            "optimizer": component(OPTIMIZERS, name=optimizer, lr=1e-2, **optimizer_arguments),
            "schedule": component(SCHEDULES, name="cosine"),
            "warmup": 0.1,
            "batch_size": 8,
            "duration": {"steps": STEPS},
            "clip_norm": 1.0,
            "ema": 0.9,
            "log_every": 3,
            "save_seconds": 1000.0,
        }
        | overrides
    )


def job(config, on_step=lambda step: None):
    """Return the task of the tiny training run; `on_step(step)` is called before the batch of a step is built."""
    ctx = config.compute_context()
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (60, 8, 8, 3), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 3, (60,), generator=generator).to(ctx.device)
    normalize = build_normalization(images, "mean", ctx.dtype, ctx.device)
    images = images.to(ctx.device)
    arguments = (images[:48], labels[:48], config.batch_size, config.seed, normalize, Augmentation("alternating", 1, 2))
    batches = HardExampleLoader(*arguments, skip_easy=0.4)
    device.seed_everything(config.seed)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(144, 3)
    ).to(ctx.device, ctx.dtype)

    def loss_fn(model, batch):
        losses = F.cross_entropy(model(batch[0]).to(ctx.dtype), batch[1], reduction="none")
        batches.record(losses.detach())
        return {"loss": losses.mean()}

    def measure(model, batch):
        scores = model(batch[0]).to(ctx.dtype)
        num_correct = (scores.argmax(1) == batch[1]).sum()
        loss = F.cross_entropy(scores, batch[1], reduction="sum")
        return {"loss": loss, "accuracy": num_correct, "count": torch.tensor(len(batch[1]))}

    def evaluate(model):
        metrics = loop.evaluate(model, eval_batches(images[48:], labels[48:], normalize), measure, ctx)
        return {f"val_{name}": value for name, value in metrics.items()}

    def get_batch(step):
        on_step(step)
        return batches.get_batch(step)

    return TrainTask(
        model=model,
        loss_fn=loss_fn,
        get_batch=get_batch,
        steps_per_epoch=batches.steps_per_epoch,
        items_per_step=config.batch_size,
        evaluate=evaluate,
        monitor="val_loss",
        ctx=ctx,
        extra_state=batches.extra_state,
    )


def train(path: Path, config=None, on_step=lambda step: None):
    """Run or resume the tiny training run in a directory; return its metrics and the extra entries of its summary."""
    config = config or settings()
    path.mkdir(exist_ok=True)
    out = RunDir(path)
    with out.locked():
        _, metrics = trainer.train(config, job(config, on_step), out)
    return metrics, out.extra_summary


def rows(path: Path):
    """Return the rows of metrics.jsonl without their times."""
    lines = (path / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


def untimed(metrics):
    """Return metrics without their times."""
    return {key: value for key, value in metrics.items() if key not in ("train_seconds", "images_per_second")}
