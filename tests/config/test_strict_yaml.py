"""The strict YAML reader: accepted and rejected text, locations of errors, bounds on time and memory."""

import time
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cvlab.config import strict_yaml
from cvlab.errors import ConfigError, DataError

MALFORMED = {
    "a: [1, 2": "1:9",
    "a: {b: 1": "1:9",
    "a: 'x": "1:6",
    "a: b: c": "1:5",
    "\ta: 1": "1:1",
    "a: 1\n b: 2": "2:3",
    "a: @x": "1:4",
    "a: %x": "1:4",
    "a: `x`": "1:4",
    "- a\nb: 1": "2:1",
    "a: 1\na: 2": "2:1: duplicate key 'a'",
    "a: {b: 1, b: 2}": "1:11: duplicate key 'b'",
    "a: &x 1": "1:4: anchors",
    "a: *x": "1:4: anchors",
    "a: !!python/object/apply:os.system [ls]": "1:4: the tag",
    "a: !x 1": "1:4: the tag",
    "a: 1\n---\nb: 2": "2:1: a second document",
    "? [1]\n: 2": "1:3: a key must be a word",
    "a: \0": "not valid YAML",
    "a: 12345678901234567890123": "1:4: the number",
    "[" * 40: "nested deeper",
    "[" * 100_000: "brackets",
    "- a\n" * 5_000: "more than",
}
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(("text", "location"), MALFORMED.items(), ids=range(len(MALFORMED)))
def test_malformed_text_is_rejected_with_its_location(text, location):
    with pytest.raises(ConfigError) as error:
        strict_yaml.parse(text, "f.yaml")
    assert error.value.message.startswith("f.yaml")
    assert location in str(error.value)
    assert "\n" not in str(error.value)


def test_numbers_text_and_lists():
    text = "a: 1e-3\nb: [1, -2, +3, 1_000]\nc: yes\nd: on\ne: null\nf: '1'\ng: 1.5\nh: true\ni: .5\nj: 1.e5\nk: 010\nl:"
    value = strict_yaml.parse(text, "f").value
    assert value == {
        "a": 0.001,
        "b": (1, -2, 3, 1000),
        "c": "yes",
        "d": "on",
        "e": None,
        "f": "1",
        "g": 1.5,
        "h": True,
        "i": 0.5,
        "j": 1e5,
        "k": 10,
        "l": None,
    }


def test_locations_of_keys_and_items():
    document = strict_yaml.parse("a: 1\nb:\n  c: [1,\n    2]\n", "f")
    assert document.location(("b", "c")) == "f:3:3"
    assert document.location(("b", "c", 1)) == "f:4:5"
    assert document.location(("b", "missing")) == "f:2:1"


@pytest.mark.parametrize(
    "text", [BOMB, "[" * 100_000, "{" * 60_000, "- " * 30_000, "a: " + "[" * 300, "- a\n" * 16_000]
)
def test_bombs_are_rejected_in_little_time_and_memory(text):
    tracemalloc.start()
    best = 1.0
    for _ in range(3):
        start_time = time.perf_counter()
        with pytest.raises(ConfigError):
            strict_yaml.parse(text, "f")
        best = min(best, time.perf_counter() - start_time)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6
    assert best < 1.0, "seconds per bomb, tracing included"


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text(alphabet=st.sampled_from("ab:-[]{}&*!|>'\"%@`#,?\n\t 01.e~\0é"), max_size=60))
def test_any_text_is_parsed_or_raises_config_error(text):
    try:
        strict_yaml.parse(text, "f")
    except ConfigError as error:
        assert str(error).startswith("f")


def test_files(tmp_path):
    path = tmp_path / "f.yaml"
    with pytest.raises(DataError, match="No such file"):
        strict_yaml.read(path)
    path.write_bytes("a: 1".encode("utf-16"))
    with pytest.raises(ConfigError, match="not UTF-8"):
        strict_yaml.read(path)
    path.write_bytes(b"\xef\xbb\xbfa: 1")
    assert strict_yaml.read(path).value == {"a": 1}
    path.write_bytes(b"#" * 70_000)
    with pytest.raises(ConfigError, match="larger than 64 KiB"):
        strict_yaml.read(path)
