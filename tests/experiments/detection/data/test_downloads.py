"""Published data sets: installed from every kind of origin, completely or not at all."""

import dataclasses
import hashlib
import shutil
import tarfile
import xml.etree.ElementTree as ElementTree
import zipfile
from pathlib import Path

import pytest

from cvlab.api import catalog
from cvlab.data import datasets, descriptions
from cvlab.errors import DataError
from cvlab.experiments.detection.data import dataset, downloads, writers
from cvlab.storage import archives, download
from tests.conftest import REAL_DATA
from tests.experiments.detection.data.box_files import BOXES, SIZE, VOC_XML, find_sample, voc_set, write


def fruit(folder):
    voc_set(folder)
    for k, name in enumerate("abc"):
        xml = writers.write_voc_xml(BOXES[:1], [("apple", "banana", "orange")[k]], SIZE, f"{name}.jpg")
        write(folder / f"Annotations/{name}.xml", xml)
    return folder


def zip_folder(folder, zip_path):
    with zipfile.ZipFile(zip_path, "w") as file:
        for member in sorted(folder.rglob("*")):
            file.write(member, member.relative_to(folder))
    return zip_path


def test_a_small_data_set_is_installed_from_a_folder_or_a_zip_file(tmp_path, monkeypatch, capsys):
    source = fruit(tmp_path / "source/VOC/fruit")
    path = source / "Annotations/a.xml"
    path.write_text(
        path.read_text().replace("</annotation>", VOC_XML.split("\n", 1)[1].replace("9", "5").replace("cat", "apple"))
    )
    origins = (tmp_path / "source", source, zip_folder(tmp_path / "source", tmp_path / "fruit.zip"))
    for number, origin in enumerate(origins):
        root = tmp_path / f"root{number}"
        monkeypatch.setenv("CVLAB_DATA", str(root))
        capsys.readouterr()
        assert catalog.fetch("fruit", origin)["detail"].startswith("3 photos, 3 boxes, 3 classes")
        assert capsys.readouterr().err.count("warning") == 1, "logged once, for the file that is kept"
        assert catalog.check("fruit") == {"fruit": "3 photos, 3 boxes, 3 classes, every annotation can be read"}
        assert [path.name for path in root.iterdir()] == ["VOC"]
        assert datasets.get("fruit").load(root).classes == ("apple", "banana", "orange")
    catalog.fetch("fruit", source)  # replaces the installed one


def test_invalid_origins_install_nothing(tmp_path):
    other = voc_set(tmp_path / "other")
    broken = fruit(tmp_path / "broken")
    write(broken / "Annotations/c.xml", "<annotation>")
    fruit(tmp_path / "several/one")
    fruit(tmp_path / "several/two")
    (tmp_path / "empty").mkdir()
    write(tmp_path / "no.zip", "x")
    cases = {"other": "its classes are cat, dog", "broken": "c.xml:1: not valid XML", "several": "several sets"}
    cases |= {"empty": "no set in VOC's layout", "gone": "no set", "no.zip": "cannot be unpacked"}
    for name, message in cases.items():
        with pytest.raises(DataError, match=message):
            downloads.fetch_small("fruit", tmp_path / "root", tmp_path / name, True)
        assert not list((tmp_path / "root").rglob("*")), name
    assert other.is_dir()


def test_zip_files_cannot_write_outside_or_link(tmp_path):
    link = zipfile.ZipInfo("link")
    link.external_attr = 0o120777 << 16
    for name in ("../out", "/out", "a/../../out", link):
        with zipfile.ZipFile(tmp_path / "bad.zip", "w") as file:
            file.writestr(name, "x")
        with pytest.raises(DataError, match=r"would be written outside|not a plain file"):
            archives.extract_zip(tmp_path / "bad.zip", tmp_path / "to/here", max_bytes=10, max_members=1)
    with zipfile.ZipFile(tmp_path / "big.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a", "x" * 10_000)
        file.writestr("b", "x")
    for limits, message in (((9_999, 2), "more than 9999 bytes"), ((20_000, 1), "more than 1 members")):
        with pytest.raises(DataError, match=message):
            archives.extract_zip(tmp_path / "big.zip", tmp_path / "to", max_bytes=limits[0], max_members=limits[1])
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "to" / "link").exists()


