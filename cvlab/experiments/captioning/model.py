"""A net that says what is in a photo, word by word, from the maps of a frozen backbone.

Papers: Vinyals et al., 2015, "Show and tell"; Xu et al., 2015, "Show, attend and tell"; source: EECS 498, assignment
6. Differs: a layer normalisation (Ba et al., 2016) stands before the words' scores, attention is by scaled dot
products.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvlab.config.schema import FractionBelowOne, PositiveInt
from cvlab.data.vocabulary import PAD
from cvlab.layers import attention, modules, recurrent, reference
from cvlab.layers import sequence as by_hand

FORGET_BIAS = 1.0  # so that a cell remembers at first (Jozefowicz et al., 2015)
GATES = {"rnn": 1, "lstm": 4, "attention_lstm": 4}
Cell = Literal["rnn", "lstm", "attention_lstm"]


@dataclass(frozen=True)
class State:
    """Where M sentences are: state h and cell c (M, H), and the maps (N, L, H), each for M / N sentences in turn."""

    h: Tensor
    c: Tensor
    seen: Tensor

    def at(self, rows: Tensor) -> "State":
        """Return some of the sentences by position, as many of each map; one may stand there more than once."""
        return State(self.h[rows], self.c[rows], self.seen)


class Captioner(nn.Module):
    """Scores of words from features (N, L, C) of photos; L is 1 where they are pooled.

    The layers of torch and those by hand have the same weights: a file of one is a file of the other.
    """

    def __init__(
        self,
        channels: int,
        num_words: int,
        cell: Cell = "attention_lstm",
        words: PositiveInt = 256,
        hidden: PositiveInt = 512,
        dropout: FractionBelowOne = 0.5,
        feature_dropout: FractionBelowOne = 0.3,
        layers: Literal["torch", "manual"] = "torch",
        positions: bool = False,
        cells: Literal["linear", "mlp"] = "linear",
    ) -> None:
        super().__init__()
        self.cell, self.layers, self.positions = cell, layers, positions
        gates = GATES[cell] * hidden
        self.embed = nn.Embedding(num_words, words)
        channels += 2 * positions
        self.project: nn.Module = nn.Linear(channels, hidden)
        if cells == "mlp":
            layers_of_cells = (
                nn.LayerNorm(channels),
                nn.Linear(channels, hidden),
                nn.ReLU(),
                nn.Linear(hidden, hidden),
            )
            self.project = nn.Sequential(*layers_of_cells)
        self.wx = nn.Parameter(torch.empty(gates, words))
        self.wh = nn.Parameter(torch.empty(gates, hidden))
        self.b = nn.Parameter(torch.zeros(gates))
        self.wa = nn.Parameter(torch.empty(gates, hidden)) if cell == "attention_lstm" else None
        self.norm = nn.LayerNorm(hidden)
        self.out = nn.Linear(hidden, num_words)
        self.dropout, self.feature_dropout = nn.Dropout(dropout), nn.Dropout(feature_dropout)
        for weight in (self.wx, self.wh, self.wa):
            if weight is not None:
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        if cell != "rnn":
            nn.init.constant_(self.b[hidden : 2 * hidden].detach(), FORGET_BIAS)

    @property
    def is_attending(self) -> bool:
        """Whether it looks at the cells of a map; else the features are pooled."""
        return self.wa is not None

    def look(self, features: Tensor) -> Tensor:
        """Return features (N, L, C) in the size of the states: (N, L, H)."""
        found = self.feature_dropout(features)
        if self.positions:
            found = torch.cat([found, _places(features.shape[1], found).expand(len(found), -1, -1)], 2)
        seen: Tensor = self.project(found)
        return seen

    def _seen(self, features: Tensor, image: Tensor) -> Tensor:
        """Return what is seen for sentences about the photos `image` (M,): a map for each photo, or for each sentence.

        Where all photos have as many sentences, one after the other, they share a map: that is a third of the time.
        """
        seen = self.look(features)
        count = len(image) // len(features)
        in_turn = torch.arange(len(features), device=image.device).repeat_interleave(count)
        return seen if torch.equal(image, in_turn) else seen[image]

    def states(self, seen: Tensor, words: Tensor) -> Tensor:
        """Return the states (M, T, H) after each of the words (M, T), for what is seen (N, L, H).

        M / N sentences after another are about the same map.
        """
        kind = _computed_in(self.wx)
        is_by_hand = self.layers == "manual"
        x = modules.apply_layer(by_hand.Embedding, self.embed.weight, words) if is_by_hand else self.embed(words)
        x, wx, wh, b, seen = (tensor.to(kind) for tensor in (x, self.wx, self.wh, self.b, seen))
        if self.wa is not None:
            wa = self.wa.to(kind)
            if is_by_hand:
                return modules.apply_layer(attention.AttentionLSTM, x, seen, wx, wh, wa, b)
            return reference.attention_lstm(x, seen, wx, wh, wa, b)
        start = seen.mean(1).repeat_interleave(len(words) // len(seen), 0)
        if is_by_hand:
            return modules.apply_layer(recurrent.RNN if self.cell == "rnn" else recurrent.LSTM, x, start, wx, wh, b)
        return _library(self.cell, x, start, wx, wh, b)

    def scores(self, states: Tensor) -> Tensor:
        """Return the scores (..., V) of the next word for states (..., H)."""
        found: Tensor = self.out(self.dropout(self.norm(states)))
        return found

    def forward(self, features: Tensor, words: Tensor, image: Tensor) -> Tensor:
        """Return scores (M, T, V) of the word after each of `words` (M, T), whose photos are `features[image]`."""
        return self.scores(self.states(self._seen(features, image), words))

    def loss(self, features: Tensor, words: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of sentences (M, T), summed over the words, a mean over sentences, and the one of a word.

        Each word but the first is to be foreseen; NULL counts nothing.
        """
        if self.layers == "manual":
            scores, wanted, _ = self._foreseen(features, words, image)
            loss = modules.apply_layer(by_hand.TemporalSoftmax, scores[None], wanted[None], options=(PAD,)) / len(words)
        else:
            loss = -self.log_probability(features, words, image).mean()
        return loss, loss.detach() * len(words) / (words[:, 1:] != PAD).sum()

    def log_probability(self, features: Tensor, words: Tensor, image: Tensor) -> Tensor:
        """Return the logarithm of the probability of each sentence (M, T) whole: (M,). NULL counts nothing."""
        scores, wanted, sentence = self._foreseen(features, words, image)
        values = -F.cross_entropy(scores, wanted, reduction="none")
        return values.new_zeros(len(words)).index_add(0, sentence, values)

    def _foreseen(self, features: Tensor, words: Tensor, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return for each word but the first of each sentence its scores (K, V), itself (K,), and its sentence (K,).

        NULL is left out: scores are most of the work.
        """
        wanted = words[:, 1:]
        states = self.states(self._seen(features, image), words[:, :-1])
        is_word = wanted != PAD
        return _precise(self.scores(states[is_word])), wanted[is_word], is_word.nonzero()[:, 0]

    def start(self, features: Tensor) -> State:
        """Return where sentences about photos (N, L, C) begin."""
        seen = self.look(features)
        middle = seen.mean(1)
        return State(middle, middle if self.is_attending else torch.zeros_like(middle), seen)

    def step(self, state: State, words: Tensor) -> tuple[Tensor, State, Tensor | None]:
        """Take a step with words (M,): scores (M, V) of the next ones, the new state, and where it looked (M, L)."""
        a = F.linear(self.embed(words), self.wx, self.b) + F.linear(state.h, self.wh)
        weights = None
        if self.wa is not None:
            looked, cache = attention.DotAttention.forward(state.h, state.seen)
            a, weights = a + F.linear(looked, self.wa), cache.weights
        h, c = (torch.tanh(a), state.c) if self.cell == "rnn" else reference.lstm_step(a, state.c)
        return _precise(self.scores(h)), State(h, c, state.seen), weights


def _places(count: int, like: Tensor) -> Tensor:
    """Return where the cells of a square map of `count` cells are: (count, 2), x and y from -1 to 1."""
    side = math.isqrt(count)
    along = torch.linspace(-1, 1, side, dtype=like.dtype, device=like.device) if side > 1 else like.new_zeros(1)
    down, across = torch.meshgrid(along, along, indexing="ij")
    return torch.stack([across, down], 2).view(-1, 2)


def _computed_in(weight: Tensor) -> torch.dtype:
    """Return the dtype of what is computed with a weight: autocast's, where that is on."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def _precise(scores: Tensor) -> Tensor:
    """Return scores with enough digits for a softmax."""
    return scores.float() if scores.dtype == torch.bfloat16 else scores


def _library(cell: Cell, x: Tensor, start: Tensor, wx: Tensor, wh: Tensor, b: Tensor) -> Tensor:
    """Run torch's own kernels, whose LSTM has its gates in the order input, forget, candidate, output."""
    nothing = torch.zeros_like(b)
    first = start[None].contiguous()
    if cell == "rnn":
        states, _ = torch.rnn_tanh(x, first, [wx, wh, b, nothing], True, 1, 0.0, False, False, True)
        return states
    hidden = start.shape[1]
    order = torch.arange(4 * hidden, device=b.device).view(4, hidden)[[0, 1, 3, 2]].flatten()
    weights = [wx[order], wh[order], b[order], nothing]
    states, _, _ = torch.lstm(x, (first, torch.zeros_like(first)), weights, True, 1, 0.0, False, False, True)
    return states
