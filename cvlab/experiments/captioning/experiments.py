"""Captioning: train an image captioner, caption photos. The methods import torch."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from cvlab.config.metrics import Metric
from cvlab.engine.config import TRAIN_METRICS
from cvlab.experiments.base import (
    Evaluable,
    HasPhotoModule,
    HasSummary,
    HasTrainTask,
    PhotoExperiment,
    ShowsData,
    State,
    default_splits,
)
from cvlab.experiments.captioning.config import SCENE_CAPTIONS, WEIGHTS_FILE, CaptionConfig, CaptionerConfig
from cvlab.runs.interrupt import StopRequest
from cvlab.runs.results import Column
from cvlab.runs.run_dir import RunDir

if TYPE_CHECKING:
    from cvlab.engine.task import TrainTask
    from cvlab.experiments.captioning.base import CaptionModel
    from cvlab.experiments.common.data_overview import DataOverview
    from cvlab.models.photo_module import PhotoModule
    from cvlab.models.summary import SummarySpec

COLUMNS = (
    Column("sentence", "caption"),
    Column("picture", "attention", is_file=True),
    Column("evidence", "evidence", is_file=True),
)


class CaptionExperiment(PhotoExperiment[CaptionConfig]):
    """Caption photos with a trained captioner.

    References:
        Xu et al., 2015, "Show, attend and tell".

    Differences from the paper:
        The weights file names its backbone and holds its vocabulary.

    Metrics:
        `num_photos`, `mean_words`.

    Command:
        cvlab caption photo.jpg
    """

    name = "caption"
    Config = CaptionConfig
    columns = COLUMNS
    metrics = (Metric("num_photos"), Metric("mean_words"))

    def run(self, config: CaptionConfig, run: RunDir) -> dict[str, float]:
        """Caption every photo."""
        from cvlab.experiments.captioning import explanation
        from cvlab.experiments.captioning.predict import CaptionPhotos, describe, load_predictor
        from cvlab.experiments.common import photo_batches

        predictor = self.load_once(config, load_predictor)
        run.log(f"captioning with {describe(predictor)}")
        if config.attention or config.explain_word is not None:
            run.folder("images")
        work: photo_batches.BatchFn = CaptionPhotos(predictor, run)
        if config.explain_word is not None:
            work = explanation.CaptionExplainer(CaptionPhotos(predictor, run), config.explain_word, config.window)
        results = photo_batches.run(config, run, work, "caption", self.columns)
        if config.explain_word is not None:
            explanation.require_any(results, config.explain_word)
        num_words = sum(len(result.values["sentence"].split()) for result in results)
        return {"num_photos": len(results), "mean_words": num_words / len(results)}

    def plan(self, config: CaptionConfig, base: Path) -> dict[str, Any]:
        """Describe what a run would do. Raises DataError if the weights or all photos are missing."""
        from cvlab.experiments.captioning.predict import describe, load_predictor
        from cvlab.experiments.common import photo_batches

        predictor = self.load_once(config, load_predictor)
        return {
            "photos": len(photo_batches.resolve_images(config.images)[1]),
            "captioner": describe(predictor),
            "parameters": sum(p.numel() for p in predictor.captioner.model.parameters()),
            **predictor.ctx.as_dict(),
        }


CAPTION_METRICS = (
    Metric("cider", better="higher"),
    Metric("exact_match", "fraction", "higher"),
    *(Metric(f"bleu{n}", "fraction", "higher") for n in range(1, 5)),
)


def _has_scenes(config: CaptionerConfig) -> bool:
    return SCENE_CAPTIONS in (config.data.name, config.data.fallback)


def _has_extra(config: CaptionerConfig) -> bool:
    return bool(config.data.extra)


class CaptionerExperiment(
    ShowsData[CaptionerConfig],
    Evaluable[CaptionerConfig],
    HasPhotoModule[CaptionerConfig],
    HasSummary[CaptionerConfig],
    HasTrainTask[CaptionerConfig],
):
    """Train an image captioner: an RNN, an LSTM or an LSTM with attention on the features of a frozen backbone.

    References:
        Vinyals et al., 2015, "Show and tell"; Xu et al., 2015, "Show, attend and tell"; EECS 498, assignment 6.

    Differences from the paper:
        The backbone's features are computed once and kept on the disk; layer normalization before the output
        projection.

    Metrics:
        `val_loss`, `val_bleu4` (greedy) while training; at the end, by beam search on the evaluated split (`test`
        with evaluate_test, else `val`), `bleu1` to `bleu4`, `cider`, `exact_match`, with `extra` data sets also as
        `coco_people_bleu4`; on scene_captions also `shape_accuracy`, `color_accuracy`, `relation_accuracy`.

    Command:
        cvlab train configs/caption_scenes.yaml
    """

    name = "captioner"
    Config = CaptionerConfig
    metrics = (
        *TRAIN_METRICS,
        Metric("val_loss", better="lower"),
        Metric("val_bleu4", "fraction", "higher"),
        Metric("best_val_bleu4", "fraction", "higher"),
        Metric("word_loss", better="lower"),
        *CAPTION_METRICS,
        *(Metric(f"*_{metric.name}", metric.unit, metric.better, _has_extra) for metric in CAPTION_METRICS),
        *(Metric(f"{part}_accuracy", "fraction", "higher", _has_scenes) for part in ("shape", "color", "relation")),
    )

    def data_overview(self, config: CaptionerConfig, base: Path, num_samples: int) -> "DataOverview":
        """Return what the data set consists of, with some training photos and captions."""
        from cvlab.experiments.captioning import dataset, overview
        from cvlab.storage.cache import data_root

        return overview.build(dataset.load_configured(config.data, data_root()), num_samples)

    def run(self, config: CaptionerConfig, run: RunDir) -> dict[str, float]:
        """Compute features, train, and evaluate generated captions; save the weights in a file of their own."""
        from cvlab.engine import trainer
        from cvlab.experiments.captioning import checkpoint as captioner_checkpoint
        from cvlab.experiments.captioning import evaluation
        from cvlab.experiments.captioning.setup import (
            build_setup,
            build_task,
            evaluate_extra,
            evaluate_split,
            extra_samples,
            load_backbone_features,
            load_photo_features,
            load_training_data,
            validate,
        )

        setup = build_setup(config)
        captioner = setup.captioner
        with StopRequest() as stop:
            check_interrupt = functools.partial(stop.raise_if_set, 0, run.path.name)
            data = load_training_data(config, setup, check_interrupt)
            split = config.final_split(setup.dataset.splits)
            if split == "test":  # stored on the disk; a damaged photo ends the run before it is trained
                load_backbone_features(config, setup, "test", check_interrupt)
            extra = extra_samples(config, setup)
            for samples in extra.values():
                load_photo_features(config, setup, samples, check_interrupt)
        if config.evaluate_test and split != "test":
            run.log(f"warning: {setup.dataset.name} has no test split; val is evaluated at the end")

        task = build_task(config, setup, data, functools.partial(validate, config, setup, data))
        trained, metrics = trainer.train(config, task, run)
        model = cast("CaptionModel", trained)
        run.write(WEIGHTS_FILE, lambda path: captioner_checkpoint.save(captioner.metadata, model, path))
        features = data.val_features if split == "val" else load_backbone_features(config, setup, "test")
        run.extra_summary |= {
            "bleu_rule": evaluation.BLEU_PROTOCOL,
            "beam": config.beam,
            "alpha": config.alpha,
            "evaluated_split": split,
            **{f"evaluated_split_{each.name}": config.final_split(each.splits) for each in setup.dataset.extra},
        }
        metrics |= evaluate_split(config, setup, model, features, split)
        return metrics | evaluate_extra(config, setup, model, extra)

    def evaluate(self, config: CaptionerConfig, base: Path, state: State, splits: Sequence[str]) -> dict[str, float]:
        """Evaluate the weights of a checkpoint by beam search; the name of each metric is prefixed by its split."""
        from cvlab.experiments.captioning import evaluation
        from cvlab.experiments.captioning.batches import EncodedCaptions
        from cvlab.experiments.captioning.setup import (
            build_setup,
            evaluate_extra,
            evaluate_split,
            extra_samples,
            load_backbone_features,
            samples_of,
        )
        from cvlab.runs import checkpoint

        setup = build_setup(config)
        model = setup.captioner.model
        checkpoint.load_eval_weights(model, state, str(base))
        metrics: dict[str, float] = {}
        for split in splits or default_splits(setup.dataset.splits):
            features = load_backbone_features(config, setup, split)
            samples = samples_of(config, setup.dataset, split)
            captions = EncodedCaptions(samples, setup.captioner.vocabulary, config.length)
            of_split = evaluate_split(config, setup, model, features, split)
            of_split["loss"] = evaluation.mean_loss(model, features, captions, setup.ctx)
            if split != "train":  # that of the extra data sets is part of it
                of_split |= evaluate_extra(config, setup, model, extra_samples(config, setup, split))
            metrics |= {f"{split}_{name}": value for name, value in of_split.items()}
        return metrics

    def photo_module(self, config: CaptionerConfig, base: Path, weights: str, device: str) -> "PhotoModule":
        """Return the captioner of a completed run for images in memory."""
        from cvlab.experiments.captioning.predict import CaptionerModule, load_predictor
        from cvlab.runs import checkpoint

        checkpoint.require_last(weights, self.name)
        settings = CaptionConfig(experiment=CaptionExperiment.name, name="predict", weights=str(base), device=device)
        return CaptionerModule(load_predictor(settings)).eval()

    def train_task(self, config: CaptionerConfig, base: Path, check_interrupt: Callable[[], None]) -> "TrainTask":
        """Return the untrained captioner, its loss and its batches; features of the photos are computed."""
        from cvlab.experiments.captioning.setup import build_setup, build_task, load_training_data

        setup = build_setup(config)
        return build_task(config, setup, load_training_data(config, setup, check_interrupt), lambda _: {})

    def synthetic_task(self, config: CaptionerConfig, base: Path) -> "TrainTask":
        """Return the untrained captioner, its loss and batches of one photo with random words."""
        from cvlab.experiments.captioning import synthetic

        return synthetic.build_task(config)

    def summary_spec(self, config: CaptionerConfig, base: Path) -> "SummarySpec":
        """Return backbones and decoder, and a black image, whose caption has `length` tokens; no photo is opened."""
        import torch
        import torch.nn.functional as F

        from cvlab.experiments.captioning.feature_store import combine_maps
        from cvlab.experiments.captioning.setup import build_setup
        from cvlab.models.summary import SummarySpec

        setup = build_setup(config.model_copy(update={"device": "cpu", "precision": "float32"}))
        sources, model = setup.captioner.feature_sources, setup.captioner.model
        token_ids = torch.ones(1, config.length - 1, dtype=torch.int64)  # the last token is predicted, not read

        def forward(images: torch.Tensor) -> object:
            by_layer = [
                (source.extractor.names, source.extractor.module(F.interpolate(images, source.size_px)))
                for source in sources
            ]
            maps = [maps_of[name] for names, maps_of in by_layer for name in names]
            features = combine_maps(maps, not model.has_attention, len(sources) > 1)
            return model(features, token_ids, torch.zeros(1, dtype=torch.int64))

        example = torch.zeros(1, 3, config.size, config.size)
        backbones = {f"backbone{k or ''}": source.extractor.module for k, source in enumerate(sources)}
        return SummarySpec({**backbones, "decoder": model}, forward, example)

    def plan(self, config: CaptionerConfig, base: Path) -> dict[str, Any]:
        """Describe what a run would do; captions are read, no photo is opened."""
        from cvlab.engine import parameters
        from cvlab.experiments.captioning.setup import build_setup, samples_of

        setup = build_setup(config)
        model = setup.captioner.model
        parameters.build_optimizer(config, model)
        steps_per_epoch = max(1, len(samples_of(config, setup.dataset, "train")) // config.batch_size)
        return {
            "model": f"{model.label}, layers {model.layers}",
            "parameters": sum(p.numel() for p in model.parameters()),
            "vocabulary": f"{len(setup.captioner.vocabulary)} tokens",
            "evaluated_split": config.final_split(setup.dataset.splits),
            "photos": ", ".join(f"{len(samples)} {split}" for split, samples in setup.dataset.splits.items()),
            "steps": config.duration.num_steps(steps_per_epoch) or "as many as fit",
            **setup.ctx.as_dict(),
        }