def mock_download(monkeypatch, content):
    """Replace downloads by writing `content(target)`; return the list of requested URLs."""
    requested_urls = []

    def fetch(urls, target, sha256, size, wait):
        requested_urls.append(urls[0])
        write(target, "")
        target.write_bytes(content(target))
        download.verify(target, sha256)
        return target

    monkeypatch.setattr(download, "fetch", fetch)
    return requested_urls


def test_bccd_is_installed_from_github_only_if_complete(tmp_path, monkeypatch):
    source = tmp_path / "source/BCCD_Dataset-master/BCCD"
    voc_set(source)
    for name in "abc":
        xml = writers.write_voc_xml(BOXES, ["RBC", "WBC", "Platelets"], SIZE, "x.jpg")
        write(source / f"Annotations/{name}.xml", xml)
    archive = zip_folder(tmp_path / "source", tmp_path / "source.zip").read_bytes()
    requested_urls = mock_download(monkeypatch, lambda target: archive)
    with pytest.raises(DataError, match="3 photos where bccd has 364"):
        downloads.BCCD.fetch(tmp_path / "root", None, True)
    assert not downloads.BCCD.ready(tmp_path / "root")
    assert not list((tmp_path / "root/downloads").iterdir())
    monkeypatch.setattr(downloads, "BCCD_PHOTOS", 3)
    downloads.BCCD.fetch(tmp_path / "root", None, True)
    assert downloads.BCCD.ready(tmp_path / "root")
    assert requested_urls[0].startswith("https://github.com/Shenggan/BCCD_Dataset/")
    with pytest.raises(DataError, match=r"published nowhere that stays; `cvlab data fetch fruit --from"):
        downloads.FRUIT.fetch(tmp_path / "root", None, True)


@pytest.fixture
def tars(tmp_path, monkeypatch):
    """Write small archives of VOC 2007, mock their checksums, and return their folder."""
    voc_set(tmp_path / "trainval/VOCdevkit/VOC2007")
    voc_set(tmp_path / "test/VOCdevkit/VOC2007", names=("x", "y"))
    (tmp_path / "trainval/VOCdevkit/VOC2007/ImageSets/Main/test.txt").unlink()
    write(tmp_path / "trainval/VOCdevkit/VOC2007/ImageSets/Main/val.txt", "c\n")
    (tmp_path / "test/VOCdevkit/VOC2007/ImageSets/Main/train.txt").unlink()
    write(tmp_path / "trainval/VOCdevkit/VOC2007/SegmentationClass/a.png", "not needed")
    small_archives = []
    for archive, name in zip(downloads.ARCHIVES, ("trainval", "test"), strict=True):
        (tmp_path / "tars").mkdir(exist_ok=True)
        with tarfile.open(tmp_path / "tars" / archive.name, "w") as tar:
            tar.add(tmp_path / name / "VOCdevkit", "VOCdevkit")
        raw = (tmp_path / "tars" / archive.name).read_bytes()
        raw += bytes(512 * (name == "test"))  # a different size, which identifies the archive
        (tmp_path / "tars" / archive.name).write_bytes(raw)
        small_archives.append(dataclasses.replace(archive, sha256=hashlib.sha256(raw).hexdigest(), size=len(raw)))
    monkeypatch.setattr(downloads, "ARCHIVES", tuple(small_archives))
    return tmp_path / "tars"


