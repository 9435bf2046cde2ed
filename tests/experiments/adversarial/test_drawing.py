"""The panel of an attack."""

import numpy as np
import pytest
from PIL import Image

from cvlab.experiments.adversarial import drawing
from cvlab.reports import fonts

VALUES = {"label": "ostrich", "score": 0.9, "before": {"label": "cat", "score": 0.8}, "l2": 1.0, "linf_255": 4.0}


@pytest.fixture
def texts(monkeypatch):
    """Return a list that receives the lines of text of a panel."""
    lines = []
    monkeypatch.setattr(fonts, "draw", lambda _pen, _xy, text, *_: lines.append(text))
    return lines


def panel(region, steps=1, target="ostrich"):
    before = Image.new("RGB", (300, 200), (200, 100, 50))
    after = before.copy()
    after.paste((205, 100, 50), region)
    values = {**VALUES, "steps": steps, **({"target": target} if target else {})}
    return drawing.attack_panel("a.jpg", values, before, after, region)


def test_the_difference_is_amplified_and_the_crop_is_mentioned(texts):
    sheet = panel((50, 0, 250, 200))
    assert "attack to ostrich: a.jpg" in texts
    text = " ".join(texts)
    assert "after 1 step;" in text
    assert "only the center crop that the model sees is changed (outlined)" in text
    assert len([line for line in texts if line.startswith("difference")]) == 1
    pixels = np.asarray(sheet)
    assert (pixels == (253, 128, 128)).all(-1).any(), "red is 5 higher, times 100 / 4"
    assert (pixels == (128, 128, 128)).all(-1).any(), "the unchanged border"


def test_a_whole_image_has_no_outline(texts):
    panel((0, 0, 300, 200), steps=2, target=None)
    assert "attack: a.jpg" in texts
    text = " ".join(texts)
    assert "after 2 steps" in text
    assert "crop" not in text
