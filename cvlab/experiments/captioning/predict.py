"""Caption photos with a trained captioner, and draw what it attends to."""

from collections.abc import Sequence
from typing import Any

from PIL import Image
from torch import Tensor, nn

from cvlab.data import photos
from cvlab.engine import device
from cvlab.errors import ConfigError
from cvlab.experiments.captioning import checkpoint, decoding, drawing, feature_store
from cvlab.experiments.captioning.checkpoint import LoadedCaptioner
from cvlab.experiments.captioning.config import WEIGHTS_FILE, CaptionConfig
from cvlab.experiments.captioning.decoding import Hypothesis
from cvlab.experiments.captioning.feature_store import FeatureSpec
from cvlab.experiments.common import weights
from cvlab.experiments.common.photo_batches import CheckInterrupt, Photo
from cvlab.models.photo_module import PhotoModule, require_batch
from cvlab.reports import images as reports_images
from cvlab.runs.results import PhotoResult
from cvlab.runs.run_dir import RunDir


def generate(
    images: Sequence[Image.Image], config: CaptionConfig, captioner: LoadedCaptioner, ctx: device.ComputeContext
) -> tuple[Tensor, list[Hypothesis]]:
    """Return the features (N, L, C) of RGB photos and their captions by beam search."""
    max_length, spec = captioner.metadata.max_length, FeatureSpec(pool=not captioner.model.has_attention)
    features = feature_store.extract_features(captioner.feature_sources, images, ctx, spec).to(ctx.device)
    with ctx.autocast():
        return features, decoding.beam_search(captioner.model, features, config.beam, max_length - 1, config.alpha)


class CaptionerModule(PhotoModule):
    """A captioner of images of any size, which are rounded to 8 bits, as photos are."""

    def __init__(self, config: CaptionConfig, captioner: LoadedCaptioner, ctx: device.ComputeContext) -> None:
        super().__init__()
        self.config, self.captioner, self.ctx = config, captioner, ctx
        self.model = captioner.model
        self.backbones = nn.ModuleList(source.extractor.model.module for source in captioner.feature_sources)

    def forward(self, images: Tensor) -> list[str]:
        """Return the captions of images (N, 3, H, W) in [0, 1]."""
        return [row["sentence"] for row in self.predict([photos.to_image(image) for image in require_batch(images)])]

    def predict_batch(self, images: Sequence[Image.Image]) -> list[dict[str, Any]]:
        """Return the `sentence` of each photo, and its length-normalized log-probability as `score`."""
        _, hypotheses = generate(images, self.config, self.captioner, self.ctx)
        vocabulary = self.captioner.vocabulary
        return [
            {"sentence": " ".join(vocabulary.decode(hypothesis.token_ids)), "score": hypothesis.score}
            for hypothesis in hypotheses
        ]


class CaptionPhotos:
    """Captions batches of photos and, if asked for, draws their attention maps into the run directory."""

    def __init__(
        self, config: CaptionConfig, captioner: LoadedCaptioner, ctx: device.ComputeContext, run: RunDir
    ) -> None:
        self.config, self.captioner, self.ctx, self.run = config, captioner, ctx, run

    def __call__(self, batch: list[Photo], check_interrupt: CheckInterrupt) -> list[PhotoResult]:
        """Return the `sentence` of each photo, and its length-normalized log-probability as `score`."""
        check_interrupt()
        features, hypotheses = generate([photo.image for photo in batch], self.config, self.captioner, self.ctx)
        results = []
        for k, (photo, hypothesis) in enumerate(zip(batch, hypotheses, strict=True)):
            tokens = self.captioner.vocabulary.decode(hypothesis.token_ids)
            result = PhotoResult(str(photo.path), {"sentence": " ".join(tokens), "score": hypothesis.score})
            if self.config.attention:
                result.files["picture"] = self._draw_attention(photo, features[k : k + 1], hypothesis, tokens)
            results.append(result)
        return results

    def _draw_attention(self, photo: Photo, features: Tensor, hypothesis: Hypothesis, tokens: list[str]) -> str:
        """Draw the attention maps of a caption; return the name of the file in the run directory."""
        maps = decoding.attention_weights(self.captioner.model, features, hypothesis.token_ids)
        maps = maps[: len(tokens)].float().cpu()
        side = round(maps.shape[1] ** 0.5)
        name = f"images/{photo.label}-attention.png"
        sheet = drawing.attention_sheet(photo.image, tokens, maps.view(-1, side, side), photo.path.name)
        self.run.write_bytes(name, reports_images.png(sheet))
        return name


def load_captioner(config: CaptionConfig) -> tuple[device.ComputeContext, LoadedCaptioner]:
    """Select the device and load the captioner. Raises ConfigError if attention is asked for and it has none."""
    ctx = device.select_device(config.device, config.precision, config.threads)
    name = config.weights or str(weights.BUNDLED_WEIGHTS / WEIGHTS_FILE)
    path = weights.resolve_weights_path(name, WEIGHTS_FILE, "captioner")
    captioner = checkpoint.load(path, ctx.device)
    if config.attention and not captioner.model.has_attention:
        raise ConfigError(
            f"attention: a captioner of kind {captioner.model.label} has no attention weights",
            "leave attention out, or use a captioner with cell attention_lstm, or a transformer",
        )
    return ctx, captioner


def describe(config: CaptionConfig, captioner: LoadedCaptioner) -> str:
    """Describe a captioner in one line."""
    source = config.weights or "bundled weights"
    trained_on = captioner.metadata.trained_on
    return f"{captioner.model.label} ({source}): {len(captioner.vocabulary)} words, trained on {trained_on}"
