"""RNN, LSTM: forward and backward written out. EECS 498, assignment 6.

Weights are laid out as torch.nn has them, (outputs, inputs); the LSTM's gates stand in the order input, forget, output,
candidate. Sequences are (N, T, D): what does not depend on the step before is done for all steps at once, so that a
step costs one product with `wh`.
Papers: Elman, 1990; Hochreiter and Schmidhuber, 1997 (LSTM; forget gate: Gers et al., 2000).
"""

from typing import NamedTuple

import torch
from torch import Tensor


class RNNStep:
    """One step of a plain recurrent network."""

    class Cache(NamedTuple):
        """What backward needs."""

        x: Tensor
        h: Tensor
        wx: Tensor
        wh: Tensor
        out: Tensor

    @staticmethod
    def forward(x: Tensor, h: Tensor, wx: Tensor, wh: Tensor, b: Tensor) -> tuple[Tensor, Cache]:
        """Return tanh(x wx^T + h wh^T + b): x (N, D), h (N, H), wx (H, D), wh (H, H), b (H,); out (N, H)."""
        out = torch.addmm(torch.addmm(b, x, wx.T), h, wh.T).tanh_()
        return out, RNNStep.Cache(x, h, wx, wh, out)

    @staticmethod
    def backward(dout: Tensor, cache: Cache) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return dx, dh, dwx, dwh, db for dout (N, H); tanh' = 1 - tanh^2."""
        da = dout * (1 - cache.out.square())  # (N, H)
        return da @ cache.wx, da @ cache.wh, da.T @ cache.x, da.T @ cache.h, da.sum(0)


class RNN:
    """A plain recurrent network over sequences."""

    class Cache(NamedTuple):
        """What backward needs; `out` (T, N, H)."""

        x: Tensor
        h0: Tensor
        wx: Tensor
        wh: Tensor
        out: Tensor

    @staticmethod
    def forward(x: Tensor, h0: Tensor, wx: Tensor, wh: Tensor, b: Tensor) -> tuple[Tensor, Cache]:
        """Return all states (N, T, H) for x (N, T, D), h0 (N, H), wx (H, D), wh (H, H), b (H,)."""
        ahead = project(x, wx, b)  # (T, N, H)
        out = torch.empty_like(ahead)
        h = h0
        for t in range(len(ahead)):
            torch.addmm(ahead[t], h, wh.T, out=out[t]).tanh_()
            h = out[t]
        return out.transpose(0, 1), RNN.Cache(x, h0, wx, wh, out)

    @staticmethod
    def backward(dout: Tensor, cache: Cache) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return dx, dh0, dwx, dwh, db for dout (N, T, H)."""
        da = torch.empty_like(cache.out)  # (T, N, H)
        dh = torch.zeros_like(cache.h0)
        for t in range(len(da) - 1, -1, -1):
            torch.mul(dout[:, t] + dh, 1 - cache.out[t].square(), out=da[t])
            dh = da[t] @ cache.wh
        dx, dwx, db = project_backward(da, cache.x, cache.wx)
        return dx, dh, dwx, _across(da, cache.h0, cache.out), db


class LSTMStep:
    """One step of an LSTM. It returns h and c side by side, (N, 2H), so that both can get a gradient."""

    class Cache(NamedTuple):
        """What backward needs; `gates` (N, 4H) after their functions."""

        x: Tensor
        h: Tensor
        c: Tensor
        wx: Tensor
        wh: Tensor
        gates: Tensor
        squashed: Tensor

    @staticmethod
    def forward(x: Tensor, h: Tensor, c: Tensor, wx: Tensor, wh: Tensor, b: Tensor) -> tuple[Tensor, Cache]:
        """Return [h', c'] (N, 2H): x (N, D), h and c (N, H), wx (4H, D), wh (4H, H), b (4H,)."""
        gates = _gates(torch.addmm(torch.addmm(b, x, wx.T), h, wh.T))
        i, f, o, g = gates.chunk(4, 1)
        after = f * c + i * g
        squashed = after.tanh()
        return torch.cat([o * squashed, after], 1), LSTMStep.Cache(x, h, c, wx, wh, gates, squashed)

    @staticmethod
    def backward(dout: Tensor, cache: Cache) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return dx, dh, dc, dwx, dwh, db for dout (N, 2H)."""
        dh, dc = dout.chunk(2, 1)
        da, dc_before = gates_backward(dh, dc, cache.gates, cache.squashed, cache.c)
        return da @ cache.wx, da @ cache.wh, dc_before, da.T @ cache.x, da.T @ cache.h, da.sum(0)


