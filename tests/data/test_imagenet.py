"""The classes of ImageNet by name, index and WordNet id."""

import pytest

from cvlab.data import imagenet
from cvlab.errors import ConfigError


@pytest.mark.parametrize("name", ["ostrich", "Ostrich", "Struthio camelus", "struthio_camelus", "9", "n01518878"])
def test_a_class_by_label_synonym_index_or_wordnet_id(name):
    assert imagenet.resolve(name) == 9


def test_every_class_by_index_wordnet_id_and_label():
    for index, (label, wnid) in enumerate(zip(imagenet.labels(), imagenet.synsets(), strict=True)):
        assert imagenet.resolve(label) == imagenet.resolve(wnid) == imagenet.resolve(str(index)) == index
    assert len(set(imagenet.labels())) == 1000


def test_the_classes_of_the_course():
    names = ("tarantula", "tick", "Yorkshire terrier", "oboe", "gorilla", "hourglass", "school bus")
    assert [imagenet.resolve(name) for name in names] == [76, 78, 187, 683, 366, 604, 779]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("ostrch", "did you mean 'ostrich'"),
        ("gorila", "did you mean 'gorilla'"),
        ("crane", r"ambiguous; choose one: 134 crane \(n02012849\), 517 crane \(n03126707\)"),
        ("terrier", r"with this word: .* and 18 more"),
        ("1000", "0 to 999"),
        ("qqqqqq", "an index 0 to 999 or a WordNet id"),
        ("", "no class ''"),
    ],
)
def test_unknown_and_ambiguous_names(name, text):
    with pytest.raises(ConfigError, match=text):
        imagenet.resolve(name)
