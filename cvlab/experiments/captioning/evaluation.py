"""Evaluate captioners: validation loss, generated captions, and their BLEU and CIDEr-D scores."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cvlab.data.vocabulary import Vocabulary, tokenize
from cvlab.engine.device import ComputeContext
from cvlab.experiments.captioning import decoding, scene_captions
from cvlab.experiments.captioning.base import CaptionModel
from cvlab.experiments.captioning.batches import EncodedCaptions
from cvlab.experiments.captioning.dataset import CaptionSample
from cvlab.ops import bleu, cider

BATCH_SIZE = 64
BLEU_PROTOCOL = (
    "corpus BLEU, closest reference length, no smoothing; lower-cased, split on white space, punctuation dropped"
)


@torch.inference_mode()
def mean_loss(model: CaptionModel, features: Tensor, captions: EncodedCaptions, ctx: ComputeContext) -> float:
    """Return the mean cross-entropy per caption.

    Args:
        model: The captioner; it is put into evaluation mode meanwhile.
        features: Features of N photos (N, L, C).
        captions: The captions of the same photos.
        ctx: Device and precision.
    """
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(features), BATCH_SIZE):
        photo_ids = torch.arange(start, min(start + BATCH_SIZE, len(features)))
        token_ids, photo_indices = captions.select(photo_ids)
        with ctx.autocast():
            loss, _ = model.loss(
                features[photo_ids].float().to(ctx.device), token_ids.to(ctx.device), photo_indices.to(ctx.device)
            )
        total, count = total + loss.item() * len(token_ids), count + len(token_ids)
    model.train(was_training)
    return total / max(count, 1)


def generate_captions(
    model: CaptionModel,
    features: Tensor,
    vocabulary: Vocabulary,
    ctx: ComputeContext,
    beam_width: int,
    max_length: int,
    length_penalty: float,
) -> list[list[str]]:
    """Generate a caption for each photo by beam search.

    Args:
        model: The captioner.
        features: Features of N photos (N, L, C).
        vocabulary: The model's vocabulary.
        ctx: Device and precision.
        beam_width: Number of beams; 1 is greedy decoding.
        max_length: Maximum number of tokens, START and END included.
        length_penalty: Exponent of the length normalization, see `decoding.beam_search`.

    Returns:
        The tokens of N captions.
    """
    captions: list[list[str]] = []
    for start in range(0, len(features), BATCH_SIZE):
        batch = features[start : start + BATCH_SIZE].float().to(ctx.device)
        with ctx.autocast():
            hypotheses = decoding.beam_search(model, batch, beam_width, max_length - 1, length_penalty)
        captions += [vocabulary.decode(hypothesis.token_ids) for hypothesis in hypotheses]
    return captions


def compute_metrics(captions: Sequence[Sequence[str]], samples: Sequence[CaptionSample]) -> dict[str, float]:
    """Score generated captions against the reference captions.

    Args:
        captions: The tokens of one caption for each photo.
        samples: The photos with their reference captions.

    Returns:
        `bleu1` to `bleu4` and `exact_match` (the share of captions that equal one of the references) in [0, 1],
        and `cider` (CIDEr-D) in [0, 10].
    """
    references = [[tokenize(caption) for caption in sample.captions] for sample in samples]
    bleu_scores = bleu.bleu(captions, references)
    num_exact = sum(list(tokens) in of_photo for tokens, of_photo in zip(captions, references, strict=True))
    metrics = {f"bleu{n + 1}": score for n, score in enumerate(bleu_scores)}
    return metrics | {"cider": cider.cider(captions, references), "exact_match": num_exact / max(len(samples), 1)}


def compute_scene_accuracy(captions: Sequence[Sequence[str]], samples: Sequence[CaptionSample]) -> dict[str, float]:
    """Return the shares of generated scenes whose shapes, colors and relation are named correctly.

    Args:
        captions: The tokens of one caption for each scene.
        samples: The scenes of `scene_captions`.

    Returns:
        `shape_accuracy`, `color_accuracy` and `relation_accuracy` in [0, 1].
    """
    num_correct: dict[str, int] = {}
    for tokens, sample in zip(captions, samples, strict=True):
        predicted = scene_captions.parse_caption(" ".join(tokens))
        for part, target in scene_captions.parse_caption(sample.captions[0]).items():
            num_correct[part] = num_correct.get(part, 0) + (predicted[part] == target)
    return {f"{part}_accuracy": count / len(samples) for part, count in num_correct.items()}
