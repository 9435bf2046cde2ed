"""File names made from names of any script."""

import itertools
import unicodedata

MAX_CHARACTERS, MAX_BYTES = 60, 150  # file systems allow 255 bytes; suffixes follow


def file_stem(name: str) -> str:
    """Return a name in a form that file systems, shells and addresses take: letters, digits, `_`, `.`, `-`.

    Letters of any script are kept; each run of other characters becomes one `_`.

    Args:
        name: Any text; `Müller café` becomes `Müller_café`.

    Returns:
        At most MAX_BYTES bytes of UTF-8; empty if the name has no letter or digit at all.
    """
    groups = itertools.groupby(unicodedata.normalize("NFC", name), _is_allowed)
    stem = "".join("".join(characters) if is_allowed else "_" for is_allowed, characters in groups)
    stem = stem.strip("._-")[:MAX_CHARACTERS]
    return stem.encode()[:MAX_BYTES].decode(errors="ignore")


def _is_allowed(character: str) -> bool:
    return unicodedata.category(character)[0] in "LMN" or character in "_.-"  # letters, marks, numbers
