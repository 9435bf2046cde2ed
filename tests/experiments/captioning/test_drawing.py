"""Attention maps of a caption."""

import pytest
import torch
from PIL import Image

from cvlab.experiments.captioning import drawing
from cvlab.reports import fonts


@pytest.mark.parametrize("size", [(640, 480), (60, 600), (3000, 100)])
def test_the_sheet_has_the_file_name_the_sentence_and_all_words_uncut(monkeypatch, size):
    lines = []
    monkeypatch.setattr(fonts, "draw", lambda _pen, xy, text, px, *_: lines.append((xy[0], text, px)))
    tokens = ["a", "counterrevolutionaries", "cat", *["word"] * 12]
    sheet = drawing.attention_sheet(Image.new("RGB", size, "green"), tokens, torch.rand(15, 7, 7), "Müller café.jpg")
    texts = [text for _, text, _ in lines]
    assert texts[:16] == ["photo", *tokens]
    heading = " ".join(texts[16:])
    assert heading == f'attention by word: Müller café.jpg "{" ".join(tokens)}"'
    assert all(x >= 0 and x + fonts.width(text, px) <= sheet.width for x, text, px in lines)
