"""Beam search, sampling and attention weights, on a vocabulary small enough to enumerate all captions."""

import itertools
from pathlib import Path

import pytest
import torch

from cvlab.data.vocabulary import END, PAD, START, UNKNOWN, Vocabulary
from cvlab.experiments.captioning import decoding, self_critical
from cvlab.experiments.captioning.batches import CaptionBatch
from cvlab.experiments.captioning.dataset import CaptionSample
from cvlab.experiments.captioning.model import Captioner
from cvlab.experiments.captioning.self_critical import CiderReward
from cvlab.experiments.captioning.transformer import TransformerCaptioner

VOCAB_SIZE = 7  # four special tokens and three words
MAX_LENGTH = 4


@pytest.fixture(params=["rnn", "lstm", "attention_lstm", "transformer"])
def model(request):
    torch.manual_seed(3)
    if request.param == "transformer":
        return TransformerCaptioner(5, VOCAB_SIZE, hidden_dim=8, num_layers=2, num_heads=2).eval()
    captioner = Captioner(5, VOCAB_SIZE, request.param, embed_dim=6, hidden_dim=8).eval()
    with torch.no_grad():
        captioner.output_projection.weight.mul_(3)
    return captioner


def make_features(model, n=3):
    return torch.randn(n, 4 if model.has_attention else 1, 5, generator=torch.Generator().manual_seed(1))


def log_prob(model, features, token_ids, suppressed=decoding.SUPPRESSED):
    """Return the log-probability of a caption, computed by one forward pass over all of its tokens."""
    inputs = torch.tensor([[START, *token_ids[:-1]]])
    with torch.no_grad():
        logits = model(features[None], inputs, torch.tensor([0]))[0]
    logits[:, suppressed] = -torch.inf
    log_p = logits.log_softmax(1)
    return sum(log_p[t, token_id].item() for t, token_id in enumerate(token_ids))


@pytest.mark.parametrize("length_penalty", [0.0, 0.7, 1.0])
def test_an_exhaustive_beam_search_finds_the_best_caption(model, length_penalty):
    for features in make_features(model):
        best = max(
            (log_prob(model, features, (*token_ids, END)) / (n + 1) ** length_penalty, (*token_ids, END))
            for n in range(MAX_LENGTH)
            for token_ids in itertools.product(range(UNKNOWN + 1, VOCAB_SIZE), repeat=n)
        )
        (hypothesis,) = decoding.beam_search(model, features[None], 100, MAX_LENGTH, length_penalty)
        assert hypothesis.token_ids == best[1]
        assert hypothesis.score == pytest.approx(best[0], abs=1e-4)


def test_a_constrained_beam_search_finds_the_best_caption_that_satisfies_the_constraints(model):
    """A batch of five photos: no constraint, one word, two words, two sets that share a word, forbidden words."""
    sets = [((), ()), ((5,), ()), ((4,), (6,)), ((4, 5), (5, 6)), ((6,), ())]
    forbidden_words = [(), (), (), (), (4, 5)]
    required, forbidden = torch.zeros(5, 2, VOCAB_SIZE).bool(), torch.zeros(5, VOCAB_SIZE).bool()
    for k in range(5):
        forbidden[k, list(forbidden_words[k])] = True
        for c in range(2):
            required[k, c, list(sets[k][c])] = True
    features = make_features(model, 5)
    constraints = decoding.WordConstraints(required, forbidden)
    hypotheses = decoding.beam_search(model, features, 100, MAX_LENGTH, 0.7, constraints)
    unconstrained = decoding.beam_search(model, features, 100, MAX_LENGTH, 0.7)
    assert hypotheses[0].token_ids == unconstrained[0].token_ids
    assert [h.token_ids for h in hypotheses] != [h.token_ids for h in unconstrained]
    for k, hypothesis in enumerate(hypotheses):
        best = max(
            (log_prob(model, features[k], (*token_ids, END)) / (n + 1) ** 0.7, (*token_ids, END))
            for n in range(MAX_LENGTH)
            for token_ids in itertools.product(range(UNKNOWN + 1, VOCAB_SIZE), repeat=n)
            if all(set(token_ids) & set(required_set) for required_set in sets[k] if required_set)
            and not set(token_ids) & set(forbidden_words[k])
        )
        assert hypothesis.token_ids == best[1]
        assert hypothesis.score == pytest.approx(best[0], abs=1e-4)


