"""Self-critical sequence training: a policy gradient whose reward is the CIDEr-D score of sampled captions.

References:
    Rennie et al., 2017, "Self-critical sequence training for image captioning".
    Luo, 2020, "A better variant of self-critical sequence training" (the baseline of a sample is the mean reward of
    the other samples of the same photo).

END counts as a token of CIDEr-D, so that captions do not break off.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cvlab.data.vocabulary import END, PAD, UNKNOWN, Vocabulary, tokenize
from cvlab.experiments.captioning import decoding
from cvlab.experiments.captioning.base import CaptionModel
from cvlab.experiments.captioning.batches import CaptionBatch
from cvlab.experiments.captioning.dataset import CaptionSample
from cvlab.ops import cider


class CiderReward:
    """The reward of captions sampled for training photos: CIDEr-D against all captions of the photo."""

    def __init__(self, samples: Sequence[CaptionSample], vocabulary: Vocabulary) -> None:
        ids = vocabulary.token_to_id
        self.scorer = cider.Cider(
            [
                [[*(ids.get(token, UNKNOWN) for token in tokenize(caption)), END] for caption in sample.captions]
                for sample in samples
            ]
        )

    def advantages(self, token_ids: Tensor, photo_ids: Tensor) -> tuple[Tensor, float]:
        """Return the advantages of sampled captions and their mean reward.

        Args:
            token_ids: Captions (M, T), starting with START; those of a photo are consecutive.
            photo_ids: Indices (B,) of the photos in the training set; each has M / B captions.

        Returns:
            The reward of each caption minus the mean reward of the other captions of its photo, (M,), and the mean
            reward of all.
        """
        num_samples = len(token_ids) // len(photo_ids)
        captions = [[token_id for token_id in row[1:] if token_id != PAD] for row in token_ids.tolist()]
        photo_of = photo_ids.repeat_interleave(num_samples).tolist()
        rewards = torch.tensor(
            [self.scorer.score(caption, photo_id) for caption, photo_id in zip(captions, photo_of, strict=True)]
        )
        by_photo = rewards.view(-1, num_samples)
        baseline = (by_photo.sum(1, keepdim=True) - by_photo) / max(num_samples - 1, 1)
        return (by_photo - baseline).flatten(), rewards.mean().item()


def self_critical_loss(
    model: CaptionModel, batch: CaptionBatch, reward: CiderReward, num_samples: int, max_length: int
) -> dict[str, Tensor]:
    """Sample captions and return the loss whose gradient is the policy gradient.

    Args:
        model: The captioner.
        batch: The photos; its captions are not used.
        reward: Scores captions of training photos.
        num_samples: Number of captions sampled for each photo.
        max_length: Maximum number of tokens, START and END included.

    Returns:
        `loss` and the mean `reward` of the samples, scalars.
    """
    token_ids = decoding.sample(model, batch.features, num_samples, max_length - 1)
    photo_indices = torch.arange(len(batch.features), device=token_ids.device).repeat_interleave(num_samples)
    advantages, mean_reward = reward.advantages(token_ids, batch.photo_ids)
    # Probabilities are those that the samples were drawn with. If the tokens that are never drawn had a share, the
    # gradient would move probability to them, whose captions are never scored.
    log_p = model.log_prob(batch.features, token_ids, photo_indices, decoding.SUPPRESSED)
    return {"loss": -(advantages.to(log_p) * log_p).mean(), "reward": log_p.new_tensor(mean_reward)}
