"""Train an image captioner: an RNN, an LSTM or an LSTM with attention on the features of a frozen backbone.

References: Vinyals et al., 2015, "Show and tell"; Xu et al., 2015, "Show, attend and tell"; EECS 498, assignment 6.
Differences from the paper: the backbone's features are computed once and kept on the disk; layer normalization before
the output projection.
Metrics: `val_loss`, `val_bleu4` (greedy) while training; at the end, by beam search on the evaluated split (`test` with
evaluate_test, else `val`), `bleu1` to `bleu4`, `cider`, `exact_match`; on scene_captions also `shapes_right`,
`colours_right`, `relations_right`.
Command: cvlab train configs/caption_scenes.yaml
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from annotated_types import Ge, Le, MinLen
from pydantic import Field, model_validator
from torch import Tensor, nn

from cvlab.config import schema
from cvlab.config.metrics import Metric
from cvlab.data import datasets, vocabulary
from cvlab.engine import device, loop, trainer
from cvlab.engine.task import TrainTask
from cvlab.experiments.base import Evaluable, Experiment, State
from cvlab.experiments.captioning import checkpoint as captioner_checkpoint
from cvlab.experiments.captioning import evaluation, feature_store, scene_captions, self_critical
from cvlab.experiments.captioning.batches import CaptionBatch, CaptionLoader, EncodedCaptions
from cvlab.experiments.captioning.checkpoint import CaptionerMetadata, LoadedCaptioner
from cvlab.experiments.captioning.dataset import CaptionDataset, CaptionDatasetSource, CaptionSample
from cvlab.experiments.captioning.feature_store import FeatureSpec
from cvlab.experiments.captioning.model import Captioner
from cvlab.experiments.captioning.self_critical import CiderReward
from cvlab.experiments.common import backbone_config
from cvlab.runs import checkpoint
from cvlab.runs.interrupt import StopRequest
from cvlab.runs.run_dir import RunDir
from cvlab.storage.cache import data_root


class CaptionDataConfig(backbone_config.PhotoDatasetConfig):
    """Which captioned photos."""

    source_type = CaptionDatasetSource
    val_fraction: schema.FractionBelowOne = Field(0.1, description="share of your own photos used for validation")
    sentences: schema.PositiveInt | None = Field(
        None, description="train on this number of captions per photo; null: all"
    )


class CaptionerConfig(backbone_config.BackboneTrainConfig):
    """A captioner, its data and its training. `batch_size` counts photos, each with all of its captions."""

    data: CaptionDataConfig
    model: Annotated[schema.ComponentConfig, captioner_checkpoint.CAPTIONERS]
    size: Annotated[int, Ge(64), Le(2048)] = Field(
        224, description="photos are resized to squares of this many pixels, without keeping the aspect ratio"
    )
    strides: Annotated[tuple[Literal[4, 8, 16, 32], ...], MinLen(1)] = Field(
        (32,), description="strides of the backbone's feature maps; the first one defines the spatial positions"
    )
    mirror: bool = Field(False, description="flip half of the photos horizontally; takes twice the space on the disk")
    min_word_count: schema.PositiveInt = Field(
        5, description="words that occur less often in the training captions are unknown"
    )
    length: Annotated[int, Ge(3), Le(200)] = Field(
        17, description="maximum number of tokens of a caption, start and end included"
    )
    reward_epochs: Annotated[int, Ge(0)] = Field(
        0, description="number of last epochs of self-critical training, which maximizes CIDEr-D of sampled captions"
    )
    reward_samples: Annotated[int, Ge(2), Le(100)] = Field(
        5, description="captions sampled for each photo in self-critical training"
    )
    beam: Annotated[int, Ge(1), Le(100)] = Field(5, description="beam width of the final evaluation; 1 is greedy")
    alpha: schema.Fraction = Field(
        0.7, description="length normalization of beam search: scores are divided by length ** alpha"
    )

    @model_validator(mode="after")
    def _rewards_within(self) -> "CaptionerConfig":
        self.check_final_epochs("reward_epochs", self.reward_epochs)
        return self


@dataclass(frozen=True)
class CaptioningSetup:
    """What a configuration builds."""

    ctx: device.ComputeContext
    dataset: CaptionDataset
    captioner: LoadedCaptioner


def build_setup(config: CaptionerConfig) -> CaptioningSetup:
    """Load the captions, build the vocabulary, and build the captioner with seeded random weights."""
    ctx = device.select_device(config.device, config.precision, config.threads)
    source = datasets.get_of_kind(config.data.name, CaptionDatasetSource)
    dataset = source.load(data_root(), config.data.path, config.data.val_fraction)
    train = samples_of(config, dataset, "train")
    captions = (vocabulary.tokenize(text) for sample in train for text in sample.captions[: config.data.sentences])
    tokens = vocabulary.build_vocabulary(captions, config.min_word_count).tokens
    device.seed_everything(config.seed)
    extractor = captioner_checkpoint.build_feature_extractor(
        config.strides, config.backbone, config.backbone_weights, ctx.device
    )
    metadata = CaptionerMetadata(
        arguments=config.model.arguments() | {"layers": "torch"},  # a loaded captioner runs on torch's layers
        vocabulary=tokens,
        size_px=config.size,
        max_length=config.length,
        strides=config.strides,
        backbone=config.backbone,
        backbone_weights=config.backbone_weights,
        trained_on=dataset.name,
    )
    captioner = captioner_checkpoint.build(metadata, extractor, ctx.device)
    captioner.model.layers = config.model.arguments()["layers"]
    return CaptioningSetup(ctx, dataset, captioner)


def samples_of(config: CaptionerConfig, dataset: CaptionDataset, split: str) -> Sequence[CaptionSample]:
    """Return the photos of a split. Raises ConfigError if it has none, or fewer than `num_train`."""
    return config.data.items(dataset.name, dataset.splits, split)


def load_backbone_features(
    config: CaptionerConfig,
    setup: CaptioningSetup,
    split: str,
    check_interrupt: Callable[[], None] = lambda: None,
    mirrored: bool = False,
) -> Tensor:
    """Return the backbone's features of the photos of a split, float16 (N, L, C), computed if they are not stored."""
    paths = [sample.path for sample in samples_of(config, setup.dataset, split)]
    spec = FeatureSpec(config.size, not setup.captioner.model.has_attention, mirrored)
    return feature_store.load_features(setup.captioner.feature_extractor, paths, setup.ctx, spec, check_interrupt)