def test_a_narrow_constrained_beam_search_satisfies_the_constraints(model):
    required, forbidden = torch.zeros(3, 2, VOCAB_SIZE).bool(), torch.zeros(3, VOCAB_SIZE).bool()
    required[:, 0, 4] = required[:, 1, 6] = True
    constraints = decoding.WordConstraints(required, forbidden)
    for max_length in (3, MAX_LENGTH):
        for hypothesis in decoding.beam_search(model, make_features(model), 1, max_length, 0.7, constraints):
            assert {4, 6} <= set(hypothesis.token_ids)
            assert hypothesis.token_ids[-1] == END
            assert -100 < hypothesis.score < 0


def test_a_beam_of_width_one_is_greedy(model):
    for features in make_features(model):
        token_ids = []
        state, token_id = model.initial_state(features[None]), torch.tensor([START])
        finished = []
        with torch.no_grad():
            total = 0.0
            for t in range(MAX_LENGTH):
                logits, state, _ = model.step(state, token_id)
                logits[:, [PAD, START, UNKNOWN]] = -1e9
                log_p = logits.log_softmax(1)
                finished.append((total + log_p[0, END].item(), (*token_ids, END)))
                log_p[:, END] = -1e9
                if t == MAX_LENGTH - 1:
                    break
                total += log_p.max().item()
                token_id = log_p.argmax(1)
                token_ids.append(int(token_id))
        (hypothesis,) = decoding.beam_search(model, features[None], 1, MAX_LENGTH, length_penalty=0.0)
        assert hypothesis.token_ids == max(finished)[1]


def test_photos_of_a_batch_are_independent_and_every_caption_ends(model):
    features = make_features(model, 5)
    batched = decoding.beam_search(model, features, beam_width=3, max_length=MAX_LENGTH)
    single = [decoding.beam_search(model, photo[None], beam_width=3, max_length=MAX_LENGTH)[0] for photo in features]
    assert [hypothesis.token_ids for hypothesis in batched] == [hypothesis.token_ids for hypothesis in single]
    for hypothesis in batched:
        assert hypothesis.token_ids[-1] == END
        assert len(hypothesis.token_ids) <= MAX_LENGTH
        assert not set(hypothesis.token_ids) & {PAD, START, UNKNOWN}


def test_attention_weights_sum_to_one(model):
    if not model.has_attention:
        return
    weights = decoding.attention_weights(model, make_features(model, 1), (4, 5, END))
    assert weights.shape == (3, 4)
    torch.testing.assert_close(weights.sum(1), torch.ones(3))


def test_samples_follow_the_distribution_of_the_model(model):
    torch.manual_seed(0)
    features = make_features(model, 1)
    samples = decoding.sample(model, features, 20_000, MAX_LENGTH)
    assert samples.shape == (20_000, MAX_LENGTH + 1)
    assert bool((samples[:, 0] == START).all())
    allowed = [END, *range(UNKNOWN + 1, VOCAB_SIZE)]
    with torch.no_grad():
        expected = model(features, torch.tensor([[START]]), torch.tensor([0]))[0, 0, allowed].softmax(0)
    frequencies = torch.tensor([(samples[:, 1] == token_id).float().mean() for token_id in allowed])
    torch.testing.assert_close(frequencies, expected, atol=0.015, rtol=0)
    has_ended = (samples == END).int().cumsum(1)
    assert bool((has_ended[:, -1] == 1).all())
    assert not bool(((samples != PAD) & (samples != END) & (has_ended > 0)).any())


def test_the_log_prob_of_a_caption_is_the_sum_over_its_tokens(model):
    token_ids = torch.tensor([[START, 4, 5, END, PAD], [START, 6, END, PAD, PAD]])
    features = make_features(model, 2)
    for suppressed in ((), decoding.SUPPRESSED):
        captions = [(features[1], (4, 5, END)), (features[0], (6, END))]
        expected = [log_prob(model, *caption, suppressed) for caption in captions]
        actual = model.log_prob(features, token_ids, torch.tensor([1, 0]), suppressed)
        torch.testing.assert_close(actual, torch.tensor(expected), atol=1e-4, rtol=0)


def test_the_policy_gradient_moves_no_probability_to_suppressed_tokens(model):
    """A regression test: bad samples lost probability to UNKNOWN, which is never sampled and so never scored."""
    vocabulary = Vocabulary(("a", "b", "c"))
    samples = [CaptionSample(Path("photo.png"), captions) for captions in (("a b",), ("c",))]
    features = make_features(model, 2)
    batch = CaptionBatch(features, torch.arange(2), torch.zeros(0, 3), torch.zeros(0), is_self_critical=True)
    losses = self_critical.self_critical_loss(model, batch, CiderReward(samples, vocabulary), 20, MAX_LENGTH)
    losses["loss"].backward()
    bias = model.output_bias if isinstance(model, TransformerCaptioner) else model.output_projection.bias
    assert not bias.grad[list(decoding.SUPPRESSED)].any()
    assert bias.grad[END:].any()
