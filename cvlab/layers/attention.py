"""Dot-product attention, for an LSTM and for transformers, with hand-written forward and backward passes.

A feature map is (L, H): features of size H at L spatial positions. There are M feature maps for N sequences; N is a
multiple of M, and N / M successive sequences belong to the same map.

References:
    Xu et al., 2015, "Show, attend and tell".
    Vaswani et al., 2017, "Attention is all you need", section 3.2.1 (scaled dot products).
    EECS 498, assignment 6.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from cvlab.layers.recurrent import gates_backward, lstm_step, project, project_backward


class DotAttention:
    """Scaled dot-product attention of states over the positions of feature maps, which are keys and values."""

    class Cache(NamedTuple):
        """What backward needs; each row of `weights` (N, L) sums to 1."""

        h: Tensor
        a: Tensor
        weights: Tensor

    @staticmethod
    def forward(h: Tensor, a: Tensor) -> tuple[Tensor, Cache]:
        """Return the mean of the features, weighted by softmax(a h / sqrt(H)).

        Args:
            h: States (N, H), the queries.
            a: Feature maps (M, L, H).

        Returns:
            attended features (N, H), and the cache.
        """
        scores = torch.bmm(_by_map(h, a), a.mT) / math.sqrt(h.shape[1])  # (M, N / M, L)
        weights = (scores - scores.amax(2, keepdim=True)).exp_()
        weights = weights / weights.sum(2, keepdim=True)
        return torch.bmm(weights, a).flatten(0, 1), DotAttention.Cache(h, a, weights.flatten(0, 1))

    @staticmethod
    def backward(dout: Tensor, cache: Cache) -> tuple[Tensor, Tensor]:
        """Return dh (N, H) and da (M, L, H), for dout (N, H)."""
        dh, dscores = DotAttention.query_backward(dout, cache.weights, cache.a)
        da = torch.bmm(_by_map(cache.weights, cache.a).mT, _by_map(dout, cache.a))
        return dh, da.baddbmm_(_by_map(dscores, cache.a).mT, _by_map(cache.h, cache.a))

    @staticmethod
    def query_backward(dout: Tensor, weights: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        """Return dh (N, H) and the gradient (N, L) of the products a h, for dout (N, H)."""
        dweights = torch.bmm(_by_map(dout, a), a.mT).flatten(0, 1)  # (N, L)
        dscores = weights * (dweights - (weights * dweights).sum(1, keepdim=True)) / math.sqrt(a.shape[2])
        return torch.bmm(_by_map(dscores, a), a).flatten(0, 1), dscores


def _by_map(rows: Tensor, a: Tensor) -> Tensor:
    """Return rows (N, ...) grouped by their feature map of a (M, L, H): (M, N / M, ...)."""
    return rows.view(len(a), -1, *rows.shape[1:])


class ScaledDotProductAttention:
    """Attention of B sequences of queries over keys, which is what each head of a transformer does."""

    class Cache(NamedTuple):
        """What backward needs; each row of `weights` (B, T, L) sums to 1."""

        q: Tensor
        k: Tensor
        v: Tensor
        weights: Tensor

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False) -> tuple[Tensor, Cache]:
        """Return softmax(q k^T / sqrt(D)) v.

        Args:
            q: Queries (B, T, D).
            k: Keys (B, L, D).
            v: Values (B, L, D).
            is_causal: Query t attends to the keys 0 to t only; L is T.

        Returns:
            attended values (B, T, D), and the cache. The softmax is float32 at least.
        """
        scores = torch.bmm(q, k.mT)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).mul_(q.shape[2] ** -0.5)
        if is_causal:
            is_later = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu_(1)
            scores.masked_fill_(is_later, -torch.inf)
        weights = scores.sub_(scores.amax(2, keepdim=True)).exp_()
        weights = weights.div_(weights.sum(2, keepdim=True)).to(v.dtype)
        return torch.bmm(weights, v), ScaledDotProductAttention.Cache(q, k, v, weights)

    @staticmethod
    def backward(dout: Tensor, cache: Cache) -> tuple[Tensor, Tensor, Tensor]:
        """Return dq (B, T, D), dk and dv (B, L, D), for dout (B, T, D)."""
        dv = torch.bmm(cache.weights.mT, dout)
        dweights = torch.bmm(dout, cache.v.mT)
        dscores = cache.weights * (dweights - (cache.weights * dweights).sum(2, keepdim=True))
        dscores *= cache.q.shape[2] ** -0.5  # weights are 0 where the mask is, so are their gradients
        return torch.bmm(dscores, cache.k), torch.bmm(dscores.mT, cache.q), dv


class AttentionLSTM:
    """An LSTM that attends to a feature map before each step; state and cell start as the map's mean."""

    class Cache(NamedTuple):
        """What backward needs, time first; `weights` (T, N, L) and `attended` features (T, N, H)."""

        x: Tensor
        a: Tensor
        wx: Tensor
        wh: Tensor
        wa: Tensor
        initial: Tensor
        out: Tensor
        cells: Tensor
        tanh_cells: Tensor
        gates: Tensor
        weights: Tensor
        attended: Tensor

    @staticmethod
    def forward(x: Tensor, a: Tensor, wx: Tensor, wh: Tensor, wa: Tensor, b: Tensor) -> tuple[Tensor, Cache]:
        """Return the states of all steps.

        Args:
            x: Inputs (N, T, D).
            a: Feature maps (M, L, H).
            wx: (4H, D), of the inputs.
            wh: (4H, H), of the states.
            wa: (4H, H), of the attended features.
            b: (4H,).

        Returns:
            states (N, T, H), and the cache.
        """
        gates = project(x, wx, b)  # (T, N, 4H)
        steps, n, hidden = len(gates), len(x), a.shape[2]
        out = gates.new_empty(steps, n, hidden)
        cells, tanh_cells, attended = torch.empty_like(out), torch.empty_like(out), torch.empty_like(out)
        weights = gates.new_empty(steps, n, a.shape[1])
        initial = a.mean(1).repeat_interleave(n // len(a), 0)
        h, c = initial, initial
        for t in range(steps):
            attended[t], attention = DotAttention.forward(h, a)
            weights[t] = attention.weights
            h, c = lstm_step(gates[t].addmm_(h, wh.T).addmm_(attended[t], wa.T), c, out[t], cells[t], tanh_cells[t])
        cache = AttentionLSTM.Cache(x, a, wx, wh, wa, initial, out, cells, tanh_cells, gates, weights, attended)
        return out.transpose(0, 1), cache

    @staticmethod
    def backward(dout: Tensor, cache: Cache) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return dx, da, dwx, dwh, dwa and db, of the shapes of the inputs, for dout (N, T, H)."""
        d_gates = torch.empty_like(cache.gates)
        d_attended = torch.empty_like(cache.attended)
        d_scores = torch.empty_like(cache.weights)
        dh, dc = torch.zeros_like(cache.initial), torch.zeros_like(cache.initial)
        for t in range(len(d_gates) - 1, -1, -1):
            previous_c = cache.cells[t - 1] if t else cache.initial
            d_gates[t], dc = gates_backward(dout[:, t] + dh, dc, cache.gates[t], cache.tanh_cells[t], previous_c)
            torch.mm(d_gates[t], cache.wa, out=d_attended[t])
            dh_query, d_scores[t] = DotAttention.query_backward(d_attended[t], cache.weights[t], cache.a)
            dh = (d_gates[t] @ cache.wh).add_(dh_query)
        states = torch.cat([cache.initial[None], cache.out[:-1]])  # (T, N, H): the state before each step
        # The features enter the attended mean and the scores of every step: two products over time.
        weights, d_attended_by_map, d_scores, previous_h = (
            _over_time(rows, cache.a) for rows in (cache.weights, d_attended, d_scores, states)
        )
        da = torch.bmm(weights.mT, d_attended_by_map).baddbmm_(d_scores.mT, previous_h)
        da += (_by_map(dh + dc, cache.a).sum(1) / cache.a.shape[1])[:, None]
        dx, dwx, db = project_backward(d_gates, cache.x, cache.wx)
        flat = d_gates.flatten(0, 1).T
        return dx, da, dwx, flat @ states.flatten(0, 1), flat @ cache.attended.flatten(0, 1), db


def _over_time(rows: Tensor, a: Tensor) -> Tensor:
    """Return rows (T, N, D) grouped by their feature map of a (M, L, H): (M, T * N / M, D)."""
    return rows.view(len(rows), len(a), -1, rows.shape[2]).transpose(0, 1).flatten(1, 2)