def make_loss_fn(config: CaptionerConfig, reward: CiderReward | None) -> loop.LossFn[CaptionBatch]:
    """Return the loss of a batch: cross-entropy, or the policy gradient in self-critical training."""

    def loss_fn(model: nn.Module, batch: CaptionBatch) -> loop.Losses:
        captioner = cast("Captioner", model)
        if batch.is_self_critical and reward is not None:
            return self_critical.self_critical_loss(captioner, batch, reward, config.reward_samples, config.length)
        loss, word_loss = captioner.loss(batch.features, batch.token_ids, batch.photo_indices)
        return {"loss": loss, "word_loss": word_loss}

    return loss_fn


def _generate(
    config: CaptionerConfig, setup: CaptioningSetup, model: Captioner, features: Tensor, beam_width: int
) -> list[list[str]]:
    return evaluation.generate_captions(
        model, features, setup.captioner.vocabulary, setup.ctx, beam_width, config.length, config.alpha
    )


def evaluate_split(
    config: CaptionerConfig, setup: CaptioningSetup, model: Captioner, features: Tensor, split: str
) -> dict[str, float]:
    """Generate captions by beam search for the photos of a split, whose features are given, and score them."""
    samples = samples_of(config, setup.dataset, split)
    captions = _generate(config, setup, model, features, config.beam)
    metrics = evaluation.compute_metrics(captions, samples)
    if setup.dataset.name == scene_captions.GENERATED.name:
        metrics |= evaluation.compute_scene_accuracy(captions, samples)
    return metrics


