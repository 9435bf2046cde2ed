"""The 1000 classes of ImageNet (Russakovsky et al., 2015) by name, index or WordNet id, as timm ships them.

`resolve("ostrich")`, `resolve("9")` and `resolve("n01518878")` return the same index.
"""

import functools
from collections import Counter

from cvlab import _compat, registry
from cvlab.errors import ConfigError

NUM_CLASSES = 1000
MAX_CANDIDATES = 6  # listed in an error


@functools.cache
def synsets() -> tuple[str, ...]:
    """Return the WordNet ids in class order."""
    return tuple(_compat.timm_text("imagenet_synsets.txt").split())


@functools.cache
def synonyms() -> tuple[tuple[str, ...], ...]:
    """Return the names of each class, the most common one first."""
    lines = (line.partition("\t") for line in _compat.timm_text("imagenet_synset_to_lemma.txt").splitlines())
    lemmas = {wnid: names for wnid, _, names in lines}
    return tuple(tuple(name.strip() for name in lemmas[wnid].split(",")) for wnid in synsets())


@functools.cache
def labels() -> tuple[str, ...]:
    """Return one unique name for each class; classes that share a name get their WordNet id appended."""
    first = [names[0] for names in synonyms()]
    counts = Counter(map(_normalize, first))
    return tuple(
        name if counts[_normalize(name)] == 1 else f"{name} ({wnid})"
        for name, wnid in zip(first, synsets(), strict=True)
    )


def _normalize(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").split())


@functools.cache
def _by_label() -> dict[str, int]:
    return {_normalize(label): index for index, label in enumerate(labels())}


@functools.cache
def _by_name() -> dict[str, list[int]]:
    table: dict[str, list[int]] = {}
    for index, names in enumerate(synonyms()):
        for name in {*map(_normalize, names), _normalize(labels()[index])}:
            table.setdefault(name, []).append(index)
    return table


def describe(index: int) -> str:
    """Return a class for messages, for example `9 ostrich (n01518878)`."""
    return f"{index} {synonyms()[index][0]} ({synsets()[index]})"


def resolve(name: str) -> int:
    """Return the index of a class by its name, index or WordNet id.

    Raises:
        ConfigError: No class, or more than one, has this name; the message lists the candidates.
    """
    query = _normalize(name)
    if query.isdecimal():
        if int(query) < NUM_CLASSES:
            return int(query)
        raise ConfigError(f"class {name}: indices are 0 to {NUM_CLASSES - 1}", "give an index or a name")
    if query in synsets():
        return synsets().index(query)
    if query in _by_label():  # the labels that cvlab prints are never ambiguous
        return _by_label()[query]
    matches = _by_name().get(query, [])
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise ConfigError(f"class {name!r} is ambiguous", f"choose one: {_list(matches)}")
    partial = [index for index, names in enumerate(synonyms()) if _has_word(names, query)]
    if partial:
        raise ConfigError(f"no class {name!r}", f"classes with this word: {_list(partial)}")
    close = registry.closest_match(query, _by_name())
    hint = f"did you mean {close!r}?" if close else "give a class name of ImageNet, an index 0 to 999 or a WordNet id"
    raise ConfigError(f"no class {name!r}", hint)


def _has_word(names: tuple[str, ...], query: str) -> bool:
    return bool(query) and any(query in _normalize(name).replace("-", " ").split() for name in names)


def _list(indices: list[int]) -> str:
    more = f" and {len(indices) - MAX_CANDIDATES} more" if len(indices) > MAX_CANDIDATES else ""
    return ", ".join(map(describe, indices[:MAX_CANDIDATES])) + more
