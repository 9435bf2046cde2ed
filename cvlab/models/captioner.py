"""A net that says what is in a photo, word by word, from the maps of a frozen backbone.

Papers: Vinyals et al., 2015, "Show and tell"; Xu et al., 2015, "Show, attend and tell"; source: EECS 498, assignment 6.
Differs: a layer normalisation (Ba et al., 2016) stands before the words' scores, attention is by scaled dot products.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvlab.data.vocabulary import NULL
from cvlab.layers import modules, recurrent, recurrent_reference
from cvlab.layers import words as by_hand
from cvlab.schema import BelowOne, Count

FORGET_BIAS = 1.0  # so that a cell remembers at first (Jozefowicz et al., 2015)
GATES = {"rnn": 1, "lstm": 4, "attention_lstm": 4}
Cell = Literal["rnn", "lstm", "attention_lstm"]


@dataclass(frozen=True)
class State:
    """Where M sentences are: state h and cell c (M, H), and the map that they look at (M, L, H)."""

    h: Tensor
    c: Tensor
    seen: Tensor

    def at(self, rows: Tensor) -> "State":
        """Return some of the sentences by position; one may stand there more than once."""
        return State(self.h[rows], self.c[rows], self.seen[rows])


class Captioner(nn.Module):
    """Scores of words from features (N, L, C) of photos; L is 1 where they are pooled.

    The layers of torch and those by hand have the same weights: a file of one is a file of the other.
    """

    def __init__(
        self,
        channels: int,
        num_words: int,
        cell: Cell = "attention_lstm",
        words: Count = 256,
        hidden: Count = 512,
        dropout: BelowOne = 0.5,
        feature_dropout: BelowOne = 0.3,
        layers: Literal["torch", "manual"] = "torch",
    ) -> None:
        super().__init__()
        self.cell, self.layers = cell, layers
        gates = GATES[cell] * hidden
        self.embed = nn.Embedding(num_words, words)
        self.project = nn.Linear(channels, hidden)
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
        seen: Tensor = self.project(self.feature_dropout(features))
        return seen

    def states(self, seen: Tensor, words: Tensor) -> Tensor:
        """Return the states (M, T, H) after each of the words (M, T), for what is seen (M, L, H)."""
        kind = _computed_in(self.wx)
        is_by_hand = self.layers == "manual"
        x = modules.apply(by_hand.Embedding, self.embed.weight, words) if is_by_hand else self.embed(words)
        x, wx, wh, b, seen = (tensor.to(kind) for tensor in (x, self.wx, self.wh, self.b, seen))
        if self.wa is not None:
            wa = self.wa.to(kind)
            if is_by_hand:
                return modules.apply(recurrent.AttentionLSTM, x, seen, wx, wh, wa, b)
            return recurrent_reference.attention_lstm(x, seen, wx, wh, wa, b)
        start = seen.mean(1)
        if is_by_hand:
            return modules.apply(recurrent.RNN if self.cell == "rnn" else recurrent.LSTM, x, start, wx, wh, b)
        return _library(self.cell, x, start, wx, wh, b)

    def scores(self, states: Tensor) -> Tensor:
        """Return the scores (..., V) of the next word for states (..., H)."""
        found: Tensor = self.out(self.dropout(self.norm(states)))
        return found

    def forward(self, features: Tensor, words: Tensor, image: Tensor) -> Tensor:
        """Return scores (M, T, V) of the word after each of `words` (M, T), whose photos are `features[image]`."""
        return self.scores(self.states(self.look(features)[image], words))

    def loss(self, features: Tensor, words: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of sentences (M, T), summed over the words, a mean over sentences, and the one of a word.

        Each word but the first is to be foreseen; NULL counts nothing.
        """
        given, wanted = words[:, :-1], words[:, 1:]
        states = self.states(self.look(features)[image], given)
        counts = wanted != NULL
        if self.layers == "manual":
            loss = modules.apply(by_hand.TemporalSoftmax, _precise(self.scores(states)), wanted, options=(NULL,))
        else:  # the words' scores are most of the work: only where there is a word
            scores = _precise(self.scores(states[counts]))
            loss = F.cross_entropy(scores, wanted[counts], reduction="sum") / len(words)
        return loss, loss.detach() * len(words) / counts.sum()

    def start(self, features: Tensor) -> State:
        """Return where sentences about photos (N, L, C) begin."""
        seen = self.look(features)
        middle = seen.mean(1)
        return State(middle, middle if self.is_attending else torch.zeros_like(middle), seen)

    def step(self, state: State, words: Tensor) -> tuple[Tensor, State, Tensor | None]:
        """Take a step with words (M,): log-probabilities (M, V), the new state, and where it looked (M, L)."""
        a = F.linear(self.embed(words), self.wx, self.b) + F.linear(state.h, self.wh)
        weights = None
        if self.wa is not None:
            looked, cache = recurrent.DotAttention.forward(state.h, state.seen)
            a, weights = a + F.linear(looked, self.wa), cache.weights
        h, c = (torch.tanh(a), state.c) if self.cell == "rnn" else recurrent_reference.lstm_step(a, state.c)
        return _precise(self.scores(h)).log_softmax(-1), State(h, c, state.seen), weights


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
