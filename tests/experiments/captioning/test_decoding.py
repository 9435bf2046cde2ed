"""Beam search against all sentences that there are, of a captioner small enough to try them."""

import itertools

import pytest
import torch

from cvlab.data.vocabulary import END, PAD, START, UNKNOWN
from cvlab.experiments.captioning import decoding
from cvlab.experiments.captioning.model import Captioner

WORDS = 7  # of which three are words
LENGTH = 4


@pytest.fixture(params=["rnn", "lstm", "attention_lstm"])
def net(request):
    torch.manual_seed(3)
    made = Captioner(5, WORDS, request.param, embed_dim=6, hidden_dim=8).eval()
    with torch.no_grad():
        made.output_projection.weight.mul_(3)
    return made


def features(net, n=3):
    return torch.randn(n, 4 if net.has_attention else 1, 5, generator=torch.Generator().manual_seed(1))


def score(net, feature, words):
    """The sum of the log-probabilities of a sentence, by one forward pass over all of it."""
    row = torch.tensor([[START, *words[:-1]]])
    with torch.no_grad():
        log_p = net(feature[None], row, torch.tensor([0])).log_softmax(-1)[0]
    return sum(log_p[t, word].item() for t, word in enumerate(words))


@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.0])
def test_a_beam_as_wide_as_everything_finds_the_best_of_all(net, alpha):
    for feature in features(net):
        best = max(
            (score(net, feature, (*words, END)) / (n + 1) ** alpha, (*words, END))
            for n in range(LENGTH)
            for words in itertools.product(range(UNKNOWN + 1, WORDS), repeat=n)
        )
        (found,) = decoding.beam_search(net, feature[None], beam_width=100, max_length=LENGTH, length_penalty=alpha)
        assert found.token_ids == best[1]
        assert found.score == pytest.approx(best[0], abs=1e-4)


def test_greedy_is_one_beam(net):
    for feature in features(net):
        words, alpha = [], 0.0
        state, word = net.initial_state(feature[None]), torch.tensor([START])
        ended = []
        with torch.no_grad():
            total = 0.0
            for t in range(LENGTH):
                scores, state, _ = net.step(state, word)
                log_p = scores.log_softmax(1)
                ended.append((total + log_p[0, END].item(), (*words, END)))
                log_p[:, [PAD, START, UNKNOWN, END]] = -1e9
                if t == LENGTH - 1:
                    break
                total += log_p.max().item()
                word = log_p.argmax(1)
                words.append(int(word))
        (found,) = decoding.beam_search(net, feature[None], beam_width=1, max_length=LENGTH, length_penalty=alpha)
        assert found.token_ids == max(ended)[1]


def test_photos_do_not_disturb_each_other_and_every_sentence_ends(net):
    together = decoding.beam_search(net, features(net, 5), beam_width=3, max_length=LENGTH)
    alone = [
        decoding.beam_search(net, feature[None], beam_width=3, max_length=LENGTH)[0] for feature in features(net, 5)
    ]
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]
    for sentence in together:
        assert sentence.token_ids[-1] == END
        assert len(sentence.token_ids) <= LENGTH
        assert not set(sentence.token_ids) & {PAD, START, UNKNOWN}


def test_where_it_looks(net):
    if not net.has_attention:
        return
    feature = features(net, 1)
    found = decoding.attention_weights(net, feature, (4, 5, END))
    assert found.shape == (3, 4)
    torch.testing.assert_close(found.sum(1), torch.ones(3))


def test_sentences_are_drawn_as_likely_as_they_are(net):
    torch.manual_seed(0)
    feature = features(net, 1)
    drawn = decoding.sample(net, feature, 20_000, LENGTH)
    assert drawn.shape == (20_000, LENGTH + 1)
    assert bool((drawn[:, 0] == START).all())
    allowed = [END, *range(UNKNOWN + 1, WORDS)]
    with torch.no_grad():
        first = net(feature, torch.tensor([[START]]), torch.tensor([0]))[0, 0, allowed].softmax(0)
    share = torch.tensor([(drawn[:, 1] == word).float().mean() for word in allowed])
    torch.testing.assert_close(share, first, atol=0.015, rtol=0)
    ended = (drawn == END).int().cumsum(1)
    assert bool((ended[:, -1] == 1).all())
    assert not bool(((drawn != PAD) & (drawn != END) & (ended > 0)).any())


def test_the_probability_of_a_sentence_is_the_product_over_its_words(net):
    rows = torch.tensor([[START, 4, 5, END, PAD], [START, 6, END, PAD, PAD]])
    found = net.log_prob(features(net, 2), rows, torch.tensor([1, 0]))
    wanted = [score(net, features(net, 2)[1], (4, 5, END)), score(net, features(net, 2)[0], (6, END))]
    torch.testing.assert_close(found, torch.tensor(wanted), atol=1e-4, rtol=0)
