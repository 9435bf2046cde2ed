"""What a captioning configuration builds: data, captioner, loss and evaluation."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from cvlab.data import vocabulary
from cvlab.engine import device, loop
from cvlab.engine.task import TrainTask
from cvlab.experiments.captioning import checkpoint as captioner_checkpoint
from cvlab.experiments.captioning import dataset as captions_dataset
from cvlab.experiments.captioning import evaluation, feature_store, self_critical
from cvlab.experiments.captioning.base import CaptionModel
from cvlab.experiments.captioning.batches import CaptionBatch, CaptionLoader, EncodedCaptions
from cvlab.experiments.captioning.checkpoint import CaptionerMetadata, LoadedCaptioner
from cvlab.experiments.captioning.config import SCENE_CAPTIONS, CaptionerConfig
from cvlab.experiments.captioning.dataset import CaptionDataset, CaptionSample
from cvlab.experiments.captioning.feature_store import FeatureSpec
from cvlab.experiments.captioning.self_critical import CiderReward
from cvlab.storage.cache import data_root


@dataclass(frozen=True)
class CaptioningSetup:
    """What a configuration builds."""

    ctx: device.ComputeContext
    dataset: CaptionDataset
    captioner: LoadedCaptioner


def build_setup(config: CaptionerConfig, dataset: CaptionDataset | None = None) -> CaptioningSetup:
    """Load the captions, if none are given; build the vocabulary, and the captioner with seeded random weights."""
    ctx = config.compute_context()
    dataset = dataset or captions_dataset.load_configured(config.data, data_root())
    train = samples_of(config, dataset, "train")
    captions = (vocabulary.tokenize(text) for sample in train for text in sample.captions[: config.data.sentences])
    tokens = vocabulary.build_vocabulary(captions, config.min_word_count).tokens
    metadata = CaptionerMetadata(
        arguments=config.model.builder_arguments() | {"layers": "torch"},  # a loaded captioner runs on torch's layers
        vocabulary=tokens,
        size_px=config.size,
        max_length=config.length,
        strides=config.strides,
        backbone=config.backbone,
        backbone_weights=config.backbone_weights,
        model=config.model.name,
        trained_on=dataset.name,
        extra_features=tuple(block.model_dump() for block in config.extra_features),
    )
    sources = captioner_checkpoint.build_feature_sources(metadata, ctx.device)
    device.seed_everything(config.seed)
    captioner = captioner_checkpoint.build(metadata, sources, ctx.device)
    captioner.model.layers = config.model.builder_arguments()["layers"]
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
    """Return the features of the photos of a split; see `load_photo_features`."""
    samples = samples_of(config, setup.dataset, split)
    return load_photo_features(config, setup, samples, check_interrupt, mirrored)


def load_photo_features(
    config: CaptionerConfig,
    setup: CaptioningSetup,
    samples: Sequence[CaptionSample],
    check_interrupt: Callable[[], None] = lambda: None,
    mirrored: bool = False,
) -> Tensor:
    """Return the backbone's features of photos, float16 (N, L, C), computed if they are not stored."""
    paths = [sample.path for sample in samples]
    spec = FeatureSpec(not setup.captioner.model.has_attention, mirrored)
    return feature_store.load_features(setup.captioner.feature_sources, paths, setup.ctx, spec, check_interrupt)


@dataclass(frozen=True)
class TrainingData:
    """The batches of a training run, the reward of its self-critical epochs, and what it is validated on."""

    loader: CaptionLoader
    reward: CiderReward | None
    val_features: Tensor
    val_captions: EncodedCaptions


def load_training_data(
    config: CaptionerConfig, setup: CaptioningSetup, check_interrupt: Callable[[], None]
) -> TrainingData:
    """Encode the captions and load the features of the training and validation photos."""
    load_split = functools.partial(load_backbone_features, config, setup, check_interrupt=check_interrupt)
    features = load_split("train")
    mirrored_features = load_split("train", mirrored=True) if config.mirror else None
    return make_training_data(config, setup, features, mirrored_features, load_split("val"))


def make_training_data(
    config: CaptionerConfig,
    setup: CaptioningSetup,
    features: Tensor,
    mirrored_features: Tensor | None,
    val_features: Tensor,
) -> TrainingData:
    """Encode the captions of the photos whose features (N, L, C) are given."""
    train, val = (samples_of(config, setup.dataset, split) for split in ("train", "val"))
    vocabulary = setup.captioner.vocabulary
    captions = EncodedCaptions(train, vocabulary, config.length, config.data.sentences)
    loader = CaptionLoader(features, captions, config.batch_size, config.seed, mirrored_features, setup.ctx.device)
    reward = None
    if config.reward_epochs:
        loader.self_critical_from = config.final_epochs_start(config.reward_epochs, loader.sampler.steps_per_epoch)
        reward = CiderReward(train, vocabulary)
    return TrainingData(loader, reward, val_features, EncodedCaptions(val, vocabulary, config.length))


