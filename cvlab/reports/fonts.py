r"""Text in images, in any script: a character is drawn with the first font that has it.

The first font is DejaVu Sans, which comes with matplotlib and has the Latin, Greek, Cyrillic and several other scripts.
Characters that it lacks are drawn with an installed font; those that no font has are escaped, as `\u65e5`.
"""

import functools
import importlib.util
import struct
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from PIL import ImageDraw, ImageFont

BUNDLED = "mpl-data/fonts/ttf/DejaVuSans.ttf"  # in matplotlib's folder
MAX_CHARMAPS = 16  # kept in memory; a font of Chinese characters has 65,000 entries
LINE_HEIGHT = 1.3  # of the text size
ASCENT = 0.95  # of the text size, from the top of a line to its baseline
JOINERS = "\u200c\u200d"  # of letters; without a width
Color = str | tuple[int, int, int]


@functools.cache
def bundled_path() -> Path:
    """Return the path of DejaVu Sans in matplotlib's folder."""
    spec = importlib.util.find_spec("matplotlib")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(next(iter(spec.submodule_search_locations))) / BUNDLED


@functools.lru_cache(MAX_CHARMAPS)
def _characters(path: Path) -> frozenset[int]:
    """Return the code points that a font has; none of a file that is not a font which can be read."""
    if path == bundled_path() and (characters := _read_cmap(path.read_bytes())):
        return characters
    from matplotlib.ft2font import FT2Font  # importing it takes 0.3 s

    try:
        return frozenset(FT2Font(str(path)).get_charmap())
    except (OSError, RuntimeError, ValueError):
        return frozenset()


def _read_cmap(font: bytes) -> frozenset[int]:
    """Return the code points that a TrueType font maps to glyphs, if its `cmap` has format 12."""
    (num_tables,) = struct.unpack_from(">H", font, 4)
    tables = {
        font[at : at + 4]: struct.unpack_from(">I", font, at + 8)[0] for at in range(12, 12 + 16 * num_tables, 16)
    }
    cmap = tables[b"cmap"]
    (num_subtables,) = struct.unpack_from(">H", font, cmap + 2)
    offsets = [cmap + struct.unpack_from(">I", font, cmap + 8 + 8 * k)[0] for k in range(num_subtables)]
    subtable = next((at for at in offsets if struct.unpack_from(">H", font, at) == (12,)), None)
    if subtable is None:
        return frozenset()
    (num_groups,) = struct.unpack_from(">I", font, subtable + 12)
    groups = struct.iter_unpack(">III", font[subtable + 16 : subtable + 16 + 12 * num_groups])
    return frozenset(code for first, last, glyph in groups for code in range(first + (glyph == 0), last + 1))


@functools.cache
def _installed() -> tuple[Path, ...]:
    """Return the installed fonts, regular styles before bold and italic ones."""
    from matplotlib import font_manager

    paths = [Path(name) for name in font_manager.findSystemFonts()]
    return tuple(sorted(paths, key=lambda path: ("regular" not in path.stem.lower(), path.name)))


@functools.cache
def _path_with(character: str) -> Path | None:
    """Return the bundled font if it has a character, else the first installed font that has it, else None."""
    candidates = (bundled_path(), *(() if ord(character) in _characters(bundled_path()) else _installed()))
    return next((path for path in candidates if ord(character) in _characters(path)), None)


@functools.cache
def load(path: Path, size_px: int) -> ImageFont.FreeTypeFont:
    """Open a font at a size."""
    return ImageFont.truetype(str(path), size_px)


def printable(text: str) -> str:
    """Return text in composed form; control characters, line breaks, and characters that no font has are escaped."""
    return "".join(
        character if _can_draw(character) else character.encode("unicode_escape").decode()
        for character in unicodedata.normalize("NFC", text).replace("\t", " ")
    )


def _can_draw(character: str) -> bool:
    if unicodedata.category(character)[0] == "C" and character not in JOINERS:
        return False
    return _path_with(character) is not None


def paths_for(text: str) -> list[Path]:
    """Return the fonts that printable text is drawn with, the bundled one first."""
    paths = [bundled_path(), *filter(None, map(_path_with, text))]
    return list(dict.fromkeys(paths))


def _pieces(text: str, size_px: int) -> list[tuple[ImageFont.FreeTypeFont, str]]:
    """Split printable text into the longest pieces of one font."""
    pieces: list[tuple[ImageFont.FreeTypeFont, str]] = []
    for character in text:
        font = load(_path_with(character) or bundled_path(), size_px)
        if pieces and (pieces[-1][0] is font or unicodedata.combining(character)):
            pieces[-1] = (pieces[-1][0], pieces[-1][1] + character)
        else:
            pieces.append((font, character))
    return pieces


def width(text: str, size_px: int) -> float:
    """Return the width of a line of text in pixels."""
    return sum(font.getlength(piece) for font, piece in _pieces(printable(text), size_px))


def line_px(size_px: int) -> int:
    """Return the height of a line of text in pixels."""
    return round(LINE_HEIGHT * size_px)


def draw(pen: ImageDraw.ImageDraw, xy: tuple[float, float], text: str, size_px: int, fill: Color = "black") -> None:
    """Draw a line of text with its upper left corner at `xy`."""
    x, top = xy
    for font, piece in _pieces(printable(text), size_px):
        pen.text((x, top + ASCENT * size_px), piece, fill=fill, font=font, anchor="ls")
        x += font.getlength(piece)


def draw_lines(
    pen: ImageDraw.ImageDraw, xy: tuple[float, float], lines: Iterable[str], size_px: int, fill: Color = "black"
) -> None:
    """Draw lines of text, the upper left corner of the first at `xy`."""
    for k, line in enumerate(lines):
        draw(pen, (xy[0], xy[1] + k * line_px(size_px)), line, size_px, fill)


def wrap(text: str, size_px: int, width_px: float) -> list[str]:
    """Break text into lines of at most a width, between words, or inside of a word that is longer than a line."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        current = ""
        for word in printable(paragraph).split():
            longer = f"{current} {word}".strip()
            if width(longer, size_px) <= width_px:
                current = longer
                continue
            if current:
                lines.append(current)
            *full, current = _break_word(word, size_px, width_px)
            lines += full
        lines.append(current)
    return lines


def _break_word(word: str, size_px: int, width_px: float) -> list[str]:
    parts = [""]
    for character in word:
        if parts[-1] and width(parts[-1] + character, size_px) > width_px:
            parts.append("")
        parts[-1] += character
    return parts
