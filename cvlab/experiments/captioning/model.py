"""Image captioning: an RNN, an LSTM or an LSTM with soft attention that decodes the features of a frozen backbone.

Shapes: N photos with L spatial positions of C channels each; M captions of T tokens; V tokens in the vocabulary;
H is `hidden_dim`, D is `embed_dim`. Where M > N, each photo has several captions.

References:
    Vinyals et al., 2015, "Show and tell: a neural image caption generator".
    Xu et al., 2015, "Show, attend and tell: neural image caption generation with visual attention".
    EECS 498, assignment 6.

Differences from the paper:
    Layer normalization (Ba et al., 2016) before the output projection; attention is scaled dot-product attention.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvlab.config.schema import FractionBelowOne, PositiveInt
from cvlab.data.vocabulary import PAD
from cvlab.layers import attention, modules, recurrent, reference, sequence

FORGET_BIAS = 1.0  # initially the cell state is kept (Jozefowicz et al., 2015)
NUM_GATES = {"rnn": 1, "lstm": 4, "attention_lstm": 4}
Cell = Literal["rnn", "lstm", "attention_lstm"]


@dataclass(frozen=True)
class DecoderState:
    """The recurrent state of M captions that are being decoded.

    Attributes:
        h: Hidden states (M, H).
        c: Cell states (M, H).
        context: Projected features (N, L, H); captions i * M / N to (i + 1) * M / N - 1 are about photo i.
    """

    h: Tensor
    c: Tensor
    context: Tensor

    def select(self, indices: Tensor) -> "DecoderState":
        """Return the state of some of the captions, by index, the same number for each photo; indices may repeat."""
        return DecoderState(self.h[indices], self.c[indices], self.context)


class Captioner(nn.Module):
    """Next-token logits from photo features and the tokens so far.

    The gates of the LSTM are ordered input, forget, output, candidate (torch.nn.LSTM: input, forget, candidate,
    output). `layers` selects torch's kernels or the hand-written ones; both have the same state_dict.

    Args:
        in_channels: Channels C of the features.
        vocab_size: Number of tokens V, special tokens included.
        cell: The recurrent cell; `attention_lstm` needs features of L > 1 positions, the others take the mean.
        embed_dim: Size D of a token's embedding.
        hidden_dim: Size H of the recurrent state and of the projected features.
        dropout: Dropout before the output projection.
        feature_dropout: Dropout on the features.
        layers: `torch` or `manual` (hand-written forward and backward passes).
        positional: Append the x and y coordinates of each spatial position to its features.
        projection: How features become (N, L, H): a linear layer, or a normalized two-layer MLP.
    """

    def __init__(
        self,
        in_channels: int,
        vocab_size: int,
        cell: Cell = "attention_lstm",
        embed_dim: PositiveInt = 256,
        hidden_dim: PositiveInt = 512,
        dropout: FractionBelowOne = 0.5,
        feature_dropout: FractionBelowOne = 0.3,
        layers: Literal["torch", "manual"] = "torch",
        positional: bool = False,
        projection: Literal["linear", "mlp"] = "linear",
    ) -> None:
        super().__init__()
        self.cell, self.layers, self.positional = cell, layers, positional
        num_gates = NUM_GATES[cell] * hidden_dim
        self.embedding = nn.Embedding(vocab_size, embed_dim)
        in_channels += 2 * positional
        self.projection: nn.Module = nn.Linear(in_channels, hidden_dim)
        if projection == "mlp":
            self.projection = nn.Sequential(
                nn.LayerNorm(in_channels),
                nn.Linear(in_channels, hidden_dim),
                nn.ReLU(),
                nn.Linear(hidden_dim, hidden_dim),
            )
        self.weight_ih = nn.Parameter(torch.empty(num_gates, embed_dim))
        self.weight_hh = nn.Parameter(torch.empty(num_gates, hidden_dim))
        self.bias = nn.Parameter(torch.zeros(num_gates))
        # context (what attention returns) to hidden
        self.weight_ch = nn.Parameter(torch.empty(num_gates, hidden_dim)) if cell == "attention_lstm" else None
        self.norm = nn.LayerNorm(hidden_dim)
        self.output_projection = nn.Linear(hidden_dim, vocab_size)
        self.dropout, self.feature_dropout = nn.Dropout(dropout), nn.Dropout(feature_dropout)
        for weight in (self.weight_ih, self.weight_hh, self.weight_ch):
            if weight is not None:
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        if cell != "rnn":
            nn.init.constant_(self.bias[hidden_dim : 2 * hidden_dim].detach(), FORGET_BIAS)

    @property
    def has_attention(self) -> bool:
        """Whether the model attends to spatial positions; if not, it takes pooled features."""
        return self.weight_ch is not None

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

    def hidden_states(self, context: Tensor, token_ids: Tensor) -> Tensor:
        """Run the recurrent layer over whole captions.

        Args:
            context: Projected features (N, L, H); M / N consecutive captions share a photo.
            token_ids: int64 (M, T).

        Returns:
            The hidden state after each token, (M, T, H).
        """
        dtype = _compute_dtype(self.weight_ih)
        is_manual = self.layers == "manual"
        if is_manual:
            x = modules.apply_layer(sequence.Embedding, self.embedding.weight, token_ids)
        else:
            x = self.embedding(token_ids)
        x, weight_ih, weight_hh, bias, context = (
            tensor.to(dtype) for tensor in (x, self.weight_ih, self.weight_hh, self.bias, context)
        )
        if self.weight_ch is not None:
            weights = (weight_ih, weight_hh, self.weight_ch.to(dtype), bias)
            if is_manual:
                return modules.apply_layer(attention.AttentionLSTM, x, context, *weights)
            return reference.attention_lstm(x, context, *weights)
        h0 = context.mean(1).repeat_interleave(len(token_ids) // len(context), 0)
        if is_manual:
            layer = recurrent.RNN if self.cell == "rnn" else recurrent.LSTM
            return modules.apply_layer(layer, x, h0, weight_ih, weight_hh, bias)
        return _torch_rnn(self.cell, x, h0, weight_ih, weight_hh, bias)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Return next-token logits (..., V) for hidden states (..., H)."""
        logits: Tensor = self.output_projection(self.dropout(self.norm(hidden_states)))
        return logits

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
            logits, targets, _ = self._next_token_logits_and_targets(features, token_ids, photo_indices)
            total = modules.apply_layer(sequence.TemporalSoftmax, logits[None], targets[None], options=(PAD,))
            loss = total / len(token_ids)
        else:
            loss = -self.log_prob(features, token_ids, photo_indices).mean()
        return loss, loss.detach() * len(token_ids) / (token_ids[:, 1:] != PAD).sum()

    def log_prob(self, features: Tensor, token_ids: Tensor, photo_indices: Tensor) -> Tensor:
        """Return the log-probability of each whole caption, (M,); arguments as for `forward`. PAD is ignored."""
        logits, targets, caption_indices = self._next_token_logits_and_targets(features, token_ids, photo_indices)
        token_log_probs = -F.cross_entropy(logits, targets, reduction="none")
        return token_log_probs.new_zeros(len(token_ids)).index_add(0, caption_indices, token_log_probs)

    def _next_token_logits_and_targets(
        self, features: Tensor, token_ids: Tensor, photo_indices: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return for the K target tokens that are not PAD: logits (K, V), targets (K,) and caption indices (K,).

        PAD is left out before the output projection, which is most of the work.
        """
        targets = token_ids[:, 1:]
        hidden_states = self.hidden_states(self._project_for(features, photo_indices), token_ids[:, :-1])
        is_token = targets != PAD
        return _upcast(self.logits(hidden_states[is_token])), targets[is_token], is_token.nonzero()[:, 0]

    def initial_state(self, features: Tensor) -> DecoderState:
        """Return the state before the first token, for one caption of each photo (N, L, C)."""
        context = self.project(features)
        mean = context.mean(1)
        return DecoderState(mean, mean if self.has_attention else torch.zeros_like(mean), context)

    def step(self, state: DecoderState, token_ids: Tensor) -> tuple[Tensor, DecoderState, Tensor | None]:
        """Decode one token of M captions.

        Args:
            state: The state before the token.
            token_ids: int64 (M,).

        Returns:
            Next-token logits (M, V), the new state, and the attention weights (M, L), None without attention.
        """
        gates = F.linear(self.embedding(token_ids), self.weight_ih, self.bias) + F.linear(state.h, self.weight_hh)
        weights = None
        if self.weight_ch is not None:
            attended, cache = attention.DotAttention.forward(state.h, state.context)
            gates, weights = gates + F.linear(attended, self.weight_ch), cache.weights
        if self.cell == "rnn":
            h, c = torch.tanh(gates), state.c
        else:
            h, c = reference.lstm_step(gates, state.c)
        return _upcast(self.logits(h)), DecoderState(h, c, state.context), weights


def _grid_coordinates(count: int, like: Tensor) -> Tensor:
    """Return x and y in [-1, 1] of the `count` positions of a square feature map, row by row: (count, 2)."""
    side = math.isqrt(count)
    axis = torch.linspace(-1, 1, side, dtype=like.dtype, device=like.device) if side > 1 else like.new_zeros(1)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([x, y], 2).view(-1, 2)


def _compute_dtype(weight: Tensor) -> torch.dtype:
    """Return autocast's dtype if autocast is enabled, else the dtype of the weight."""
    device_type = weight.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else weight.dtype


def _upcast(logits: Tensor) -> Tensor:
    """Return bfloat16 logits as float32, precise enough for a softmax."""
    return logits.float() if logits.dtype == torch.bfloat16 else logits


def _torch_rnn(cell: Cell, x: Tensor, h0: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor) -> Tensor:
    """Return the hidden states (M, T, H) by torch's fused kernels, with the gates in torch's order."""
    zero_bias = torch.zeros_like(bias)
    h0 = h0[None].contiguous()
    if cell == "rnn":
        weights = [weight_ih, weight_hh, bias, zero_bias]
        hidden_states, _ = torch.rnn_tanh(x, h0, weights, True, 1, 0.0, False, False, True)
        return hidden_states
    hidden_dim = h0.shape[2]
    order = torch.arange(4 * hidden_dim, device=bias.device).view(4, hidden_dim)[[0, 1, 3, 2]].flatten()
    weights = [weight_ih[order], weight_hh[order], bias[order], zero_bias]
    hidden_states, _, _ = torch.lstm(x, (h0, torch.zeros_like(h0)), weights, True, 1, 0.0, False, False, True)
    return hidden_states
