"""File names keep the letters of any script."""

import re
import unicodedata

import pytest

from cvlab.storage.file_names import MAX_BYTES, file_stem


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("日本", "日本"),
        ("Müller café", "Müller_café"),
        ("Страус (2)", "Страус_2"),
        ("हिन्दी", "हिन्दी"),
        ("a_ b", "a__b"),
        ("../../etc/passwd", "etc_passwd"),
        ("a\x00b\nc\u202ed", "a_b_c_d"),
        ("🙂", ""),
        (unicodedata.normalize("NFD", "café"), "café"),
    ],
)
def test_letters_of_any_script_are_kept(name, stem):
    assert file_stem(name) == stem


def test_ascii_names_are_sanitized_as_before():
    for name in ("IMG_0001", "a  b", "x(1)", "__init__", "v1.2-final", "a" * 80, "--", "a_-_b!!c"):
        assert file_stem(name) == re.sub(r"[^\w.-]+", "_", name, flags=re.ASCII).strip("._-")[:60]


def test_long_names_fit_into_a_file_name():
    for name in ("語" * 100, "𠀀" * 100, "é" * 100):
        stem = file_stem(name)
        assert 0 < len(stem.encode()) <= MAX_BYTES
        assert name.startswith(stem)
