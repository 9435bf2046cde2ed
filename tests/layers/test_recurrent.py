"""The hand-written recurrent layers and attention, against single steps and torch's layers."""

import pytest
import torch

from cvlab.layers import attention, recurrent, reference


def some(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def test_a_sequence_is_its_steps_one_after_the_other():
    torch.manual_seed(0)
    x, h, wx, wh, b = some(3, 4, 5), some(3, 2), some(8, 5), some(8, 2), some(8)
    states, _ = recurrent.LSTM.forward(x, h, wx, wh, b)
    c = torch.zeros_like(h)
    for t in range(4):
        both, _ = recurrent.LSTMStep.forward(x[:, t], h, c, wx, wh, b)
        h, c = both.chunk(2, 1)
        torch.testing.assert_close(states[:, t], h)


def test_attention_weights_are_a_distribution_and_the_most_alike_cell_wins():
    a = torch.eye(4, dtype=torch.float64)[None] * 50
    looked, cache = attention.DotAttention.forward(torch.tensor([[0.0, 0, 50, 0]]).double(), a)
    assert cache.weights.sum().item() == pytest.approx(1)
    assert int(cache.weights.argmax()) == 2
    torch.testing.assert_close(looked, a[:, 2])


def test_lstm_equals_torchs_own():
    torch.manual_seed(0)
    theirs = torch.nn.LSTM(5, 2, batch_first=True).double()
    order = torch.tensor([0, 1, 2, 3, 6, 7, 4, 5])  # torch's candidate comes before its output
    wx, wh = theirs.weight_ih_l0[order].detach(), theirs.weight_hh_l0[order].detach()
    b = (theirs.bias_ih_l0 + theirs.bias_hh_l0)[order].detach()
    x, h = some(3, 4, 5), some(3, 2)
    mine, _ = recurrent.LSTM.forward(x, h, wx, wh, b)
    torch.testing.assert_close(mine, theirs(x, (h[None], torch.zeros(1, 3, 2).double()))[0].detach())


def test_the_reference_attends_as_the_layer_does():
    torch.manual_seed(0)
    h, a = some(2, 3), some(2, 5, 3)
    torch.testing.assert_close(attention.DotAttention.forward(h, a)[0], reference.attention(h, a))
