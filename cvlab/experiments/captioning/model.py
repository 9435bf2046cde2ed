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

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvlab.config.schema import FractionBelowOne, PositiveInt
from cvlab.engine.device import upcast
from cvlab.experiments.captioning.base import CaptionModel, feature_projection
from cvlab.experiments.captioning.config import Layers, Projection
from cvlab.layers import attention, modules, recurrent, reference, sequence

FORGET_BIAS = 1.0  # initially the cell state is kept (Jozefowicz et al., 2015)
NUM_GATES = {"rnn": 1, "lstm": 4, "attention_lstm": 4}
Cell = Literal["rnn", "lstm", "attention_lstm"]


@dataclass(frozen=True)
class RecurrentState:
    """The recurrent state of M captions that are being decoded.

    Attributes:
        h: Hidden states (M, H).
        c: Cell states (M, H).
        context: Projected features (N, L, H); captions i * M / N to (i + 1) * M / N - 1 are about photo i.
    """

    h: Tensor
    c: Tensor
    context: Tensor

    def select(self, indices: Tensor) -> "RecurrentState":
        """Return the state of some of the captions, by index, the same number for each photo; indices may repeat."""
        return RecurrentState(self.h[indices], self.c[indices], self.context)


class Captioner(CaptionModel):
    """Next-token logits from photo features and the tokens so far.

    The gates of the LSTM are ordered input, forget, output, candidate (torch.nn.LSTM: input, forget, candidate,
    output).

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
        layers: Layers = "torch",
        positional: bool = False,
        projection: Projection = "linear",
    ) -> None:
        super().__init__(hidden_dim, dropout, feature_dropout, layers, positional)
        self.cell: Cell = cell
        self.label, self.has_attention = cell, cell == "attention_lstm"
        num_gates = NUM_GATES[cell] * hidden_dim
        self.embedding = nn.Embedding(vocab_size, embed_dim)
        self.projection = feature_projection(in_channels + 2 * positional, hidden_dim, projection)
        self.weight_ih = nn.Parameter(torch.empty(num_gates, embed_dim))
        self.weight_hh = nn.Parameter(torch.empty(num_gates, hidden_dim))
        self.bias = nn.Parameter(torch.zeros(num_gates))
        # context (what attention returns) to hidden
        self.weight_ch = nn.Parameter(torch.empty(num_gates, hidden_dim)) if cell == "attention_lstm" else None
        self.output_projection = nn.Linear(hidden_dim, vocab_size)
        for weight in (self.weight_ih, self.weight_hh, self.weight_ch):
            if weight is not None:
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        if cell != "rnn":
            nn.init.constant_(self.bias[hidden_dim : 2 * hidden_dim].detach(), FORGET_BIAS)

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
        return torch_rnn(self.cell, x, h0, weight_ih, weight_hh, bias)

    def project_output(self, hidden_states: Tensor) -> Tensor:
        """Return next-token logits (..., V) for normalized hidden states (..., H)."""
        logits: Tensor = self.output_projection(hidden_states)
        return logits

    def initial_state(self, features: Tensor) -> RecurrentState:
        """Return the state before the first token, for one caption of each photo (N, L, C)."""
        context = self.project(features)
        mean = context.mean(1)
        return RecurrentState(mean, mean if self.has_attention else torch.zeros_like(mean), context)

    def step(self, state: RecurrentState, token_ids: Tensor) -> tuple[Tensor, RecurrentState, Tensor | None]:
        """Decode one token of M captions; see `CaptionModel.step`."""
        gates = F.linear(self.embedding(token_ids), self.weight_ih, self.bias) + F.linear(state.h, self.weight_hh)
        weights = None
        if self.weight_ch is not None:
            attended, cache = attention.DotAttention.forward(state.h, state.context)
            gates, weights = gates + F.linear(attended, self.weight_ch), cache.weights
        if self.cell == "rnn":
            h, c = torch.tanh(gates), state.c
        else:
            h, c = reference.lstm_step(gates, state.c)
        return upcast(self.logits(h)), RecurrentState(h, c, state.context), weights


def _compute_dtype(weight: Tensor) -> torch.dtype:
    """Return autocast's dtype if autocast is enabled, else the dtype of the weight."""
    device_type = weight.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else weight.dtype


def torch_rnn(cell: Cell, x: Tensor, h0: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor) -> Tensor:
    """Return the hidden states (M, T, H) by torch's fused kernels, with the gates in torch's order."""
    h0 = h0[None].contiguous()
    hidden_dim = h0.shape[2]
    weights: tuple[Tensor, ...] = (weight_ih, weight_hh, bias)
    if cell == "lstm":
        order = torch.arange(4 * hidden_dim, device=bias.device).view(4, hidden_dim)[[0, 1, 3, 2]].flatten()
        weights = (weight_ih[order], weight_hh[order], bias[order])
    weights = _in_one_block(*weights, torch.zeros_like(bias))
    keeps_activations = torch.is_grad_enabled()  # cuDNN computes no gradients otherwise
    options = (True, 1, 0.0, keeps_activations, False, True)
    with torch.autocast(x.device.type, enabled=False):  # which would turn bfloat16 into float16 for cuDNN
        if cell == "rnn":
            return torch.rnn_tanh(x, h0, weights, *options)[0]
        return torch.lstm(x, (h0, torch.zeros_like(h0)), weights, *options)[0]


def _in_one_block(*weights: Tensor) -> tuple[Tensor, ...]:
    """Return weights on a GPU one after the other in one block of memory; cuDNN copies them there, with a warning."""
    if not weights[0].is_cuda:
        return weights
    flat = torch.cat([weight.flatten() for weight in weights])
    return tuple(
        part.view_as(weight) for part, weight in zip(flat.split([w.numel() for w in weights]), weights, strict=True)
    )
