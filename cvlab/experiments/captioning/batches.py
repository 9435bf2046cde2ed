"""Training batches: photo features with the encoded captions of each photo."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cvlab.data import rng
from cvlab.data.vocabulary import PAD, Vocabulary, tokenize
from cvlab.distributed import sharding
from cvlab.engine.device import upload
from cvlab.experiments.captioning.dataset import CaptionSample


@dataclass(frozen=True)
class CaptionBatch:
    """B photos with their M captions.

    Attributes:
        features: float32 (B, L, C).
        photo_ids: int64 (B,), indices of the photos in the training set.
        token_ids: int64 (M, T), the captions, padded with PAD.
        photo_indices: int64 (M,), which of the B photos each caption is about.
        is_self_critical: Whether this step is one of self-critical training, which samples captions instead.
        caption_weight: Weight of the loss, a mean over captions: M times the number of parts / captions of the whole
            batch, so that the mean over the parts of a batch is the mean over its captions. 1 if the batch is no part.
        token_weight: The same for the mean over tokens.
    """

    features: Tensor
    photo_ids: Tensor
    token_ids: Tensor
    photo_indices: Tensor
    is_self_critical: bool
    caption_weight: float | Tensor = 1.0
    token_weight: float | Tensor = 1.0

    def split(self, count: int) -> "list[CaptionBatch]":
        """Return `count` parts with equally many photos; M is not 0 in any."""
        num_tokens = count_targets(self.token_ids)
        num_photos = len(self.features) // count
        parts = []
        for number in range(count):
            photos = slice(number * num_photos, (number + 1) * num_photos)
            chosen = (self.photo_indices >= photos.start) & (self.photo_indices < photos.stop)
            token_ids = self.token_ids[chosen]
            parts.append(
                CaptionBatch(
                    features=self.features[photos],
                    photo_ids=self.photo_ids[photos],
                    token_ids=token_ids,
                    photo_indices=self.photo_indices[chosen] - photos.start,
                    is_self_critical=self.is_self_critical,
                    caption_weight=len(token_ids) * count / len(self.token_ids),
                    token_weight=count_targets(token_ids) * count / num_tokens,
                )
            )
        return parts


def count_targets(token_ids: Tensor) -> Tensor:
    """Return the number of tokens of captions (M, T) that are to be predicted: all but PAD and the first ones."""
    return (token_ids[:, 1:] != PAD).sum()


class EncodedCaptions:
    """The captions of photos as token ids.

    Args:
        samples: The photos.
        vocabulary: The known words.
        max_length: Number of tokens of each row, START and END included; longer captions are cut.
        captions_per_photo: Use only this number of captions of each photo; None for all.
    """

    def __init__(
        self,
        samples: Sequence[CaptionSample],
        vocabulary: Vocabulary,
        max_length: int,
        captions_per_photo: int | None = None,
    ) -> None:
        captions = [[tokenize(caption) for caption in sample.captions[:captions_per_photo]] for sample in samples]
        counts = torch.tensor([len(of_photo) for of_photo in captions])
        self.token_ids = vocabulary.encode((tokens for of_photo in captions for tokens in of_photo), max_length)
        self.offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])

    def select(self, photo_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the captions of B photos.

        Args:
            photo_ids: int64 (B,), indices of photos.

        Returns:
            Token ids (M, T), T being the length of the longest one, and which of the B photos each is about, (M,).
        """
        rows = [torch.arange(int(self.offsets[k]), int(self.offsets[k + 1])) for k in photo_ids.tolist()]
        photo_indices = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor([len(row) for row in rows]))
        token_ids = self.token_ids[torch.cat(rows)]
        longest = int((token_ids != PAD).sum(1).max()) if len(token_ids) else 1
        return token_ids[:, :longest], photo_indices


class CaptionLoader:
    """The batch of each step as a pure function of (seed, step): all photos once per epoch, in a shuffled order.

    Args:
        features: Features of all training photos (N, L, C), on the CPU.
        captions: Their captions.
        batch_size: Number of photos of a batch, over all processes.
        seed: Seed of order and mirroring.
        mirrored: Features of the mirrored photos, used for half of each batch at random; None for no mirroring.
        device: Where the batches go.
    """

    def __init__(
        self,
        features: Tensor,
        captions: EncodedCaptions,
        batch_size: int,
        seed: int,
        mirrored: Tensor | None,
        device: torch.device,
    ) -> None:
        self.features, self.mirrored, self.captions, self.device = features, mirrored, captions, device
        self.seed = seed
        self.self_critical_from: int | None = None  # first step of self-critical training
        self.sampler = rng.BatchSampler(seed, len(features), batch_size, torch.device("cpu"))

    def get_batch(self, step: int) -> CaptionBatch:
        """Return this process's shard of the batch of a step."""
        epoch, photo_ids = self.sampler(step)
        photo_ids = sharding.shard(photo_ids)
        features = self.features[photo_ids]
        if self.mirrored is not None:
            is_mirrored = rng.uniform(self.seed, epoch, photo_ids, "mirrored") < 0.5
            features[is_mirrored] = self.mirrored[photo_ids[is_mirrored]]
        token_ids, photo_indices = self.captions.select(photo_ids)
        return CaptionBatch(
            features=upload(features.float(), self.device),
            photo_ids=photo_ids,
            token_ids=upload(token_ids, self.device),
            photo_indices=upload(photo_indices, self.device),
            is_self_critical=self.self_critical_from is not None and step >= self.self_critical_from,
        )
