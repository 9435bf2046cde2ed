"""RNN and LSTM with hand-written forward and backward passes. After EECS 498, assignment 6.

Weights are laid out as in torch.nn, (outputs, inputs), but the LSTM's gates are in the order input, forget, output,
candidate. Sequences are (N, T, D): what does not depend on the previous step is computed for all steps at once, so that
a step costs one product with `wh`.

References:
    Elman, 1990, "Finding structure in time" (RNN).
    Hochreiter and Schmidhuber, 1997, "Long short-term memory"; Gers et al., 2000 (forget gate).
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
        """Return tanh(x wx^T + h wh^T + b).

        Args:
            x: Input (N, D).
            h: Previous state (N, H).
            wx: (H, D).
            wh: (H, H).
            b: (H,).

        Returns:
            next state (N, H), and the cache.
        """
        out = torch.addmm(torch.addmm(b, x, wx.T), h, wh.T).tanh_()
        return out, RNNStep.Cache(x, h, wx, wh, out)

    @staticmethod
    def backward(dout: Tensor, cache: Cache) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return dx, dh, dwx, dwh and db, of the shapes of the inputs, for dout (N, H); tanh' = 1 - tanh^2."""
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
        """Return the states of all steps.

        Args:
            x: Inputs (N, T, D).
            h0: Initial state (N, H).
            wx: (H, D).
            wh: (H, H).
            b: (H,).

        Returns:
            states (N, T, H), and the cache.
        """
        projected = project(x, wx, b)  # (T, N, H)
        out = torch.empty_like(projected)
        h = h0
        for t in range(len(projected)):
            torch.addmm(projected[t], h, wh.T, out=out[t]).tanh_()
            h = out[t]
        return out.transpose(0, 1), RNN.Cache(x, h0, wx, wh, out)

    @staticmethod
    def backward(dout: Tensor, cache: Cache) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return dx, dh0, dwx, dwh and db, of the shapes of the inputs, for dout (N, T, H)."""
        da = torch.empty_like(cache.out)  # (T, N, H)
        dh = torch.zeros_like(cache.h0)
        for t in range(len(da) - 1, -1, -1):
            torch.mul(dout[:, t] + dh, 1 - cache.out[t].square(), out=da[t])
            dh = da[t] @ cache.wh
        dx, dwx, db = project_backward(da, cache.x, cache.wx)
        return dx, dh, dwx, _state_weight_gradient(da, cache.h0, cache.out), db


class LSTMStep:
    """One step of an LSTM. It returns h and c side by side, (N, 2H), so that both can get a gradient."""

    class Cache(NamedTuple):
        """What backward needs; `gates` (N, 4H) after their nonlinearities, `tanh_c` (N, H) of the next cell."""

        x: Tensor
        h: Tensor
        c: Tensor
        wx: Tensor
        wh: Tensor
        gates: Tensor
        tanh_c: Tensor

    @staticmethod
    def forward(x: Tensor, h: Tensor, c: Tensor, wx: Tensor, wh: Tensor, b: Tensor) -> tuple[Tensor, Cache]:
        """Return the next state and cell.

        Args:
            x: Input (N, D).
            h: Previous state (N, H).
            c: Previous cell (N, H).
            wx: (4H, D).
            wh: (4H, H).
            b: (4H,).

        Returns:
            [next state, next cell] (N, 2H), and the cache.
        """
        gates = _gates(torch.addmm(torch.addmm(b, x, wx.T), h, wh.T))
        i, f, o, g = gates.chunk(4, 1)
        next_c = f * c + i * g
        tanh_c = next_c.tanh()
        return torch.cat([o * tanh_c, next_c], 1), LSTMStep.Cache(x, h, c, wx, wh, gates, tanh_c)

    @staticmethod
    def backward(dout: Tensor, cache: Cache) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return dx, dh, dc, dwx, dwh and db, of the shapes of the inputs, for dout (N, 2H)."""
        dh, dc = dout.chunk(2, 1)
        da, dprevious_c = gates_backward(dh, dc, cache.gates, cache.tanh_c, cache.c)
        return da @ cache.wx, da @ cache.wh, dprevious_c, da.T @ cache.x, da.T @ cache.h, da.sum(0)