def _has_scenes(config: CaptionerConfig) -> bool:
    return scene_captions.GENERATED.name in (config.data.name, config.data.fallback)


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
        Metric("exact_match", "fraction", "higher"),
        *(Metric(f"bleu{n}", "fraction", "higher") for n in range(1, 5)),
        *(Metric(f"{part}_right", "fraction", "higher", _has_scenes) for part in ("shapes", "colours", "relations")),
    )

    def run(self, config: CaptionerConfig, run: RunDir) -> dict[str, float]:
        """Compute features, train, and evaluate generated captions; save the weights in a file of their own."""
        setup = build_setup(config)
        captioner = setup.captioner
        with StopRequest() as stop:
            check_interrupt = functools.partial(stop.raise_if_set, 0, run.path.name)
            load_split = functools.partial(load_backbone_features, config, setup, check_interrupt=check_interrupt)
            train_features = load_split("train")
            mirrored_features = load_split("train", mirrored=True) if config.mirror else None
            val_features = load_split("val")
        train, val = (samples_of(config, setup.dataset, split) for split in ("train", "val"))
        train_captions = EncodedCaptions(train, captioner.vocabulary, config.length, config.data.sentences)
        val_captions = EncodedCaptions(val, captioner.vocabulary, config.length)
        loader = CaptionLoader(
            train_features, train_captions, config.batch_size, config.seed, mirrored_features, setup.ctx.device
        )
        reward = None
        if config.reward_epochs:
            loader.self_critical_from = config.final_epochs_start(config.reward_epochs, loader.sampler.steps_per_epoch)
            reward = CiderReward(train, captioner.vocabulary)

        def validate(model: nn.Module) -> dict[str, float]:
            model = cast("Captioner", model)
            captions = _generate(config, setup, model, val_features, beam_width=1)
            loss = evaluation.mean_loss(model, val_features, val_captions, setup.ctx)
            return {"val_loss": loss, "val_bleu4": evaluation.compute_metrics(captions, val)["bleu4"]}

        task = TrainTask(
            model=captioner.model,
            loss_fn=make_loss_fn(config, reward),
            get_batch=loader.get_batch,
            steps_per_epoch=loader.sampler.steps_per_epoch,
            items_per_step=loader.sampler.batch_size,
            evaluate=validate,
            monitor="val_bleu4",
            ctx=setup.ctx,
        )
        trained, metrics = trainer.train(config, task, run)
        model = cast("Captioner", trained)
        run.write(
            captioner_checkpoint.WEIGHTS_FILE, lambda path: captioner_checkpoint.save(captioner.metadata, model, path)
        )
        split = "test" if config.evaluate_test else "val"
        features = val_features if split == "val" else load_backbone_features(config, setup, "test")
        run.extra_summary |= {
            "bleu_rule": evaluation.BLEU_PROTOCOL,
            "beam": config.beam,
            "alpha": config.alpha,
            "evaluated_split": split,
        }
        return metrics | evaluate_split(config, setup, model, features, split)

    def evaluate(self, config: CaptionerConfig, base: Path, state: State, splits: Sequence[str]) -> dict[str, float]:
        """Evaluate the weights of a checkpoint by beam search; the name of each metric is prefixed by its split."""
        setup = build_setup(config)
        model = setup.captioner.model
        checkpoint.load_eval_weights(model, state, str(base))
        metrics: dict[str, float] = {}
        for split in splits or [split for split in ("val", "test") if setup.dataset.splits.get(split)]:
            features = load_backbone_features(config, setup, split)
            samples = samples_of(config, setup.dataset, split)
            captions = EncodedCaptions(samples, setup.captioner.vocabulary, config.length)
            of_split = evaluate_split(config, setup, model, features, split)
            of_split["loss"] = evaluation.mean_loss(model, features, captions, setup.ctx)
            metrics |= {f"{split}_{name}": value for name, value in of_split.items()}
        return metrics

    def plan(self, config: CaptionerConfig, base: Path) -> dict[str, Any]:
        """Describe what a run would do; captions are read, no photo is opened."""
        setup = build_setup(config)
        model = setup.captioner.model
        steps_per_epoch = max(1, len(samples_of(config, setup.dataset, "train")) // config.batch_size)
        return {
            "model": f"{model.cell}, layers {model.layers}",
            "parameters": sum(p.numel() for p in model.parameters()),
            "vocabulary": f"{len(setup.captioner.vocabulary)} tokens",
            "photos": ", ".join(f"{len(samples)} {split}" for split, samples in setup.dataset.splits.items()),
            "steps": config.duration.num_steps(steps_per_epoch) or "as many as fit",
            **setup.ctx.as_dict(),
        }
