"""Which pixels are evidence for a word of a caption: by how much its log-probability falls when a square is covered."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from cvlab.data.vocabulary import START
from cvlab.errors import ConfigError
from cvlab.experiments.captioning import feature_store
from cvlab.experiments.captioning.decoding import SUPPRESSED, Hypothesis
from cvlab.experiments.captioning.predict import CaptionPhotos, CaptionPredictor
from cvlab.experiments.common import occlusion
from cvlab.experiments.common.photo_batches import CheckInterrupt, Photo
from cvlab.reports import images as reports_images
from cvlab.runs.results import PhotoResult

BATCH_SIZE = 16


class CaptionExplainer:
    """Captions batches of photos as `CaptionPhotos` does, and explains one word of each caption.

    Args:
        caption_photos: Captions the photos.
        word: The word.
        window: Side of the covered square, as a fraction of the photo's longer side.
    """

    def __init__(self, caption_photos: CaptionPhotos, word: str, window: float) -> None:
        self.caption_photos, self.word, self.window = caption_photos, word, window

    def __call__(self, batch: list[Photo], check_interrupt: CheckInterrupt) -> list[PhotoResult]:
        """Return the results of the captioner, with the panel `evidence` if a caption has the word."""
        results, hypotheses = self.caption_photos.caption(batch, check_interrupt)
        predictor, run = self.caption_photos.predictor, self.caption_photos.run
        for photo, result, hypothesis in zip(batch, results, hypotheses, strict=True):
            tokens = predictor.captioner.vocabulary.decode(hypothesis.token_ids)
            if self.word not in tokens:
                sentence = result.values["sentence"]
                run.log(f"warning: {photo.path.name}: its caption does not have {self.word!r}: {sentence}")
                continue
            position = tokens.index(self.word)

            def scores(images: Sequence[Image.Image], hypothesis: Hypothesis = hypothesis, k: int = position) -> Tensor:
                return word_log_prob(predictor, images, hypothesis.token_ids, k)

            values = occlusion.occlusion_map(scores, photo.image, self.window, BATCH_SIZE, check_interrupt)
            title = f"evidence for {self.word!r} in {result.values['sentence']!r}: {photo.path.name}"
            panel = occlusion.draw(photo.image, ("photo", photo.image), values, f"evidence for {self.word!r}", title)
            result.files["evidence"] = f"images/{photo.label}-evidence.png"
            run.write_bytes(result.files["evidence"], reports_images.png(panel))
        return results


@torch.inference_mode()
def word_log_prob(
    predictor: CaptionPredictor, images: Sequence[Image.Image], token_ids: Sequence[int], position: int
) -> Tensor:
    """Return the log-probability (N,) of a token of a caption, after those before it, for each of N photos.

    It is the captioner's own; what guides it has no part.

    Args:
        predictor: The captioner.
        images: RGB photos.
        token_ids: The tokens of the caption, without START.
        position: Position of the token in `token_ids`.
    """
    captioner, ctx = predictor.captioner, predictor.ctx
    maps = feature_store.compute_maps(captioner.feature_sources, images, ctx)
    features = feature_store.combine_maps(maps, not captioner.model.has_attention, len(captioner.feature_sources) > 1)
    tokens = torch.tensor([START, *token_ids[:position]], device=features.device).expand(len(images), -1)
    with ctx.autocast():
        logits = captioner.model(features, tokens, torch.arange(len(images), device=features.device))[:, -1].float()
    logits[:, SUPPRESSED] = float("-inf")
    log_probs: Tensor = logits.log_softmax(1)[:, token_ids[position]]
    return log_probs.cpu()


def require_any(results: Sequence[PhotoResult], word: str) -> None:
    """Raise ConfigError if no caption has a word."""
    if not any("evidence" in result.files for result in results):
        sentences = "; ".join(repr(result.values["sentence"]) for result in results[:3])
        raise ConfigError(f"no caption has the word {word!r}", f"name a word of {sentences}")
