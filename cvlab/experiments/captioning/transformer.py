"""Image captioning: a transformer decoder that attends to the features of a frozen backbone.

Shapes: N photos with L spatial positions of C channels each; M captions of T tokens; V tokens in the vocabulary;
H is `hidden_dim`. Where M > N, each photo has several captions.

References:
    Vaswani et al., 2017, "Attention is all you need".
    Xiong et al., 2020, "On layer normalization in the transformer architecture" (normalization before each block).
    EECS 498, assignment 5 of 2020.

Differences from the paper:
    There is no encoder: the keys and values of cross-attention are projected features of the backbone. GELU instead of
    ReLU.
"""

import math
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvlab.config.schema import FractionBelowOne, PositiveInt
from cvlab.engine.device import upcast
from cvlab.errors import ConfigError
from cvlab.experiments.captioning.base import CaptionModel, feature_projection
from cvlab.experiments.captioning.config import Layers, Projection
from cvlab.layers import modules
from cvlab.layers.attention import ScaledDotProductAttention

MAX_WAVELENGTH = 10000.0  # of the encoding of positions, over 2 pi
FEED_FORWARD_FACTOR = 4  # hidden size of the feed-forward blocks, over H

KeysValues = tuple[Tensor, Tensor]  # each (sequences, heads, positions, H / heads)


@dataclass(frozen=True)
class TransformerState:
    """Keys and values of M captions that are being decoded, for each layer.

    Attributes:
        self_attention: Those of the t tokens so far, (M, heads, t, H / heads).
        cross_attention: Those of the features, (N, heads, L, H / heads); captions i * M / N to (i + 1) * M / N - 1 are
            about photo i.
    """

    self_attention: tuple[KeysValues, ...]
    cross_attention: tuple[KeysValues, ...]

    def select(self, indices: Tensor) -> "TransformerState":
        """Return the state of some of the captions, by index, the same number for each photo; indices may repeat."""
        selected = tuple((keys[indices], values[indices]) for keys, values in self.self_attention)
        return TransformerState(selected, self.cross_attention)


