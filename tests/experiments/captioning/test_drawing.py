"""Attention maps of a caption."""

import numpy as np
import pytest
import torch
from PIL import Image

from cvlab.data.vocabulary import PAD, START, UNKNOWN
from cvlab.experiments.captioning import decoding, drawing
from cvlab.experiments.captioning.model import Captioner
from cvlab.reports import fonts, images


@pytest.mark.parametrize("size", [(640, 480), (60, 600), (3000, 100)])
def test_the_sheet_shows_the_file_name_the_sentence_and_all_words_completely(monkeypatch, size):
    lines = []
    monkeypatch.setattr(fonts, "draw", lambda _pen, xy, text, px, *_: lines.append((xy[0], text, px)))
    tokens = ["a", "counterrevolutionaries", "cat", *["word"] * 12]
    sheet = drawing.attention_sheet(Image.new("RGB", size, "green"), tokens, torch.rand(15, 7, 7), "Müller café.jpg")
    texts = [text for _, text, _ in lines]
    assert texts[:16] == ["photo", *tokens]
    heading = " ".join(texts[16:])
    assert heading == f'attention by word: Müller café.jpg "{" ".join(tokens)}"'
    assert all(x >= 0 and x + fonts.width(text, px) <= sheet.width for x, text, px in lines)


@pytest.mark.parametrize("size", [(640, 480), (300, 500)])
def test_the_map_of_a_word_is_brightest_at_the_attended_cell(monkeypatch, size):
    cells = [(0, 0), (0, 6), (6, 0), (3, 3), (5, 1), (2, 6)]
    weights = torch.full((len(cells), 7, 7), 0.001)
    for k, (row, column) in enumerate(cells):
        weights[k, row, column] = 0.95
    tokens = [f"word{k}" for k in range(len(cells))]
    tiles = {}
    draw = images.captioned

    def captioned(image, text, width):
        tiles[text] = image
        return draw(image, text, width)

    monkeypatch.setattr(images, "captioned", captioned)
    drawing.attention_sheet(Image.new("RGB", size, (90, 90, 90)), tokens, weights, "photo.jpg")
    for token, (row, column) in zip(tokens, cells, strict=True):
        pixels = np.asarray(tiles[token]).astype(float)
        heat = np.abs(pixels[..., 0] - pixels[..., 2])
        heat[heat < heat.max() / 2] = 0
        ys, xs = np.mgrid[: heat.shape[0], : heat.shape[1]]
        center = (ys * heat).sum() / heat.sum() / heat.shape[0], (xs * heat).sum() / heat.sum() / heat.shape[1]
        assert center == pytest.approx(((row + 0.5) / 7, (column + 0.5) / 7), abs=0.06), token


def test_maps_are_drawn_relative_to_uniform_attention_on_one_scale():
    weights = torch.full((3, 4, 4), 1 / 16)
    weights[1, 2, 3], weights[1, 0, 0] = 2 / 16, 0  # twice as much as uniform
    weights[2] = 0
    weights[2, 1, 1], weights[2, 1, 2] = 13.5 / 16, 2.5 / 16
    excess = drawing.excess_over_uniform(weights)
    expected = torch.zeros(3, 4, 4)
    expected[1, 2, 3], expected[2, 1, 1], expected[2, 1, 2] = 0.5, 1, 0.75
    torch.testing.assert_close(excess, expected)


def test_a_nearly_uniform_map_is_drawn_flat(monkeypatch):
    tiles = []
    draw = images.captioned
    monkeypatch.setattr(images, "captioned", lambda image, text, width: tiles.append(image) or draw(image, text, width))
    weights = torch.full((2, 7, 7), 1 / 49) + 0.02 / 49 * torch.rand(2, 7, 7)
    weights[1] = 0
    weights[1, 3, 3] = 1
    drawing.attention_sheet(Image.new("RGB", (300, 200), (90, 90, 90)), ["a", "dog"], weights, "photo.jpg")
    uniform, peaked = (np.asarray(tile).astype(int) for tile in tiles[1:])
    assert np.ptp(uniform, axis=(0, 1)).max() <= 2
    assert np.ptp(peaked, axis=(0, 1)).max() > 60


def test_a_word_is_drawn_with_the_attention_weights_of_its_step():
    """The attention weights of a word are those of the step whose logits selected it, not those of the next step."""
    torch.manual_seed(0)
    model = Captioner(6, 20, cell="attention_lstm", embed_dim=8, hidden_dim=12).eval()
    features = torch.randn(1, 9, 6)
    (hypothesis,) = decoding.beam_search(model, features, 1, 6)
    weights = decoding.attention_weights(model, features, hypothesis.token_ids)
    state, previous = model.initial_state(features), START
    for k, token_id in enumerate(hypothesis.token_ids):
        context = state.context[0]
        expected = torch.softmax(context @ state.h[0] / context.shape[1] ** 0.5, 0)
        torch.testing.assert_close(weights[k], expected)
        logits, state, _ = model.step(state, torch.tensor([previous]))
        allowed = logits[0].index_fill(0, torch.tensor([PAD, START, UNKNOWN]), float("-inf"))
        assert int(allowed.argmax()) == token_id or k == len(hypothesis.token_ids) - 1
        previous = token_id