def test_voc07_is_installed_from_every_kind_of_origin(tmp_path, monkeypatch, tars):
    requested_urls = mock_download(monkeypatch, lambda target: (tars / target.name).read_bytes())
    downloads.VOC07.fetch(tmp_path / "net", None, True)
    assert [url.rpartition("/")[2] for url in requested_urls] == [archive.name for archive in downloads.ARCHIVES]
    downloads.VOC07.fetch(tmp_path / "folder", tars, True)
    downloads.VOC07.fetch(tmp_path / "unpacked", tmp_path / "net", True)
    for archive in downloads.ARCHIVES:
        downloads.VOC07.fetch(tmp_path / "single", tars / archive.name, True)
    for name in ("net", "folder", "unpacked", "single"):
        loaded = downloads.VOC07.load(tmp_path / name)
        assert loaded.classes == downloads.VOC_CLASSES
        assert len(loaded.classes) == 20
        stems = {split: [item.path.stem for item in items] for split, items in loaded.splits.items()}
        assert stems == {"train": ["a", "b"], "val": ["c"], "test": ["y"]}, name
        assert loaded.classes[find_sample(loaded, "a").labels[1]] == "dog"
        assert not (tmp_path / name / "VOCdevkit/VOC2007/SegmentationClass").exists()
    assert [path.name for path in (tmp_path / "net/downloads").iterdir()] == []
    shutil.move(tmp_path / "net/VOCdevkit", tmp_path / "net/VOC")
    assert downloads.VOC07.ready(tmp_path / "net"), "VOC/VOC2007 is accepted too"


def test_a_modified_archive_of_voc07_is_rejected(tmp_path, tars):
    path = tars / downloads.ARCHIVES[0].name
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match="differs from the published file"):
        downloads.VOC07.fetch(tmp_path / "root", path, True)
    assert not (tmp_path / "root").exists()


def test_an_unknown_class_in_voc07_is_rejected(tmp_path):
    folder = voc_set(tmp_path / "VOCdevkit/VOC2007")
    write(folder / "Annotations/a.xml", VOC_XML.replace("cat", "cta"))
    with pytest.raises(DataError, match=r"a.xml:2: unknown class 'cta'; did you mean 'cat'"):
        dataset.load("voc07", tmp_path)


def test_sources_equal_the_published_ones():
    assert [archive.urls[0] for archive in downloads.ARCHIVES] == [
        "http://host.robots.ox.ac.uk/pascal/VOC/voc2007/VOCtrainval_06-Nov-2007.tar",
        "http://host.robots.ox.ac.uk/pascal/VOC/voc2007/VOCtest_06-Nov-2007.tar",
    ]
    for archive in downloads.ARCHIVES:
        assert len(archive.sha256) == 64
        assert all(url.startswith("https://") for url in archive.urls[1:])


@pytest.mark.realdata
@pytest.mark.parametrize(("name", "sizes", "boxes"), [("fruit", [192, 48, 60], 582), ("bccd", [205, 87, 72], 4886)])
def test_installed_data_sets(name, sizes, boxes, capsys):
    root = Path(REAL_DATA or "none")
    if not descriptions.get(name).ready(root):
        pytest.skip(f"CVLAB_DATA has no VOC/{name}")
    loaded = dataset.load(name, root)
    items = [item for split in loaded.splits.values() for item in split]
    assert loaded.classes == downloads.CLASSES[name]
    assert [len(split) for split in loaded.splits.values()] == sizes
    assert sum(len(item.labels) for item in items) == boxes
    for item in items[::17]:
        expected = read_xml(root / f"VOC/{name}/Annotations/{item.path.stem}.xml")
        assert [
            (loaded.classes[k], *box) for k, box in zip(item.labels, item.boxes_xyxy.tolist(), strict=True)
        ] == expected
    err = capsys.readouterr().err
    assert ("boxes without area left out: 2 (" in err) == (name == "bccd")
    assert err.count("\n") == (name == "bccd")


def read_xml(path):
    """Read an annotation with the standard library alone."""
    objects = []
    for element in ElementTree.parse(path).getroot().iter("object"):
        xmin, ymin, xmax, ymax = (float(element.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax"))
        if xmax > xmin and ymax > ymin:
            objects.append((element.findtext("name"), xmin - 1, ymin - 1, xmax, ymax))
    return objects