class MultiHeadAttention(nn.Module):
    """Scaled dot-product attention in several subspaces.

    Args:
        dim: Size H of queries, keys, values and outputs, a multiple of num_heads.
        num_heads: Number of subspaces.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query, self.key, self.value, self.output = (nn.Linear(dim, dim) for _ in range(4))

    def keys_values(self, x: Tensor) -> KeysValues:
        """Return the keys and values of x (N, L, H)."""
        return self._split_heads(self.key(x)), self._split_heads(self.value(x))

    def _split_heads(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        return x.view(n, length, self.num_heads, -1).transpose(1, 2)

    def forward(self, x: Tensor, keys_values: KeysValues, is_causal: bool = False, layers: Layers = "torch") -> Tensor:
        """Attend with queries from x.

        Args:
            x: (M, T, H).
            keys_values: Those of N sequences; M / N consecutive sequences of x attend to the same ones.
            is_causal: Position t attends to the positions 0 to t only; M is N.
            layers: `torch` or `manual`.

        Returns:
            (M, T, H).
        """
        keys, values = keys_values
        queries = self._queries(x, len(keys))
        if layers == "manual":
            heads = (tensor.flatten(0, 1) for tensor in (queries, keys, values))
            attended = modules.apply_layer(ScaledDotProductAttention, *heads, options=(is_causal,))
            return self._merge_heads(attended.view(queries.shape), x)
        return self._merge_heads(F.scaled_dot_product_attention(queries, keys, values, is_causal=is_causal), x)

    def step(self, x: Tensor, keys_values: KeysValues) -> tuple[Tensor, Tensor]:
        """Attend with one query from each sequence of x (M, 1, H); not to be differentiated.

        Returns:
            (M, 1, H), and the weights (M, L), averaged over heads.
        """
        keys, values = keys_values
        queries = self._queries(x, len(keys))
        attended, cache = ScaledDotProductAttention.forward(
            queries.flatten(0, 1), keys.flatten(0, 1), values.flatten(0, 1)
        )
        weights = cache.weights.unflatten(0, (len(keys), -1)).mean(1).flatten(0, 1)
        return self._merge_heads(attended.view(queries.shape), x), weights

    def _queries(self, x: Tensor, num_sequences: int) -> Tensor:
        """Return the queries (N, heads, M / N * T, H / heads) of x (M, T, H)."""
        return self._split_heads(self.query(x).reshape(num_sequences, -1, x.shape[2]))

    def _merge_heads(self, attended: Tensor, x: Tensor) -> Tensor:
        """Return the output, of the shape of x (M, T, H), for values (N, heads, M / N * T, H / heads)."""
        output: Tensor = self.output(attended.transpose(1, 2).reshape(x.shape))
        return output


class DecoderLayer(nn.Module):
    """Self-attention, cross-attention and a feed-forward block, each added to its input, which it normalizes.

    Args:
        dim: Size H of tokens and features.
        num_heads: Number of attention heads.
        dropout: Dropout after each block.
    """

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        self.self_attention, self.cross_attention = (MultiHeadAttention(dim, num_heads) for _ in range(2))
        self.feed_forward = nn.Sequential(
            nn.Linear(dim, FEED_FORWARD_FACTOR * dim), nn.GELU(), nn.Linear(FEED_FORWARD_FACTOR * dim, dim)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, features: KeysValues, layers: Layers) -> Tensor:
        """Apply the layer to whole captions.

        Args:
            x: (M, T, H).
            features: Keys and values of the features of N photos.
            layers: `torch` or `manual`.

        Returns:
            (M, T, H).
        """
        normalized = self.norms[0](x)
        keys_values = self.self_attention.keys_values(normalized)
        x = x + self.dropout(self.self_attention(normalized, keys_values, True, layers))
        x = x + self.dropout(self.cross_attention(self.norms[1](x), features, False, layers))
        return self._feed_forward(x)

    def step(self, x: Tensor, previous: KeysValues, features: KeysValues) -> tuple[Tensor, KeysValues, Tensor]:
        """Apply the layer to one token of each caption.

        Args:
            x: (M, 1, H).
            previous: Keys and values of the tokens before it.
            features: Keys and values of the features of N photos.

        Returns:
            (M, 1, H), the keys and values of all tokens, and the weights of cross-attention, (M, L).
        """
        normalized = self.norms[0](x)
        new_keys, new_values = self.self_attention.keys_values(normalized)
        keys, values = (
            torch.cat([old.to(new), new], 2) for old, new in zip(previous, (new_keys, new_values), strict=True)
        )
        x = x + self.self_attention.step(normalized, (keys, values))[0]
        attended, weights = self.cross_attention.step(self.norms[1](x), features)
        return self._feed_forward(x + attended), (keys, values), weights

    def _feed_forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.dropout(self.feed_forward(self.norms[2](x)))
        return x + added


class TransformerCaptioner(CaptionModel):
    """A transformer decoder; the embedding of tokens is also the output projection.

    Args:
        in_channels: Channels C of the features.
        vocab_size: Number of tokens V, special tokens included.
        hidden_dim: Size H of tokens and projected features, a multiple of num_heads.
        num_layers: Number of decoder layers.
        num_heads: Number of attention heads.
        dropout: Dropout on embeddings, after each block and before the output projection.
        feature_dropout: Dropout on the features.
        layers: `torch` or `manual` (attention with hand-written forward and backward passes).
        positional: Append the x and y coordinates of each spatial position to its features.
        projection: How features become (N, L, H): a linear layer, or a normalized two-layer MLP.
    """

    label = "transformer"
    has_attention = True

    def __init__(
        self,
        in_channels: int,
        vocab_size: int,
        hidden_dim: PositiveInt = 256,
        num_layers: PositiveInt = 3,
        num_heads: PositiveInt = 8,
        dropout: FractionBelowOne = 0.2,
        feature_dropout: FractionBelowOne = 0.3,
        layers: Layers = "torch",
        positional: bool = True,
        projection: Projection = "linear",
    ) -> None:
        if hidden_dim % num_heads or hidden_dim % 2:
            raise ConfigError(f"model: hidden_dim {hidden_dim} is not an even multiple of num_heads {num_heads}")
        super().__init__(hidden_dim, dropout, feature_dropout, layers, positional)
        self.hidden_dim = hidden_dim
        self.embedding = nn.Embedding(vocab_size, hidden_dim)
        nn.init.normal_(self.embedding.weight, std=hidden_dim**-0.5)
        self.projection = feature_projection(in_channels + 2 * positional, hidden_dim, projection)
        self.context_norm = nn.LayerNorm(hidden_dim)
        self.decoder = nn.ModuleList(DecoderLayer(hidden_dim, num_heads, dropout) for _ in range(num_layers))
        self.output_bias = nn.Parameter(torch.zeros(vocab_size))

    def _layers(self) -> list[DecoderLayer]:
        return [cast("DecoderLayer", layer) for layer in self.decoder]

    def _embed(self, token_ids: Tensor, start: int) -> Tensor:
        """Return embeddings (M, T, H) of tokens (M, T), of which the first is at position `start`."""
        x = self.embedding(token_ids) * math.sqrt(self.hidden_dim)
        embedded: Tensor = self.dropout(x + encode_positions(start, token_ids.shape[1], x))
        return embedded

    def _features_keys_values(self, context: Tensor) -> tuple[KeysValues, ...]:
        context = self.context_norm(context)
        return tuple(layer.cross_attention.keys_values(context) for layer in self._layers())

    def hidden_states(self, context: Tensor, token_ids: Tensor) -> Tensor:
        """Run the decoder over whole captions; see `CaptionModel.hidden_states`."""
        x = self._embed(token_ids, 0)
        for layer, features in zip(self._layers(), self._features_keys_values(context), strict=True):
            x = layer(x, features, self.layers)
        return x

    def project_output(self, hidden_states: Tensor) -> Tensor:
        """Return next-token logits (..., V) for normalized hidden states (..., H)."""
        return F.linear(hidden_states, self.embedding.weight, self.output_bias)

    def initial_state(self, features: Tensor) -> TransformerState:
        """Return the state before the first token, for one caption of each photo (N, L, C)."""
        cross_attention = self._features_keys_values(self.project(features))
        empty = tuple((keys[:, :, :0], values[:, :, :0]) for keys, values in cross_attention)
        return TransformerState(empty, cross_attention)

    def step(self, state: TransformerState, token_ids: Tensor) -> tuple[Tensor, TransformerState, Tensor | None]:
        """Decode one token of M captions; see `CaptionModel.step`. The weights are those of the last layer."""
        x = self._embed(token_ids[:, None], state.self_attention[0][0].shape[2])
        all_keys_values, weights = [], None
        for layer, previous, features in zip(self._layers(), state.self_attention, state.cross_attention, strict=True):
            x, keys_values, weights = layer.step(x, previous, features)
            all_keys_values.append(keys_values)
        return upcast(self.logits(x[:, 0])), TransformerState(tuple(all_keys_values), state.cross_attention), weights


def encode_positions(start: int, count: int, like: Tensor) -> Tensor:
    """Return sines and cosines of the positions start to start + count - 1, (count, H), H and dtype as of `like`."""
    dim = like.shape[-1]
    positions = torch.arange(start, start + count, device=like.device, dtype=torch.float32)
    frequencies = MAX_WAVELENGTH ** -(torch.arange(0, dim, 2, device=like.device, dtype=torch.float32) / dim)
    angles = positions[:, None] * frequencies
    return torch.stack([angles.sin(), angles.cos()], 2).flatten(1).to(like.dtype)
