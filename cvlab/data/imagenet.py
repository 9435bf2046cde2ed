"""The 1000 classes of ImageNet (Russakovsky et al., 2015) by name, number or WordNet id, as timm ships them.

`resolve("ostrich")`, `resolve("school bus")`, `resolve("9")` and `resolve("n01518878")` give an index.
"""

import functools
from collections import Counter

from cvlab import _compat, registry
from cvlab.errors import ConfigError

NUM_CLASSES = 1000
SHOWN = 6  # candidates named in an error


@functools.cache
def synsets() -> tuple[str, ...]:
    """Return the WordNet ids in the order of the classes."""
    return tuple(_compat.timm_text("imagenet_synsets.txt").split())


@functools.cache
def synonyms() -> tuple[tuple[str, ...], ...]:
    """Return the names of each class, the usual one first."""
    lines = (line.partition("\t") for line in _compat.timm_text("imagenet_synset_to_lemma.txt").splitlines())
    lemmas = {wnid: names for wnid, _, names in lines}
    return tuple(tuple(name.strip() for name in lemmas[wnid].split(",")) for wnid in synsets())


@functools.cache
def labels() -> tuple[str, ...]:
    """Return one name for each class, all different: where two have the same, the WordNet id is added."""
    first = [names[0] for names in synonyms()]
    counts = Counter(map(_folded, first))
    return tuple(
        name if counts[_folded(name)] == 1 else f"{name} ({wnid})" for name, wnid in zip(first, synsets(), strict=True)
    )


def _folded(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").split())


@functools.cache
def _by_label() -> dict[str, int]:
    return {_folded(label): index for index, label in enumerate(labels())}


@functools.cache
def _by_name() -> dict[str, list[int]]:
    table: dict[str, list[int]] = {}
    for index, names in enumerate(synonyms()):
        for name in {*map(_folded, names), _folded(labels()[index])}:
            table.setdefault(name, []).append(index)
    return table


def describe(index: int) -> str:
    """Return a class as it is told in messages: `9 ostrich (n01518878)`."""
    return f"{index} {synonyms()[index][0]} ({synsets()[index]})"


def resolve(name: str) -> int:
    """Return the index of a class by its name, number or WordNet id.

    ConfigError names the nearest where there is none such, and all where several have the name.
    """
    wanted = _folded(name)
    if wanted.isdecimal():
        if int(wanted) < NUM_CLASSES:
            return int(wanted)
        raise ConfigError(f"class {name}: the numbers are 0 to {NUM_CLASSES - 1}", "give a number or a name")
    if wanted in synsets():
        return synsets().index(wanted)
    if wanted in _by_label():  # what the program itself prints is never ambiguous
        return _by_label()[wanted]
    found = _by_name().get(wanted, [])
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(f"class {name!r} is ambiguous", f"choose one: {_listed(found)}")
    parts = [index for index, names in enumerate(synonyms()) if _has_word(names, wanted)]
    if parts:
        raise ConfigError(f"no class {name!r}", f"with this word: {_listed(parts)}")
    close = registry.closest_match(wanted, _by_name())
    hint = f"did you mean {close!r}?" if close else "give one of ImageNet's names, a number 0 to 999 or a WordNet id"
    raise ConfigError(f"no class {name!r}", hint)


def _has_word(names: tuple[str, ...], wanted: str) -> bool:
    return bool(wanted) and any(wanted in _folded(name).replace("-", " ").split() for name in names)


def _listed(indices: list[int]) -> str:
    more = f" and {len(indices) - SHOWN} more" if len(indices) > SHOWN else ""
    return ", ".join(map(describe, indices[:SHOWN])) + more