def build_task(
    config: CaptionerConfig,
    setup: CaptioningSetup,
    data: TrainingData,
    evaluate: Callable[[nn.Module], dict[str, float]],
) -> TrainTask:
    """Return what is trained: the captioner, its loss and its batches."""
    return TrainTask(
        model=setup.captioner.model,
        loss_fn=make_loss_fn(config, data.reward),
        get_batch=data.loader.get_batch,
        steps_per_epoch=data.loader.sampler.steps_per_epoch,
        items_per_step=data.loader.sampler.batch_size,
        evaluate=evaluate,
        monitor="val_bleu4",
        ctx=setup.ctx,
        split_batch=functools.partial(CaptionBatch.split, count=config.accumulate) if config.accumulate > 1 else None,
        data_digest=setup.dataset.digest(),
    )


def make_loss_fn(config: CaptionerConfig, reward: CiderReward | None) -> loop.LossFn[CaptionBatch]:
    """Return the loss of a batch: cross-entropy, or the policy gradient in self-critical training."""

    def loss_fn(model: nn.Module, batch: CaptionBatch) -> loop.Losses:
        captioner = cast("CaptionModel", model)
        if batch.is_self_critical and reward is not None:
            return self_critical.self_critical_loss(captioner, batch, reward, config.reward_samples, config.length)
        loss, word_loss = captioner.loss(batch.features, batch.token_ids, batch.photo_indices)
        return {"loss": loss * batch.caption_weight, "word_loss": word_loss * batch.token_weight}

    return loss_fn


def generate(
    config: CaptionerConfig, setup: CaptioningSetup, model: CaptionModel, features: Tensor, beam_width: int
) -> list[list[str]]:
    """Generate the tokens of a caption for each photo whose features are given."""
    return evaluation.generate_captions(
        model, features, setup.captioner.vocabulary, setup.ctx, beam_width, config.length, config.alpha
    )


def validate(config: CaptionerConfig, setup: CaptioningSetup, data: TrainingData, model: nn.Module) -> dict[str, float]:
    """Return `val_loss` and the `val_bleu4` of greedy decoding."""
    captioner = cast("CaptionModel", model)
    captions = generate(config, setup, captioner, data.val_features, beam_width=1)
    loss = evaluation.mean_loss(captioner, data.val_features, data.val_captions, setup.ctx)
    metrics = evaluation.compute_metrics(captions, samples_of(config, setup.dataset, "val"))
    return {"val_loss": loss, "val_bleu4": metrics["bleu4"]}


def evaluate_split(
    config: CaptionerConfig, setup: CaptioningSetup, model: CaptionModel, features: Tensor, split: str
) -> dict[str, float]:
    """Generate captions by beam search for the photos of a split, whose features are given, and score them."""
    samples = samples_of(config, setup.dataset, split)
    captions = generate(config, setup, model, features, config.beam)
    metrics = evaluation.compute_metrics(captions, samples)
    if config.data.name == SCENE_CAPTIONS:
        metrics |= evaluation.compute_scene_accuracy(captions, samples)
    return metrics


def extra_samples(
    config: CaptionerConfig, setup: CaptioningSetup, split: str | None = None
) -> dict[str, Sequence[CaptionSample]]:
    """Return the photos of a split of each `extra` data set that has it; None: of the one evaluated at the end."""
    samples = {extra.name: extra.splits[split or config.final_split(extra.splits)] for extra in setup.dataset.extra}
    return {name: of_set for name, of_set in samples.items() if of_set}


def evaluate_extra(
    config: CaptionerConfig,
    setup: CaptioningSetup,
    model: CaptionModel,
    samples: Mapping[str, Sequence[CaptionSample]],
) -> dict[str, float]:
    """Score photos of `extra` data sets; the name of its data set precedes each metric: `coco_people_bleu4`."""
    metrics: dict[str, float] = {}
    for name, of_set in samples.items():
        captions = generate(config, setup, model, load_photo_features(config, setup, of_set), config.beam)
        metrics |= {f"{name}_{key}": value for key, value in evaluation.compute_metrics(captions, of_set).items()}
    return metrics
