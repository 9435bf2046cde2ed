"""The recurrent layers by hand, and that a captioner of them is one of torch's layers."""

import pytest
import torch

from cvlab.experiments.captioning.model import Captioner
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


@pytest.mark.parametrize("cell", ["rnn", "lstm", "attention_lstm"])
class TestCaptioner:
    def nets(self, cell):
        torch.manual_seed(0)
        nets = []
        for layers in ("torch", "manual"):
            net = Captioner(
                6, 9, cell, embed_dim=4, hidden_dim=3, dropout=0.0, feature_dropout=0.0, layers=layers
            ).double()
            nets.append(net)
        nets[1].load_state_dict(nets[0].state_dict())
        cells = 5 if cell == "attention_lstm" else 1
        words = torch.tensor([[1, 5, 6, 2, 0], [1, 7, 2, 0, 0], [1, 4, 8, 5, 2]])
        return *nets, some(2, cells, 6), words, torch.tensor([0, 1, 1])

    def test_layers_by_hand_and_of_torch_agree_in_losses_and_gradients(self, cell):
        theirs, mine, features, words, image = self.nets(cell)
        losses = [net.loss(features, words, image) for net in (theirs, mine)]
        torch.testing.assert_close(losses[0], losses[1])
        for loss, _ in losses:
            loss.backward()
        for ours, other in zip(mine.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, other.grad)

    def test_the_loss_is_a_sum_over_words_and_a_mean_over_sentences(self, cell):
        net, _, features, words, image = self.nets(cell)
        log_p = net(features, words[:, :-1], image).log_softmax(-1)
        total = -sum(log_p[n, t, words[n, t + 1]] for n in range(3) for t in range(4) if words[n, t + 1] != 0)
        loss, each = net.loss(features, words, image)
        torch.testing.assert_close(loss, total / 3)
        torch.testing.assert_close(each, (total / 9).detach())

    def test_steps_say_what_the_whole_sequence_says(self, cell):
        net, _, features, words, image = self.nets(cell)
        whole = net(features, words[:, :-1], image).log_softmax(-1)
        state = net.initial_state(features[image])
        for t in range(4):
            found, state, weights = net.step(state, words[:, t])
            log_p = found.log_softmax(1)
            torch.testing.assert_close(log_p, whole[:, t])
            assert (weights is None) == (cell != "attention_lstm")


def test_the_reference_attends_as_the_layer_does():
    torch.manual_seed(0)
    h, a = some(2, 3), some(2, 5, 3)
    torch.testing.assert_close(attention.DotAttention.forward(h, a)[0], reference.attention(h, a))
