"""Caption photos with a trained captioner, and draw what it attends to."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from cvlab.data import photos
from cvlab.engine import device
from cvlab.errors import ConfigError
from cvlab.experiments.captioning import checkpoint, decoding, drawing, feature_store, guidance
from cvlab.experiments.captioning.checkpoint import LoadedCaptioner
from cvlab.experiments.captioning.config import WEIGHTS_FILE, CaptionConfig
from cvlab.experiments.captioning.decoding import Hypothesis
from cvlab.experiments.captioning.guidance import Guide, Observer
from cvlab.experiments.common import weights
from cvlab.experiments.common.photo_batches import CheckInterrupt, Photo
from cvlab.models.photo_module import PhotoModule, require_batch
from cvlab.reports import images as reports_images
from cvlab.runs.results import PhotoResult
from cvlab.runs.run_dir import RunDir


@dataclass(frozen=True)
class CaptionPredictor:
    """A captioner that is ready to caption photos; `observer` is None if it is not guided."""

    config: CaptionConfig
    captioner: LoadedCaptioner
    ctx: device.ComputeContext
    observer: Observer | None

    @torch.inference_mode()
    def generate(self, images: Sequence[Image.Image]) -> tuple[Tensor, list[Hypothesis], list[Guide]]:
        """Return the features (N, L, C) of RGB photos, their captions by beam search, and the guides, if there are."""
        model, vocabulary = self.captioner.model, self.captioner.vocabulary
        sources, max_length = self.captioner.feature_sources, self.captioner.metadata.max_length - 1
        maps = feature_store.compute_maps(sources, images, self.ctx)
        features = feature_store.combine_maps(maps, not model.has_attention, len(sources) > 1)
        guides = self.observer.guides(images, maps[0]) if self.observer else []
        constraints = guidance.word_constraints(guides, vocabulary, max_length, self.ctx.device) if guides else None
        with self.ctx.autocast():
            hypotheses = decoding.beam_search(
                model, features, self.config.beam, max_length, self.config.alpha, constraints
            )
        return features, hypotheses, guides

    def rows(self, hypotheses: Sequence[Hypothesis], guides: Sequence[Guide]) -> list[dict[str, Any]]:
        """Return for each photo the `sentence`, its length-normalized log-probability as `score`, and the `guide`.

        `guide` is what the sentence had to name, see `Guide.as_row`; it is missing without guidance.
        """
        vocabulary = self.captioner.vocabulary
        rows: list[dict[str, Any]] = [
            {"sentence": " ".join(vocabulary.decode(hypothesis.token_ids)), "score": hypothesis.score}
            for hypothesis in hypotheses
        ]
        for row, guide in zip(rows, guides, strict=False):
            row["guide"] = guide.as_row()
        return rows


class CaptionerModule(PhotoModule):
    """A captioner of images of any size, which are rounded to 8 bits, as photos are."""

    def __init__(self, predictor: CaptionPredictor) -> None:
        super().__init__()
        self.predictor = predictor
        self.model = predictor.captioner.model
        self.backbones = nn.ModuleList(source.extractor.model.module for source in predictor.captioner.feature_sources)

    def forward(self, images: Tensor) -> list[str]:
        """Return the captions of images (N, 3, H, W) in [0, 1]."""
        return [row["sentence"] for row in self.predict([photos.to_image(image) for image in require_batch(images)])]

    def predict_batch(self, images: Sequence[Image.Image]) -> list[dict[str, Any]]:
        """Return the rows of `CaptionPredictor.rows`."""
        _, hypotheses, guides = self.predictor.generate(images)
        return self.predictor.rows(hypotheses, guides)


class CaptionPhotos:
    """Captions batches of photos and, if asked for, draws their attention maps into the run directory."""

    def __init__(self, predictor: CaptionPredictor, run: RunDir) -> None:
        self.predictor, self.run = predictor, run

    def __call__(self, batch: list[Photo], check_interrupt: CheckInterrupt) -> list[PhotoResult]:
        """Return the row of `CaptionPredictor.rows` of each photo."""
        return self.caption(batch, check_interrupt)[0]

    def caption(
        self, batch: list[Photo], check_interrupt: CheckInterrupt
    ) -> tuple[list[PhotoResult], list[Hypothesis]]:
        """Return what a call returns, and the captions as tokens."""
        check_interrupt()
        features, hypotheses, guides = self.predictor.generate([photo.image for photo in batch])
        rows = self.predictor.rows(hypotheses, guides)
        results = [PhotoResult(str(photo.path), row) for photo, row in zip(batch, rows, strict=True)]
        if self.predictor.config.attention:
            for k, (photo, result) in enumerate(zip(batch, results, strict=True)):
                result.files["picture"] = self._draw_attention(photo, features[k : k + 1], hypotheses[k])
        return results, hypotheses

    def _draw_attention(self, photo: Photo, features: Tensor, hypothesis: Hypothesis) -> str:
        """Draw the attention maps of a caption; return the name of the file in the run directory."""
        captioner = self.predictor.captioner
        tokens = captioner.vocabulary.decode(hypothesis.token_ids)
        maps = decoding.attention_weights(captioner.model, features, hypothesis.token_ids)
        maps = maps[: len(tokens)].float().cpu()
        side = round(maps.shape[1] ** 0.5)
        name = f"images/{photo.label}-attention.png"
        sheet = drawing.attention_sheet(photo.image, tokens, maps.view(-1, side, side), photo.path.name)
        self.run.write_bytes(name, reports_images.png(sheet))
        return name


def load_predictor(config: CaptionConfig) -> CaptionPredictor:
    """Select the device and load the captioner, and what guides it.

    Raises:
        ConfigError: Attention is asked for and it has none, or guidance and its backbone is no classifier of ImageNet.
    """
    ctx = device.select_device(config.device, config.precision, config.threads)
    name = config.weights or str(weights.BUNDLED_WEIGHTS / WEIGHTS_FILE)
    path = weights.resolve_weights_path(name, WEIGHTS_FILE, "captioner")
    captioner = checkpoint.load(path, ctx.device)
    if config.attention and not captioner.model.has_attention:
        raise ConfigError(
            f"attention: a captioner of kind {captioner.model.label} has no attention weights",
            "leave attention out, or use a captioner with cell attention_lstm, or a transformer",
        )
    is_guided = config.weights is None if config.guide is None else config.guide
    observer = guidance.load_observer(captioner, ctx) if is_guided else None
    return CaptionPredictor(config, captioner, ctx, observer)


def describe(predictor: CaptionPredictor) -> str:
    """Describe a captioner in one line."""
    captioner = predictor.captioner
    source = predictor.config.weights or "bundled weights"
    trained_on = captioner.metadata.trained_on
    if predictor.observer is not None:
        trained_on += f", guided by {guidance.DETECTOR} and {captioner.metadata.backbone}"
    return f"{captioner.model.label} ({source}): {len(captioner.vocabulary)} words, trained on {trained_on}"
