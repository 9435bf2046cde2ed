"""What all captioners share: the projection of photo features, next-token logits, and the loss of captions.

Shapes: N photos with L spatial positions of C channels each; M captions of T tokens; V tokens in the vocabulary;
H is the size of the hidden states and of the projected features. Where M > N, each photo has several captions.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from cvlab.data.vocabulary import PAD
from cvlab.engine.device import upcast
from cvlab.experiments.captioning.config import Layers, Projection
from cvlab.layers import modules, sequence

# The output projection gets a multiple of this number of rows. oneDNN caches the kernels of up to 1,024 shapes, about
# 3 MB each, and every batch has another number of tokens.
ROWS_MULTIPLE = 128
MINUS_INF = -1e9  # finite, so that sums of it stay comparable


class DecoderState(Protocol):
    """The state of M captions that are being decoded, of N photos.

    Captions i * M / N to (i + 1) * M / N - 1 are about photo i.
    """

    def select(self, indices: Tensor) -> Self:
        """Return the state of some of the captions, by index, the same number for each photo; indices may repeat."""
        ...


class CaptionModel(nn.Module, ABC):
    """Next-token logits from photo features and the tokens so far.

    `layers` selects torch's kernels or the hand-written ones; both have the same state_dict.

    Attributes:
        label: What kind of decoder it is, in a word; set by subclasses.
        has_attention: Whether it attends to spatial positions; if not, it takes pooled features. Set by subclasses.
        projection: A `feature_projection`, set by subclasses.

    Args:
        hidden_dim: Size H of the hidden states and of the projected features.
        dropout: Dropout before the output projection.
        feature_dropout: Dropout on the features.
        layers: `torch` or `manual` (hand-written forward and backward passes).
        positional: Append the x and y coordinates of each spatial position to its features.
    """

    label: str
    has_attention: bool
    projection: nn.Module

    def __init__(
        self, hidden_dim: int, dropout: float, feature_dropout: float, layers: Layers, positional: bool
    ) -> None:
        super().__init__()
        self.layers, self.positional = layers, positional
        self.norm = nn.LayerNorm(hidden_dim)
        self.dropout, self.feature_dropout = nn.Dropout(dropout), nn.Dropout(feature_dropout)

    @abstractmethod
    def hidden_states(self, context: Tensor, token_ids: Tensor) -> Tensor:
        """Return the hidden state after each token of whole captions.

        Args:
            context: Projected features (N, L, H); M / N consecutive captions share a photo.
            token_ids: int64 (M, T).

        Returns:
            Hidden states (M, T, H).
        """

    @abstractmethod
    def project_output(self, hidden_states: Tensor) -> Tensor:
        """Return next-token logits (..., V) for normalized hidden states (..., H)."""

    @abstractmethod
    def initial_state(self, features: Tensor) -> Any:
        """Return the `DecoderState` before the first token, for one caption of each photo (N, L, C)."""

    @abstractmethod
    def step(self, state: Any, token_ids: Tensor) -> tuple[Tensor, Any, Tensor | None]:
        """Decode one token of M captions.

        Args:
            state: The state before the token.
            token_ids: int64 (M,).

        Returns:
            Next-token logits (M, V), the new state, and the attention weights (M, L), None without attention.
        """

    def project(self, features: Tensor) -> Tensor:
        """Project features (N, L, C) to the size of the recurrent state, (N, L, H)."""
        features = self.feature_dropout(features)
        if self.positional:
            coordinates = _grid_coordinates(features.shape[1], features)
            features = torch.cat([features, coordinates.expand(len(features), -1, -1)], 2)
        context: Tensor = self.projection(features)
        return context

    def _project_for(self, features: Tensor, photo_indices: Tensor) -> Tensor:
        """Return the projected features for captions of the photos `photo_indices` (M,): (N, L, H) or (M, L, H).

        If all photos have the same number of captions, in order, each photo's features are shared by its captions:
        that takes a third of the time.
        """
        context = self.project(features)
        captions_per_photo = len(photo_indices) // len(features)
        in_order = torch.arange(len(features), device=photo_indices.device).repeat_interleave(captions_per_photo)
        return context if torch.equal(photo_indices, in_order) else context[photo_indices]

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Return next-token logits (..., V) for hidden states (..., H)."""
        return self.project_output(self.dropout(self.norm(hidden_states)))

    def forward(self, features: Tensor, token_ids: Tensor, photo_indices: Tensor) -> Tensor:
        """Return next-token logits after every token (teacher forcing).

        Args:
            features: Photo features (N, L, C).
            token_ids: int64 (M, T).
            photo_indices: int64 (M,): caption m is about the photo `features[photo_indices[m]]`.

        Returns:
            Logits (M, T, V).
        """
        return self.logits(self.hidden_states(self._project_for(features, photo_indices), token_ids))

    def loss(self, features: Tensor, token_ids: Tensor, photo_indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy of captions; arguments as for `forward`.

        The targets are all tokens but the first of each caption; PAD is ignored.

        Returns:
            The loss (summed over the tokens of a caption, averaged over captions) and, detached, the mean per token.
        """
        if self.layers == "manual":
            logits, targets = self._next_token_logits_and_targets(features, token_ids, photo_indices)
            total = modules.apply_layer(sequence.TemporalSoftmax, logits[None], targets[None], options=(PAD,))
            loss = total / len(token_ids)
        else:
            loss = -self.log_prob(features, token_ids, photo_indices).mean()
        return loss, loss.detach() * len(token_ids) / (token_ids[:, 1:] != PAD).sum()

    def log_prob(
        self, features: Tensor, token_ids: Tensor, photo_indices: Tensor, suppressed: Sequence[int] = ()
    ) -> Tensor:
        """Return the log-probability of each whole caption, (M,). PAD is ignored.

        Args:
            features: Photo features (N, L, C).
            token_ids: int64 (M, T).
            photo_indices: int64 (M,): caption m is about the photo `features[photo_indices[m]]`.
            suppressed: Tokens that have probability 0, none of which occurs in the captions.
        """
        logits, targets = self._next_token_logits_and_targets(features, token_ids, photo_indices)
        if suppressed:
            logits = logits.index_fill(1, torch.tensor(suppressed, device=logits.device), MINUS_INF)
        token_log_probs = -F.cross_entropy(logits, targets, reduction="none")
        is_token = token_ids[:, 1:] != PAD
        return token_log_probs.new_zeros(is_token.shape).masked_scatter(is_token, token_log_probs).sum(1)

    def _next_token_logits_and_targets(
        self, features: Tensor, token_ids: Tensor, photo_indices: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the logits (K, V) and targets (K,) of the K target tokens that are not PAD.

        PAD is left out before the output projection, which is most of the work.
        """
        targets = token_ids[:, 1:]
        hidden_states = self.hidden_states(self._project_for(features, photo_indices), token_ids[:, :-1])
        is_token = targets != PAD
        num_tokens = int(is_token.sum())
        positions = F.pad(is_token.flatten().nonzero()[:, 0], (0, -num_tokens % ROWS_MULTIPLE))
        logits = upcast(self.logits(hidden_states.flatten(0, 1)[positions]))
        return logits[:num_tokens], targets[is_token]


def feature_projection(in_channels: int, hidden_dim: int, kind: Projection) -> nn.Module:
    """Return what maps features (..., in_channels) to (..., hidden_dim): linear, or a normalized two-layer MLP."""
    if kind == "linear":
        return nn.Linear(in_channels, hidden_dim)
    return nn.Sequential(
        nn.LayerNorm(in_channels), nn.Linear(in_channels, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, hidden_dim)
    )


def _grid_coordinates(count: int, like: Tensor) -> Tensor:
    """Return x and y in [-1, 1] of the `count` positions of a square feature map, row by row: (count, 2)."""
    side = math.isqrt(count)
    axis = torch.linspace(-1, 1, side, dtype=like.dtype, device=like.device) if side > 1 else like.new_zeros(1)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([x, y], 2).view(-1, 2)
