"""Reference implementations of the recurrent layers in plain torch operations, differentiated by autograd.

They are what `layers: torch` uses in the captioner, and what the hand-written layers are checked against. Weights and
shapes are those of `cvlab.layers.recurrent` and `cvlab.layers.attention`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def rnn_step(x: Tensor, h: Tensor, wx: Tensor, wh: Tensor, b: Tensor) -> Tensor:
    """Return the next state (N, H), for input x (N, D), state h (N, H), wx (H, D), wh (H, H) and b (H,)."""
    return torch.tanh(x @ wx.T + h @ wh.T + b)


def lstm_step(a: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Return the next state and cell (N, H), for pre-activations of the gates a (N, 4H) and cell c (N, H)."""
    i, f, o, g = a.chunk(4, 1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def attention(h: Tensor, a: Tensor) -> Tensor:
    """Return the attended features (N, H), for states h (N, H) and feature maps a (M, L, H)."""
    return F.scaled_dot_product_attention(h.unflatten(0, (len(a), -1)), a, a).flatten(0, 1)


def rnn(x: Tensor, h: Tensor, wx: Tensor, wh: Tensor, b: Tensor) -> Tensor:
    """Return the states (N, T, H) of all steps, for inputs x (N, T, D) and initial state h (N, H)."""
    states = []
    for step in x.unbind(1):
        h = rnn_step(step, h, wx, wh, b)
        states.append(h)
    return torch.stack(states, 1)


def lstm(x: Tensor, h: Tensor, wx: Tensor, wh: Tensor, b: Tensor) -> Tensor:
    """Return the states (N, T, H) of all steps, for inputs x (N, T, D) and initial state h (N, H)."""
    c, states = torch.zeros_like(h), []
    for step in x.unbind(1):
        h, c = lstm_step(step @ wx.T + h @ wh.T + b, c)
        states.append(h)
    return torch.stack(states, 1)


def attention_lstm(x: Tensor, a: Tensor, wx: Tensor, wh: Tensor, wa: Tensor, b: Tensor) -> Tensor:
    """Return the states (N, T, H) of all steps, for inputs x (N, T, D) and feature maps a (M, L, H)."""
    h = c = a.mean(1).repeat_interleave(len(x) // len(a), 0)
    states = []
    for step in x.unbind(1):
        h, c = lstm_step(step @ wx.T + h @ wh.T + attention(h, a) @ wa.T + b, c)
        states.append(h)
    return torch.stack(states, 1)


def temporal_softmax(logits: Tensor, token_ids: Tensor, pad_id: int) -> Tensor:
    """Return the loss, a scalar, for logits (N, T, V) and int64 targets (N, T)."""
    total = F.cross_entropy(logits.flatten(0, 1), token_ids.flatten(), ignore_index=pad_id, reduction="sum")
    return total / len(token_ids)