class LSTM:
    """An LSTM over sequences; the cell starts at 0."""

    class Cache(NamedTuple):
        """What backward needs, all over time first: states, cells and tanh of the cells (T, N, H), gates (T, N, 4H)."""

        x: Tensor
        h0: Tensor
        wx: Tensor
        wh: Tensor
        out: Tensor
        cells: Tensor
        squashed: Tensor
        gates: Tensor

    @staticmethod
    def forward(x: Tensor, h0: Tensor, wx: Tensor, wh: Tensor, b: Tensor) -> tuple[Tensor, Cache]:
        """Return all states (N, T, H) for x (N, T, D), h0 (N, H), wx (4H, D), wh (4H, H), b (4H,)."""
        gates = project(x, wx, b)  # (T, N, 4H)
        out = gates.new_empty(*gates.shape[:2], h0.shape[1])
        cells, squashed = torch.empty_like(out), torch.empty_like(out)
        h, c = h0, torch.zeros_like(h0)
        for t in range(len(gates)):
            h, c = lstm_step(gates[t].addmm_(h, wh.T), c, out[t], cells[t], squashed[t])
        return out.transpose(0, 1), LSTM.Cache(x, h0, wx, wh, out, cells, squashed, gates)

    @staticmethod
    def backward(dout: Tensor, cache: Cache) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return dx, dh0, dwx, dwh, db for dout (N, T, H)."""
        da = torch.empty_like(cache.gates)
        dh, dc, nothing = torch.zeros_like(cache.h0), torch.zeros_like(cache.h0), torch.zeros_like(cache.h0)
        for t in range(len(da) - 1, -1, -1):
            before = cache.cells[t - 1] if t else nothing
            da[t], dc = gates_backward(dout[:, t] + dh, dc, cache.gates[t], cache.squashed[t], before)
            dh = da[t] @ cache.wh
        dx, dwx, db = project_backward(da, cache.x, cache.wx)
        return dx, dh, dwx, _across(da, cache.h0, cache.out), db


def project(x: Tensor, wx: Tensor, b: Tensor) -> Tensor:
    """Return x wx^T + b for all steps, time first: (T, N, M)."""
    n, steps, _ = x.shape
    return torch.addmm(b, x.transpose(0, 1).reshape(steps * n, -1), wx.T).view(steps, n, -1)


def project_backward(da: Tensor, x: Tensor, wx: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx (N, T, D), dwx, db for da (T, N, M)."""
    flat = da.flatten(0, 1)
    dx = (flat @ wx).view(*da.shape[:2], -1).transpose(0, 1)
    return dx, flat.T @ x.transpose(0, 1).reshape(len(flat), -1), flat.sum(0)


def _across(da: Tensor, h0: Tensor, out: Tensor) -> Tensor:
    """Return the gradient of the weights between states: of each step with the state it began with."""
    dwh = da[0].T @ h0
    return dwh.addmm_(da[1:].flatten(0, 1).T, out[:-1].flatten(0, 1))


def _gates(a: Tensor) -> Tensor:
    """Put the gates' functions on a (..., 4H) in place: three sigmoids, one tanh."""
    hidden = a.shape[-1] // 4
    a[..., : 3 * hidden].sigmoid_()
    a[..., 3 * hidden :].tanh_()
    return a


def lstm_step(a: Tensor, c: Tensor, h: Tensor, after: Tensor, squashed: Tensor) -> tuple[Tensor, Tensor]:
    """Write a step's state and cell into `h` and `after`, from a (N, 4H), which becomes its gates, and c (N, H)."""
    i, f, o, g = _gates(a).chunk(4, 1)
    torch.mul(f, c, out=after)
    after.addcmul_(i, g)
    torch.tanh(after, out=squashed)
    torch.mul(o, squashed, out=h)
    return h, after


def gates_backward(dh: Tensor, dc: Tensor, gates: Tensor, squashed: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient (N, 4H) before the gates' functions and that of the cell (N, H) before the step."""
    i, f, o, g = gates.chunk(4, 1)
    hidden = dh.shape[1]
    dc = dc + dh * o * (1 - squashed.square())
    da = torch.empty_like(gates)
    torch.mul(dc, g, out=da[:, :hidden])
    torch.mul(dc, c, out=da[:, hidden : 2 * hidden])
    torch.mul(dh, squashed, out=da[:, 2 * hidden : 3 * hidden])
    torch.mul(dc, i, out=da[:, 3 * hidden :])
    three = gates[:, : 3 * hidden]
    da[:, : 3 * hidden] *= three * (1 - three)
    da[:, 3 * hidden :] *= 1 - g.square()
    return da, dc * f
