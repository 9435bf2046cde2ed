"""The recurrent layers once more, step by step in plain torch, for autograd to differentiate: slow and obvious."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cvlab.layers import attention as attending
from cvlab.layers import recurrent, sequence


def rnn_step(x: Tensor, h: Tensor, wx: Tensor, wh: Tensor, b: Tensor) -> Tensor:
    """Return the next state (N, H)."""
    return torch.tanh(x @ wx.T + h @ wh.T + b)


def lstm_step(a: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Return the next state and cell (N, H) for what goes into the gates, a (N, 4H)."""
    i, f, o, g = a.chunk(4, 1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def attention(h: Tensor, a: Tensor) -> Tensor:
    """Return what is seen (N, H) of maps a (M, L, H)."""
    return F.scaled_dot_product_attention(h.unflatten(0, (len(a), -1)), a, a).flatten(0, 1)


def rnn(x: Tensor, h: Tensor, wx: Tensor, wh: Tensor, b: Tensor) -> Tensor:
    """Return all states (N, T, H)."""
    states = []
    for step in x.unbind(1):
        h = rnn_step(step, h, wx, wh, b)
        states.append(h)
    return torch.stack(states, 1)


def lstm(x: Tensor, h: Tensor, wx: Tensor, wh: Tensor, b: Tensor) -> Tensor:
    """Return all states (N, T, H)."""
    c, states = torch.zeros_like(h), []
    for step in x.unbind(1):
        h, c = lstm_step(step @ wx.T + h @ wh.T + b, c)
        states.append(h)
    return torch.stack(states, 1)


def attention_lstm(x: Tensor, a: Tensor, wx: Tensor, wh: Tensor, wa: Tensor, b: Tensor) -> Tensor:
    """Return all states (N, T, H)."""
    h = c = a.mean(1).repeat_interleave(len(x) // len(a), 0)
    states = []
    for step in x.unbind(1):
        h, c = lstm_step(step @ wx.T + h @ wh.T + attention(h, a) @ wa.T + b, c)
        states.append(h)
    return torch.stack(states, 1)


def temporal_softmax(scores: Tensor, right: Tensor, null: int) -> Tensor:
    """Return the loss, a scalar."""
    return F.cross_entropy(scores.flatten(0, 1), right.flatten(), ignore_index=null, reduction="sum") / len(right)


def examples() -> list[tuple[str, Any, tuple[Tensor, ...], Callable[..., Tensor], float, tuple[Any, ...]]]:
    """Return name, layer, inputs, reference, tolerance and options of each layer."""
    n, t, d, h, cells = 3, 4, 5, 2, 6

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    x, state, cell, labels = some(n, d), some(n, h), some(n, h), torch.tensor([[1, 2, 0], [3, 4, 4]])
    plain, gated = (some(h, d), some(h, h), some(h)), (some(4 * h, d), some(4 * h, h), some(4 * h))
    looking = (some(4 * h, d), some(4 * h, h), some(4 * h, h), some(4 * h))

    def both(x: Tensor, h: Tensor, c: Tensor, wx: Tensor, wh: Tensor, b: Tensor) -> Tensor:
        return torch.cat(lstm_step(x @ wx.T + h @ wh.T + b, c), 1)

    return [
        ("RNN step", recurrent.RNNStep, (x, state, *plain), rnn_step, 1e-8, ()),
        ("RNN", recurrent.RNN, (some(n, t, d), state, *plain), rnn, 1e-7, ()),
        ("LSTM step", recurrent.LSTMStep, (x, state, cell, *gated), both, 1e-8, ()),
        ("LSTM", recurrent.LSTM, (some(n, t, d), state, *gated), lstm, 1e-7, ()),
        ("Attention", attending.DotAttention, (state, some(n, cells, h)), attention, 1e-8, ()),
        (
            "Attention LSTM",
            attending.AttentionLSTM,
            (some(n, t, d), some(n, cells, h), *looking),
            attention_lstm,
            1e-7,
            (),
        ),
        ("Attention, shared maps", attending.DotAttention, (some(2 * n, h), some(n, cells, h)), attention, 1e-8, ()),
        (
            "Attention LSTM, shared maps",
            attending.AttentionLSTM,
            (some(2 * n, t, d), some(n, cells, h), *looking),
            attention_lstm,
            1e-7,
            (),
        ),
        ("Embedding", sequence.Embedding, (some(5, d), labels), lambda w, k: F.embedding(k, w), 1e-8, ()),
        (
            "Temporal softmax",
            sequence.TemporalSoftmax,
            (some(2, 3, 5), labels),
            lambda scores, right: temporal_softmax(scores, right, 0),
            1e-7,
            (0,),
        ),
    ]
