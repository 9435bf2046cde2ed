"""CIFAR-10: read correctly, rejected if damaged, installed from every kind of source, unable to run code."""

import dataclasses
import hashlib
import os
import pickle
import shutil

import numpy as np
import pytest
import torch

from cvlab.api import catalog
from cvlab.errors import DataError, RunDirError
from cvlab.experiments.classification.data import cifar
from cvlab.experiments.classification.data.cifar import CIFAR10_FILES as FILES
from cvlab.storage import download
from tests import fake_cifar


@pytest.fixture
def root(tmp_path, monkeypatch):
    sums = fake_cifar.write(tmp_path / "good" / FILES.folder)
    monkeypatch.setattr(FILES, "checksums", sums)
    return tmp_path / "good"


def test_pixels_and_labels_are_read_correctly(root):
    dataset = cifar.load_cifar10(root)
    assert dataset.train_images.shape == (200, 32, 32, 3)
    assert dataset.test_images.shape == (40, 32, 32, 3)
    third = fake_cifar.batch(40, 2)
    expected = np.stack([third[b"data"][7, plane * 1024 : (plane + 1) * 1024].reshape(32, 32) for plane in range(3)], 2)
    assert torch.equal(dataset.train_images[80 + 7], torch.from_numpy(expected))
    assert dataset.train_labels[80:120].tolist() == third[b"labels"]


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
def test_a_missing_or_altered_file_is_named(root, name):
    path = root / FILES.folder / name
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + b"\xff")
    with pytest.raises(DataError, match=rf"{name}: differs from the published file.*cvlab data fetch cifar10"):
        FILES.check(root)
    path.unlink()
    assert not cifar.CIFAR10.ready(root)
    with pytest.raises(DataError, match=rf"{name}: No such file"):
        FILES.check(root)


def test_a_fetch_replaces_damaged_files(root, monkeypatch, tmp_path):
    path = root / FILES.folder / "data_batch_3"
    intact = shutil.copytree(root / FILES.folder, tmp_path / "copy" / FILES.folder)
    path.write_bytes(b"damaged")
    monkeypatch.setenv("CVLAB_DATA", str(root))
    monkeypatch.setattr(download, "is_online", lambda: True)
    wait_flags = []

    def fetch(root, origin, wait):
        wait_flags.append(wait)
        FILES._install_folder(intact, root)

    monkeypatch.setattr(cifar, "CIFAR10", dataclasses.replace(cifar.CIFAR10, fetch=fetch))
    assert catalog.fetch("cifar10", None)["ok"]
    assert wait_flags == [True]
    assert catalog.fetch("cifar10", None)["ok"], "intact files are not fetched again"
    assert wait_flags == [True], "intact files are not fetched again"


def test_a_linked_folder_is_replaced_and_its_target_is_kept(root, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / FILES.folder).symlink_to(root / FILES.folder)
    FILES.fetch(elsewhere, root, True)
    assert not (elsewhere / FILES.folder).is_symlink()
    assert cifar.CIFAR10.ready(elsewhere)
    assert cifar.CIFAR10.ready(root)


def test_a_data_folder_that_is_a_file_is_rejected(root, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirError, match="choose another folder with CVLAB_DATA"):
        FILES.fetch(tmp_path / "file", root, True)


class Canary:
    def __reduce__(self):
        return os.system, ("touch canary",)


@pytest.mark.parametrize(
    "content",
    [
        {b"data": Canary(), b"labels": []},
        {b"labels": [1]},
        [1, 2],
        {b"data": np.zeros((2, 3), np.uint8), b"labels": [0, 1]},
        {b"data": np.zeros((2, 3072), np.float64), b"labels": [0, 1]},
        {b"data": np.array([object()]), b"labels": [0]},
    ],
)
def test_malicious_and_invalid_batches_with_a_valid_checksum_are_rejected(root, content, monkeypatch, tmp_path):
    raw = pickle.dumps(content, protocol=3)
    (root / FILES.folder / "data_batch_1").write_bytes(raw)
    checksum = f"md5:{hashlib.md5(raw, usedforsecurity=False).hexdigest()}"
    monkeypatch.setitem(FILES.checksums, "data_batch_1", checksum)
    with pytest.raises(DataError, match="data_batch_1: not a CIFAR batch"):
        cifar.load_cifar10(root)
    assert not (tmp_path / "canary").exists()


def make_origins(tmp_path, root, monkeypatch):
    archive = fake_cifar.tar_of(root / FILES.folder)
    checksum = hashlib.sha256(archive).hexdigest()
    monkeypatch.setattr(FILES, "downloads", [dataclasses.replace(FILES.downloads[0], checksum=checksum)])
    (tmp_path / "file.tgz").write_bytes(archive)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / FILES.downloads[0].name).write_bytes(archive)
    return (tmp_path / "file.tgz", tmp_path / "folder", root, root / FILES.folder)


def test_every_kind_of_origin_can_be_installed(root, tmp_path, monkeypatch):
    for number, origin in enumerate(make_origins(tmp_path, root, monkeypatch)):
        target = tmp_path / f"target{number}"
        FILES.fetch(target, origin, True)
        assert FILES.check(target) == "7 files equal to the published ones"
        assert [path.name for path in target.iterdir()] == [FILES.folder]
    FILES.fetch(target, root, True)  # over existing files


def test_invalid_origins_install_nothing(root, tmp_path, monkeypatch):
    make_origins(tmp_path, root, monkeypatch)
    (tmp_path / "other.tgz").write_bytes(b"x")
    shutil.copytree(root / FILES.folder, tmp_path / "altered")
    (tmp_path / "altered" / "test_batch").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    for origin, text in (("other.tgz", "sha256"), ("altered", "md5"), ("empty", "neither"), ("gone", "neither")):
        with pytest.raises(DataError, match=text):
            FILES.fetch(tmp_path / "target", tmp_path / origin, True)
        assert not list((tmp_path / "target").rglob("*"))


@pytest.mark.realdata
def test_the_real_data_set(real_cifar10):
    images = cifar.load_cifar10(real_cifar10)
    assert images.train_images.shape == (50_000, 32, 32, 3)
    assert torch.bincount(images.train_labels).tolist() == [5000] * 10
    assert torch.bincount(images.test_labels).tolist() == [1000] * 10
    mean = images.train_images.double().mean((0, 1, 2)) / 255
    assert mean.tolist() == pytest.approx([0.4914, 0.4822, 0.4465], abs=1e-4)  # the published means
