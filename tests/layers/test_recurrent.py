"""The hand-written recurrent layers and attention, against single steps and torch's layers."""

import pytest
import torch

from cvlab.layers import attention, recurrent, reference


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def test_a_sequence_equals_its_single_steps():
    torch.manual_seed(0)
    x, h, wx, wh, b = randn(3, 4, 5), randn(3, 2), randn(8, 5), randn(8, 2), randn(8)
    states, _ = recurrent.LSTM.forward(x, h, wx, wh, b)
    c = torch.zeros_like(h)
    for t in range(4):
        state, _ = recurrent.LSTMStep.forward(x[:, t], h, c, wx, wh, b)
        h, c = state.chunk(2, 1)
        torch.testing.assert_close(states[:, t], h)


def test_attention_weights_sum_to_one_and_prefer_the_most_similar_cell():
    a = torch.eye(4, dtype=torch.float64)[None] * 50
    attended, cache = attention.DotAttention.forward(torch.tensor([[0.0, 0, 50, 0]]).double(), a)
    assert cache.weights.sum().item() == pytest.approx(1)
    assert int(cache.weights.argmax()) == 2
    torch.testing.assert_close(attended, a[:, 2])


def test_lstm_equals_that_of_torch():
    torch.manual_seed(0)
    reference_module = torch.nn.LSTM(5, 2, batch_first=True).double()
    order = torch.tensor([0, 1, 2, 3, 6, 7, 4, 5])  # in torch, the candidate comes before the output gate
    wx, wh = reference_module.weight_ih_l0[order].detach(), reference_module.weight_hh_l0[order].detach()
    b = (reference_module.bias_ih_l0 + reference_module.bias_hh_l0)[order].detach()
    x, h = randn(3, 4, 5), randn(3, 2)
    actual, _ = recurrent.LSTM.forward(x, h, wx, wh, b)
    torch.testing.assert_close(actual, reference_module(x, (h[None], torch.zeros(1, 3, 2).double()))[0].detach())


def test_reference_attention_matches_the_layer():
    torch.manual_seed(0)
    h, a = randn(2, 3), randn(2, 5, 3)
    torch.testing.assert_close(attention.DotAttention.forward(h, a)[0], reference.attention(h, a))
