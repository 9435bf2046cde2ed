"""Text in images: any script, nothing cut off, characters without a glyph are escaped."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from cvlab.reports import fonts

PX = 20


def draw_text(text):
    """Return the pixels covered by a line of text, bool (H, W)."""
    canvas = Image.new("L", (600, 60), "white")
    fonts.draw(ImageDraw.Draw(canvas), (10, 10), text, PX, "black")
    return np.asarray(canvas) < 128


def missing_glyph():
    """Return the pixels covered by the box that fonts draw for a missing character."""
    canvas = Image.new("L", (600, 60), "white")
    font = fonts.load(fonts.bundled_path(), PX)
    ImageDraw.Draw(canvas).text((10, 10 + fonts.ASCENT * PX), "\U000f0000", fill="black", font=font, anchor="ls")
    return np.asarray(canvas) < 128


@pytest.mark.parametrize("text", ["ü", "é", "Ω", "Я", "ж", "ł"])
def test_latin_greek_and_cyrillic_have_glyphs(text, bundled_font_only):
    assert fonts.printable(text) == text
    mask = draw_text(text)
    assert mask.any()
    assert not np.array_equal(mask, missing_glyph())


def test_accents_are_above_their_letters():
    rows = [np.flatnonzero(draw_text(text).any(1))[0] for text in ("u", "ü")]
    assert rows[1] < rows[0]


def test_decomposed_accents_are_composed(bundled_font_only):
    assert fonts.printable("Mu\u0308ller cafe\u0301.jpg") == "Müller café.jpg"


def test_characters_without_a_glyph_are_escaped(bundled_font_only):
    assert fonts.printable("日本.jpg") == "\\u65e5\\u672c.jpg"
    assert fonts.printable("a\nb\u202ec\U0001f9ff") == "a\\nb\\u202ec\\U0001f9ff"


def test_an_installed_font_is_used_if_the_bundled_one_lacks_a_character(only_fonts, monkeypatch):
    dejavu = fonts.bundled_path()
    monkeypatch.setattr(fonts, "bundled_path", lambda: dejavu.with_name("STIXSizOneSymReg.ttf"))
    only_fonts(dejavu.with_name("missing.ttf"), dejavu)
    assert fonts.printable("Ж") == "Ж"
    assert fonts.paths_for("Ж") == [dejavu.with_name("STIXSizOneSymReg.ttf"), dejavu]
    assert fonts._pieces("Ж", PX)[0][0].getname()[0] == "DejaVu Sans"


def test_wrapping_keeps_all_characters():
    text = "a sentence with a verylongword" + "x" * 200 + " and an end"
    lines = fonts.wrap(text, PX, 150)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert all(fonts.width(line, PX) <= 150 for line in lines)


def test_the_width_equals_that_of_the_drawn_text():
    mask = draw_text("Hamburg ÄÖÜ")
    right = np.flatnonzero(mask.any(0))[-1]
    assert abs(right - 10 - fonts.width("Hamburg ÄÖÜ", PX)) < 4
    rows = np.flatnonzero(draw_text("ÅÄgjpqy").any(1))
    assert rows[0] >= 10
    assert rows[-1] < 10 + fonts.line_px(PX)


def test_characters_of_the_bundled_font_equal_those_read_by_matplotlib():
    ft2font = pytest.importorskip("matplotlib.ft2font")
    path = fonts.bundled_path()
    assert fonts._characters(path) == frozenset(ft2font.FT2Font(str(path)).get_charmap())
