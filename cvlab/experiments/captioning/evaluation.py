"""Batches of photos with their sentences, and how good the sentences are that a captioner says of photos."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cvlab.data import rng
from cvlab.data.vocabulary import END, PAD, UNKNOWN, Vocabulary, tokenize
from cvlab.distributed import sharding
from cvlab.engine.device import ComputeContext
from cvlab.experiments.captioning import decoding, scene_captions
from cvlab.experiments.captioning.dataset import CaptionSample
from cvlab.experiments.captioning.model import Captioner
from cvlab.ops import bleu, cider

BATCH = 64
RULE = "corpus BLEU, closest reference length, no smoothing; lower-cased, split on white space, punctuation dropped"


@dataclass(frozen=True)
class Batch:
    """Features (B, L, C) of photos, which photos they are, (B,), sentences (M, T) as numbers, and whose each is, (M,).

    `is_late`: sentences are to be drawn and judged instead.
    """

    features: Tensor
    photos: Tensor
    words: Tensor
    image: Tensor
    is_late: bool


class Sentences:
    """The sentences of photos as numbers, all photos one after the other."""

    def __init__(self, items: Sequence[CaptionSample], vocabulary: Vocabulary, length: int, most: int | None) -> None:
        some = [[tokenize(sentence) for sentence in item.sentences[:most]] for item in items]
        counts = torch.tensor([len(sentences) for sentences in some])
        self.words = vocabulary.encode((words for sentences in some for words in sentences), length)
        self.first = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])

    def of(self, photos: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sentences (M, T) of some photos, no longer than the longest, and whose each is, (M,)."""
        rows = [torch.arange(int(self.first[k]), int(self.first[k + 1])) for k in photos.tolist()]
        image = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor([len(row) for row in rows]))
        words = self.words[torch.cat(rows)]
        longest = int((words != PAD).sum(1).max()) if len(words) else 1
        return words[:, :longest], image


class Batches:
    """The batch of every step, as a pure function of (seed, step): shuffled epochs over all photos."""

    def __init__(
        self,
        features: Tensor,
        sentences: Sentences,
        batch_size: int,
        seed: int,
        mirrored: Tensor | None,
        device: torch.device,
    ) -> None:
        self.features, self.mirrored, self.sentences, self.device = features, mirrored, sentences, device
        self.seed = seed
        self.late_from: int | None = None  # from this step on sentences are drawn
        self.epochs = rng.Epochs(seed, len(features), batch_size, torch.device("cpu"))

    def __call__(self, step: int) -> Batch:
        """Return the photos of a step, each as it is or mirrored: this process's share."""
        epoch, chosen = self.epochs(step)
        chosen = sharding.shard(chosen)
        features = self.features[chosen]
        if self.mirrored is not None:
            turned = rng.uniform(self.seed, epoch, chosen, "mirrored") < 0.5
            features[turned] = self.mirrored[chosen[turned]]
        words, image = self.sentences.of(chosen)
        is_late = self.late_from is not None and step >= self.late_from
        return Batch(features.float().to(self.device), chosen, words.to(self.device), image.to(self.device), is_late)


class Reward:
    """What drawn sentences about training photos are worth: how much nearer they are to people's than others drawn.

    Papers: Rennie et al., 2017, "Self-critical sequence training"; Luo, 2020, "A better variant of self-critical
    sequence training" (against the mean of the others about the same photo). The end counts as a word of CIDEr-D, so
    that sentences do not break off.
    """

    def __init__(self, items: Sequence[CaptionSample], vocabulary: Vocabulary) -> None:
        numbers = vocabulary.numbers
        self.judge = cider.Cider(
            [
                [[*(numbers.get(word, UNKNOWN) for word in tokenize(text)), END] for text in item.sentences]
                for item in items
            ]
        )

    def gains(self, words: Tensor, photos: Tensor) -> tuple[Tensor, float]:
        """Return by how much each sentence (M, T) drawn beats the others of its photo, (M,); their mean score."""
        count = len(words) // len(photos)
        rows = [[word for word in row[1:] if word != PAD] for row in words.tolist()]
        picture = photos.repeat_interleave(count).tolist()
        scores = torch.tensor([self.judge.score(row, k) for row, k in zip(rows, picture, strict=True)])
        own = scores.view(-1, count)
        others = (own.sum(1, keepdim=True) - own) / max(count - 1, 1)
        return (own - others).flatten(), scores.mean().item()


def reward_loss(net: Captioner, batch: Batch, reward: Reward, count: int, length: int) -> dict[str, Tensor]:
    """Draw sentences and return a loss whose gradient makes the better ones likelier; `reward` is their mean score."""
    words = decoding.draw(net, batch.features, count, length - 1)
    image = torch.arange(len(batch.features), device=words.device).repeat_interleave(count)
    gains, mean = reward.gains(words, batch.photos)
    log_p = net.log_probability(batch.features, words, image)
    return {"loss": -(gains.to(log_p) * log_p).mean(), "reward": log_p.new_tensor(mean)}


@torch.inference_mode()
def loss(net: Captioner, features: Tensor, sentences: Sentences, ctx: ComputeContext) -> float:
    """Return the loss of a set: summed over a sentence's words, a mean over sentences."""
    was_training = net.training
    net.eval()
    total, count = 0.0, 0
    for start in range(0, len(features), BATCH):
        photos = torch.arange(start, min(start + BATCH, len(features)))
        words, image = sentences.of(photos)
        with ctx.autocast():
            value, _ = net.loss(features[photos].float().to(ctx.device), words.to(ctx.device), image.to(ctx.device))
        total, count = total + value.item() * len(words), count + len(words)
    net.train(was_training)
    return total / max(count, 1)


def say(
    net: Captioner,
    features: Tensor,
    vocabulary: Vocabulary,
    ctx: ComputeContext,
    width: int,
    length: int,
    alpha: float,
) -> list[list[str]]:
    """Return the sentence about each photo, in words."""
    found: list[list[str]] = []
    for start in range(0, len(features), BATCH):
        some = features[start : start + BATCH].float().to(ctx.device)
        with ctx.autocast():
            said = decoding.search(net, some, width, length - 1, alpha)
        found += [vocabulary.decode(sentence.words) for sentence in said]
    return found


def measure(found: Sequence[Sequence[str]], items: Sequence[CaptionSample]) -> dict[str, float]:
    """Return BLEU-1 to 4, CIDEr-D and the share of sentences that are exactly one of those that people wrote."""
    references = [[tokenize(sentence) for sentence in item.sentences] for item in items]
    scores = bleu.bleu(found, references)
    exact = sum(list(words) in others for words, others in zip(found, references, strict=True))
    values = {f"bleu{n + 1}": score for n, score in enumerate(scores)}
    return values | {"cider": cider.cider(found, references), "exact": exact / max(len(items), 1)}


def measure_parts(found: Sequence[Sequence[str]], items: Sequence[CaptionSample]) -> dict[str, float]:
    """Return the shares of scenes whose shapes, colours and relation are all said right."""
    right: dict[str, int] = {}
    for words, item in zip(found, items, strict=True):
        said, wanted = (scene_captions.parts(text) for text in (" ".join(words), item.sentences[0]))
        for name, part in wanted.items():
            right[name] = right.get(name, 0) + (said[name] == part)
    return {f"{name}_right": count / len(items) for name, count in right.items()}
