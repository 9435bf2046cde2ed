"""Descriptions of data sets: every source has one that agrees with the files of its loader."""

import dataclasses

import pytest

from cvlab import registry
from cvlab.data import datasets, descriptions
from cvlab.experiments.captioning import scene_captions
from cvlab.experiments.classification.data import cifar, imagenette, mnist, scenes10, svhn
from cvlab.experiments.detection.data import everyday, scenes

PUBLISHED = (cifar.CIFAR10_FILES, cifar.CIFAR100_FILES, mnist.MNIST_FILES, mnist.FASHION_FILES, svhn.FILES)
FILES = {files.name: [f"{files.folder}/{name}" for name in files.checksums] for files in PUBLISHED} | {
    "scenes10": [f"{scenes10.FOLDER}/sha256.json"],
    "scenes": [f"{scenes.SET.folder_name}/sha256.json"],
    "scene_captions": [f"{scene_captions.GENERATED.folder_name}/sha256.json"],
    "everyday": [f"{everyday.FOLDER}/{everyday.LABELS_FILE}"],
    "flickr8k": ["flickr8k/captions.txt"],
    "voc07": ["VOC/VOC2007/ImageSets/Main/train.txt"],
    "bccd": ["VOC/bccd/ImageSets/Main/train.txt"],
}


def test_every_source_agrees_with_its_description():
    assert {kind: set(table) for kind, table in descriptions.BY_KIND.items()} == {
        kind: set(table) for kind, table in datasets.BY_KIND.items()
    }
    for kind, table in datasets.BY_KIND.items():
        for name, target in table.items():
            source, description = registry.import_name(target), descriptions.BY_KIND[kind][name]
            for field in dataclasses.fields(description):
                assert getattr(source, field.name) == getattr(description, field.name), (name, field.name)
            assert source.is_builtin == (source.fetch is None), name


@pytest.mark.parametrize("name", FILES)
def test_a_data_set_is_ready_if_all_files_of_its_loader_exist(tmp_path, name):
    description = descriptions.get(name)
    for file in FILES[name]:
        assert not description.ready(tmp_path)
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    assert description.ready(tmp_path)
    assert description.state(tmp_path) == "ready"


def test_sizes_equal_those_of_the_loaders():
    sizes = {name: descriptions.get(name).size for name in ("scenes10", "imagenette")}
    assert {name: (size.train_images, size.test_images) for name, size in sizes.items()} == {
        "scenes10": (scenes10.NUM_TRAIN, scenes10.NUM_TEST),
        "imagenette": (imagenette.NUM_TRAIN, 0),
    }
