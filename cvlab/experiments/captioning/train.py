"""Train an image captioner: an RNN, an LSTM or an LSTM with attention on the features of a frozen backbone.

References: Vinyals et al., 2015, "Show and tell"; Xu et al., 2015, "Show, attend and tell"; source: EECS 498,
assignment 6.
Differences from the paper: the map is computed once and kept on the disk; a layer normalisation stands before the
words' scores.
Metrics: `val_loss`, `val_bleu4` (greedy) while training; at the end, by beam search on the split that is evaluated
(`test` with evaluate_test, else `val`), `bleu1` to `bleu4`, `cider`, `exact`; of scene_sentences `shapes_right`,
`colours_right`, `relations_right`.
Command: cvlab train configs/caption_scenes.yaml
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le, MinLen
from pydantic import Field, model_validator
from torch import Tensor, nn

from cvlab.config import schema
from cvlab.config.metrics import Metric
from cvlab.data import vocabulary
from cvlab.engine import device, loop, trainer
from cvlab.engine.task import TrainTask
from cvlab.experiments.base import Evaluable, Experiment, State
from cvlab.experiments.captioning import checkpoint as captioning_checkpoint
from cvlab.experiments.captioning import dataset, feature_store, scene_captions
from cvlab.experiments.captioning import evaluation as captioning_evaluation
from cvlab.experiments.captioning.checkpoint import About, Made
from cvlab.experiments.captioning.dataset import CaptionDataset, CaptionSample
from cvlab.experiments.captioning.evaluation import Batch, Batches, Reward, Sentences
from cvlab.experiments.captioning.feature_store import Request
from cvlab.experiments.common import backbone_config
from cvlab.runs import checkpoint
from cvlab.runs.interrupt import StopRequest
from cvlab.runs.run_dir import RunDir
from cvlab.storage.cache import data_root


class Data(backbone_config.PhotoDatasetConfig):
    """Which photos with sentences."""

    source_type = dataset.CaptionDatasetSource
    val_fraction: schema.FractionBelowOne = Field(0.1, description="of the photos of your own set")
    sentences: schema.PositiveInt | None = Field(None, description="take so many sentences of a photo; null: all")


class CaptionerConfig(backbone_config.BackboneTrainConfig):
    """A captioner, its data and how it is trained. `batch_size` counts photos, each with all of its sentences."""

    data: Data
    model: Annotated[schema.ComponentConfig, captioning_checkpoint.TABLE]
    size: Annotated[int, Ge(64), Le(2048)] = Field(224, description="photos are squeezed to squares of so many pixels")
    strides: Annotated[tuple[Literal[4, 8, 16, 32], ...], MinLen(1)] = Field(
        (32,), description="pixels between the cells of the backbone's map; of several the first says which cells"
    )
    mirror: bool = Field(False, description="show half of the photos mirrored; twice the maps on the disk")
    threshold: schema.PositiveInt = Field(
        5, description="words that stand less often in the training sentences are unknown"
    )
    length: Annotated[int, Ge(3), Le(200)] = Field(17, description="words of a sentence at most, with start and end")
    reward_epochs: Annotated[int, Ge(0)] = Field(
        0, description="so many epochs at the end sentences are drawn, and those most like people's become likelier"
    )
    reward_samples: Annotated[int, Ge(2), Le(100)] = Field(5, description="sentences drawn of each photo")
    beam: Annotated[int, Ge(1), Le(100)] = Field(5, description="sentences that are followed at once at the end")
    alpha: schema.Fraction = Field(0.7, description="a sentence's score is divided by its length to this power")

    @model_validator(mode="after")
    def _rewards_within(self) -> "CaptionerConfig":
        self.require_last("reward_epochs", self.reward_epochs)
        return self


@dataclass(frozen=True)
class Parts:
    """What a configuration builds."""

    ctx: device.ComputeContext
    captionset: CaptionDataset
    made: Made


def build(config: CaptionerConfig) -> Parts:
    """Read the sentences and build the captioner, seeded."""
    ctx = device.select_device(config.device, config.precision, config.threads)
    captionset = dataset.load(config.data.name, data_root(), config.data.path, config.data.val_fraction)
    train = items_of(config, captionset, "train")
    spoken = (vocabulary.tokenize(text) for item in train for text in item.sentences[: config.data.sentences])
    words = vocabulary.build_vocabulary(spoken, config.threshold)
    device.seed_everything(config.seed)
    features = captioning_checkpoint.maps_of(config.strides, config.backbone, config.backbone_weights, ctx.device)
    about = About(
        config.model.arguments() | {"layers": "torch"},
        words.words,
        config.size,
        config.length,
        config.strides,
        config.backbone,
        config.backbone_weights,
        captionset.name,
    )
    made = captioning_checkpoint.build(about, features, ctx.device)
    made.net.layers = config.model.arguments()["layers"]
    return Parts(ctx, captionset, made)


def items_of(config: CaptionerConfig, captionset: CaptionDataset, split: str) -> Sequence[CaptionSample]:
    """Return the photos of a split. ConfigError where it has none, or fewer than are asked for."""
    return config.data.items(captionset.name, captionset.splits, split)


def maps_of(
    config: CaptionerConfig,
    parts: Parts,
    split: str,
    check_interrupt: Callable[[], None] = lambda: None,
    mirrored: bool = False,
) -> Tensor:
    """Return what the backbone sees in the photos of a split, (N, L, C)."""
    paths = [item.path for item in items_of(config, parts.captionset, split)]
    request = Request(config.size, not parts.made.net.is_attending, mirrored)
    return feature_store.load(parts.made.features, paths, parts.ctx, request, check_interrupt)


def loss_function(config: CaptionerConfig, reward: Reward | None) -> loop.LossFn[Batch]:
    """Return the loss of a sentence, and of a word; in the last epochs, if they are wanted, of the reward."""

    def loss_fn(net: nn.Module, batch: Batch) -> loop.Losses:
        if batch.is_late and reward is not None:
            return captioning_evaluation.reward_loss(net, batch, reward, config.reward_samples, config.length)  # type: ignore[arg-type]
        loss, word_loss = net.loss(batch.features, batch.words, batch.image)  # type: ignore[operator]
        return {"loss": loss, "word_loss": word_loss}

    return loss_fn


def _say(config: CaptionerConfig, parts: Parts, net: Any, features: Tensor, width: int) -> list[list[str]]:
    return captioning_evaluation.say(
        net, features, parts.made.vocabulary, parts.ctx, width, config.length, config.alpha
    )


def judge(config: CaptionerConfig, parts: Parts, net: Any, features: Tensor, split: str) -> dict[str, float]:
    """Return how good the sentences are that beam search finds for a split."""
    items = items_of(config, parts.captionset, split)
    found = _say(config, parts, net, features, config.beam)
    values = captioning_evaluation.measure(found, items)
    if parts.captionset.name == scene_captions.SET.name:
        values |= captioning_evaluation.measure_parts(found, items)
    return values


def _has_scenes(config: CaptionerConfig) -> bool:
    return scene_captions.SET.name in (config.data.name, config.data.fallback)


class CaptionerExperiment(Experiment[CaptionerConfig], Evaluable[CaptionerConfig]):
    """Train an image captioner: an RNN, an LSTM or an LSTM with attention on the features of a frozen backbone."""

    name = "captioner"
    Config = CaptionerConfig
    metrics = (
        *trainer.METRICS,
        Metric("val_loss", better="lower"),
        Metric("val_bleu4", "fraction", "higher"),
        Metric("best_val_bleu4", "fraction", "higher"),
        Metric("word_loss", better="lower"),
        Metric("cider", better="higher"),
        Metric("exact", "fraction", "higher"),
        *(Metric(f"bleu{n}", "fraction", "higher") for n in range(1, 5)),
        *(Metric(f"{part}_right", "fraction", "higher", _has_scenes) for part in ("shapes", "colours", "relations")),
    )

    def run(self, config: CaptionerConfig, run: RunDir) -> dict[str, float]:
        """Compute features, train, and evaluate generated captions; save the weights in a file of their own."""
        parts = build(config)
        with StopRequest() as stop:
            check_interrupt = functools.partial(stop.raise_if_set, 0, run.path.name)
            features = maps_of(config, parts, "train", check_interrupt)
            mirrored = maps_of(config, parts, "train", check_interrupt, mirrored=True) if config.mirror else None
            val = maps_of(config, parts, "val", check_interrupt)
        train = items_of(config, parts.captionset, "train")
        sentences = Sentences(train, parts.made.vocabulary, config.length, config.data.sentences)
        batches = Batches(features, sentences, config.batch_size, config.seed, mirrored, parts.ctx.device)
        reward = None
        if config.reward_epochs:
            batches.late_from = config.last_from(config.reward_epochs, batches.epochs.steps)
            reward = Reward(train, parts.made.vocabulary)
        items = items_of(config, parts.captionset, "val")
        judged = Sentences(items, parts.made.vocabulary, config.length, None)

        def evaluation(net: nn.Module) -> dict[str, float]:
            found = _say(config, parts, net, val, width=1)
            value = captioning_evaluation.loss(net, val, judged, parts.ctx)  # type: ignore[arg-type]
            return {"val_loss": value, "val_bleu4": captioning_evaluation.measure(found, items)["bleu4"]}

        job = TrainTask(
            model=parts.made.net,
            loss_fn=loss_function(config, reward),
            get_batch=batches,
            steps_per_epoch=batches.epochs.steps,
            items_per_step=batches.epochs.batch_size,
            evaluate=evaluation,
            monitor="val_bleu4",
            ctx=parts.ctx,
        )
        net, metrics = trainer.train(config, job, run)
        run.write(captioning_checkpoint.FILE, lambda path: captioning_checkpoint.save(parts.made.about, net, path))  # type: ignore[arg-type]
        split = "test" if config.evaluate_test else "val"
        last = val if split == "val" else maps_of(config, parts, "test")
        run.extra_summary |= {
            "bleu_rule": captioning_evaluation.RULE,
            "beam": config.beam,
            "alpha": config.alpha,
            "evaluated_split": split,
        }
        return metrics | judge(config, parts, net, last, split)

    def evaluate(self, config: CaptionerConfig, base: Path, state: State, splits: Sequence[str]) -> dict[str, float]:
        """Evaluate the weights of a checkpoint by beam search; names of splits stand before the metrics."""
        parts = build(config)
        net = parts.made.net
        checkpoint.load_eval_weights(net, state, str(base))
        chosen = splits or tuple(name for name in ("val", "test") if parts.captionset.splits.get(name))
        found: dict[str, float] = {}
        for split in chosen:
            features = maps_of(config, parts, split)
            sentences = Sentences(items_of(config, parts.captionset, split), parts.made.vocabulary, config.length, None)
            values = judge(config, parts, net, features, split)
            values["loss"] = captioning_evaluation.loss(net, features, sentences, parts.ctx)
            found |= {f"{split}_{name}": value for name, value in values.items()}
        return found

    def plan(self, config: CaptionerConfig, base: Path) -> dict[str, Any]:
        """Say what a run would do; sentences are read, no photo is opened."""
        parts = build(config)
        train = items_of(config, parts.captionset, "train")
        steps_per_epoch = max(1, len(train) // config.batch_size)
        return {
            "model": f"{parts.made.net.cell}, layers {parts.made.net.layers}",
            "parameters": sum(p.numel() for p in parts.made.net.parameters()),
            "words": len(parts.made.vocabulary),
            "photos": ", ".join(f"{len(items)} {split}" for split, items in parts.captionset.splits.items()),
            "steps": config.duration.steps or (config.duration.epochs or 0) * steps_per_epoch or "as many as fit",
            **parts.ctx.as_dict(),
        }