class LSTM:
    """An LSTM over sequences; the cell starts at 0."""

    class Cache(NamedTuple):
        """What backward needs, time first: states, cells and tanh of the cells (T, N, H), gates (T, N, 4H)."""

        x: Tensor
        h0: Tensor
        wx: Tensor
        wh: Tensor
        out: Tensor
        cells: Tensor
        tanh_cells: Tensor
        gates: Tensor

    @staticmethod
    def forward(x: Tensor, h0: Tensor, wx: Tensor, wh: Tensor, b: Tensor) -> tuple[Tensor, Cache]:
        """Return the states of all steps.

        Args:
            x: Inputs (N, T, D).
            h0: Initial state (N, H).
            wx: (4H, D).
            wh: (4H, H).
            b: (4H,).

        Returns:
            states (N, T, H), and the cache.
        """
        gates = project(x, wx, b)  # (T, N, 4H)
        out = gates.new_empty(*gates.shape[:2], h0.shape[1])
        cells, tanh_cells = torch.empty_like(out), torch.empty_like(out)
        h, c = h0, torch.zeros_like(h0)
        for t in range(len(gates)):
            h, c = lstm_step(gates[t].addmm_(h, wh.T), c, out[t], cells[t], tanh_cells[t])
        return out.transpose(0, 1), LSTM.Cache(x, h0, wx, wh, out, cells, tanh_cells, gates)

    @staticmethod
    def backward(dout: Tensor, cache: Cache) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return dx, dh0, dwx, dwh and db, of the shapes of the inputs, for dout (N, T, H)."""
        da = torch.empty_like(cache.gates)
        dh, dc, c0 = torch.zeros_like(cache.h0), torch.zeros_like(cache.h0), torch.zeros_like(cache.h0)
        for t in range(len(da) - 1, -1, -1):
            previous_c = cache.cells[t - 1] if t else c0
            da[t], dc = gates_backward(dout[:, t] + dh, dc, cache.gates[t], cache.tanh_cells[t], previous_c)
            dh = da[t] @ cache.wh
        dx, dwx, db = project_backward(da, cache.x, cache.wx)
        return dx, dh, dwx, _state_weight_gradient(da, cache.h0, cache.out), db


def project(x: Tensor, wx: Tensor, b: Tensor) -> Tensor:
    """Return x wx^T + b, time first (T, N, M), for x (N, T, D), wx (M, D) and b (M,)."""
    n, steps, _ = x.shape
    return torch.addmm(b, x.transpose(0, 1).reshape(steps * n, -1), wx.T).view(steps, n, -1)


def project_backward(da: Tensor, x: Tensor, wx: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx (N, T, D), dwx (M, D) and db (M,), for da (T, N, M)."""
    flat = da.flatten(0, 1)
    dx = (flat @ wx).view(*da.shape[:2], -1).transpose(0, 1)
    return dx, flat.T @ x.transpose(0, 1).reshape(len(flat), -1), flat.sum(0)


def _state_weight_gradient(da: Tensor, h0: Tensor, out: Tensor) -> Tensor:
    """Return the gradient of `wh`, for da (T, N, M), initial state h0 (N, H) and states out (T, N, H)."""
    dwh = da[0].T @ h0
    return dwh.addmm_(da[1:].flatten(0, 1).T, out[:-1].flatten(0, 1))


def _gates(a: Tensor) -> Tensor:
    """Apply the nonlinearities of the gates to a (..., 4H) in place: three sigmoids, one tanh."""
    hidden = a.shape[-1] // 4
    a[..., : 3 * hidden].sigmoid_()
    a[..., 3 * hidden :].tanh_()
    return a


def lstm_step(a: Tensor, c: Tensor, next_h: Tensor, next_c: Tensor, tanh_c: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the next state and cell in place.

    Args:
        a: Pre-activations of the gates (N, 4H); becomes the gates.
        c: Previous cell (N, H).
        next_h: (N, H), is written to.
        next_c: (N, H), is written to.
        tanh_c: (N, H), is written to: tanh(next_c).

    Returns:
        next_h, next_c.
    """
    i, f, o, g = _gates(a).chunk(4, 1)
    torch.mul(f, c, out=next_c)
    next_c.addcmul_(i, g)
    torch.tanh(next_c, out=tanh_c)
    torch.mul(o, tanh_c, out=next_h)
    return next_h, next_c


def gates_backward(dh: Tensor, dc: Tensor, gates: Tensor, tanh_c: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of the gates' pre-activations and of the previous cell.

    Args:
        dh: Gradient of the next state (N, H).
        dc: Gradient of the next cell (N, H).
        gates: (N, 4H).
        tanh_c: Tanh of the next cell (N, H).
        c: Previous cell (N, H).

    Returns:
        da (N, 4H), dc (N, H).
    """
    i, f, o, g = gates.chunk(4, 1)
    hidden = dh.shape[1]
    dc = dc + dh * o * (1 - tanh_c.square())
    da = torch.empty_like(gates)
    torch.mul(dc, g, out=da[:, :hidden])
    torch.mul(dc, c, out=da[:, hidden : 2 * hidden])
    torch.mul(dh, tanh_c, out=da[:, 2 * hidden : 3 * hidden])
    torch.mul(dc, i, out=da[:, 3 * hidden :])
    sigmoids = gates[:, : 3 * hidden]
    da[:, : 3 * hidden] *= sigmoids * (1 - sigmoids)
    da[:, 3 * hidden :] *= 1 - g.square()
    return da, dc * f
