"""Attention, and an LSTM that attends: forward and backward written out.

Paper: Xu et al., 2015, "Show, attend and tell"; Vaswani et al., 2017, section 3.2.1 (scaled dot products); source:
EECS 498, assignment 6.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from cvlab.layers.recurrent import gates_backward, lstm_step, project, project_backward


class DotAttention:
    """Scaled dot-product attention of states over the cells of maps; N / M states after another have the same map."""

    class Cache(NamedTuple):
        """What backward needs; `weights` (N, L) sum to 1."""

        h: Tensor
        a: Tensor
        weights: Tensor

    @staticmethod
    def forward(h: Tensor, a: Tensor) -> tuple[Tensor, Cache]:
        """Return the mean (N, H) of cells a (M, L, H), weighted by softmax(a h / sqrt(H)), for h (N, H)."""
        scores = torch.bmm(_by_map(h, a), a.mT) / math.sqrt(h.shape[1])  # (M, N / M, L)
        weights = (scores - scores.amax(2, keepdim=True)).exp_()
        weights = weights / weights.sum(2, keepdim=True)
        return torch.bmm(weights, a).flatten(0, 1), DotAttention.Cache(h, a, weights.flatten(0, 1))

    @staticmethod
    def backward(dout: Tensor, cache: Cache) -> tuple[Tensor, Tensor]:
        """Return dh (N, H), da (M, L, H) for dout (N, H)."""
        dh, dscores = DotAttention.towards_state(dout, cache.weights, cache.a)
        da = torch.bmm(_by_map(cache.weights, cache.a).mT, _by_map(dout, cache.a))
        return dh, da.baddbmm_(_by_map(dscores, cache.a).mT, _by_map(cache.h, cache.a))

    @staticmethod
    def towards_state(dout: Tensor, weights: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        """Return dh (N, H) and the gradient (N, L) of a h, the scale taken in."""
        dweights = torch.bmm(_by_map(dout, a), a.mT).flatten(0, 1)  # (N, L)
        dscores = weights * (dweights - (weights * dweights).sum(1, keepdim=True)) / math.sqrt(a.shape[2])
        return torch.bmm(_by_map(dscores, a), a).flatten(0, 1), dscores


def _by_map(rows: Tensor, a: Tensor) -> Tensor:
    """Return rows (N, ...) as (M, N / M, ...), by the maps (M, L, H) that they look at."""
    return rows.view(len(a), -1, *rows.shape[1:])


class AttentionLSTM:
    """An LSTM that looks at a map before each step; state and cell start as the mean of the map's cells.

    N / M sentences after another are about the same map.
    """

    class Cache(NamedTuple):
        """What backward needs, over time first; `weights` (T, N, L) and what was `seen` (T, N, H)."""

        x: Tensor
        a: Tensor
        wx: Tensor
        wh: Tensor
        wa: Tensor
        start: Tensor
        out: Tensor
        cells: Tensor
        squashed: Tensor
        gates: Tensor
        weights: Tensor
        seen: Tensor

    @staticmethod
    def forward(x: Tensor, a: Tensor, wx: Tensor, wh: Tensor, wa: Tensor, b: Tensor) -> tuple[Tensor, Cache]:
        """Return all states (N, T, H): x (N, T, D), maps a (M, L, H), wx (4H, D), wh and wa (4H, H), b (4H,)."""
        gates = project(x, wx, b)  # (T, N, 4H)
        steps, n, hidden = len(gates), len(x), a.shape[2]
        out = gates.new_empty(steps, n, hidden)
        cells, squashed, seen = torch.empty_like(out), torch.empty_like(out), torch.empty_like(out)
        weights = gates.new_empty(steps, n, a.shape[1])
        start = a.mean(1).repeat_interleave(n // len(a), 0)
        h, c = start, start
        for t in range(steps):
            seen[t], looked = DotAttention.forward(h, a)
            weights[t] = looked.weights
            h, c = lstm_step(gates[t].addmm_(h, wh.T).addmm_(seen[t], wa.T), c, out[t], cells[t], squashed[t])
        cache = AttentionLSTM.Cache(x, a, wx, wh, wa, start, out, cells, squashed, gates, weights, seen)
        return out.transpose(0, 1), cache

    @staticmethod
    def backward(dout: Tensor, cache: Cache) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return dx, da, dwx, dwh, dwa, db for dout (N, T, H)."""
        d_gates = torch.empty_like(cache.gates)
        d_seen = torch.empty_like(cache.seen)
        d_scores = torch.empty_like(cache.weights)
        dh, dc = torch.zeros_like(cache.start), torch.zeros_like(cache.start)
        for t in range(len(d_gates) - 1, -1, -1):
            before = cache.cells[t - 1] if t else cache.start
            d_gates[t], dc = gates_backward(dout[:, t] + dh, dc, cache.gates[t], cache.squashed[t], before)
            torch.mm(d_gates[t], cache.wa, out=d_seen[t])
            towards, d_scores[t] = DotAttention.towards_state(d_seen[t], cache.weights[t], cache.a)
            dh = (d_gates[t] @ cache.wh).add_(towards)
        states = torch.cat([cache.start[None], cache.out[:-1]])  # (T, N, H): the one that each step began with
        # A cell is in what was seen and in the scores, of every step: two products over time.
        weights, d_seen_by_map, d_scores, begun = (
            _over_time(rows, cache.a) for rows in (cache.weights, d_seen, d_scores, states)
        )
        da = torch.bmm(weights.mT, d_seen_by_map).baddbmm_(d_scores.mT, begun)
        da += (_by_map(dh + dc, cache.a).sum(1) / cache.a.shape[1])[:, None]
        dx, dwx, db = project_backward(d_gates, cache.x, cache.wx)
        flat = d_gates.flatten(0, 1).T
        return dx, da, dwx, flat @ states.flatten(0, 1), flat @ cache.seen.flatten(0, 1), db


def _over_time(rows: Tensor, a: Tensor) -> Tensor:
    """Return rows (T, N, ...) as (M, T * N / M, ...), by the maps (M, L, H) that they look at."""
    return rows.view(len(rows), len(a), -1, rows.shape[2]).transpose(0, 1).flatten(1, 2)
