"""Published data sets: installed from every form, whole or not at all."""

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
from tests.experiments.detection.data.box_files import BOXES, SIZE, VOC_XML, of, voc_set, write


def fruit(folder):
    voc_set(folder)
    for k, name in enumerate("abc"):
        xml = writers.write_voc_xml(BOXES[:1], [("apple", "banana", "orange")[k]], SIZE, f"{name}.jpg")
        write(folder / f"Annotations/{name}.xml", xml)
    return folder


def zipped(folder, path):
    with zipfile.ZipFile(path, "w") as file:
        for one in sorted(folder.rglob("*")):
            file.write(one, one.relative_to(folder))
    return path


def test_a_small_data_set_is_installed_from_a_folder_or_a_zip_file(tmp_path, monkeypatch, capsys):
    source = fruit(tmp_path / "source/VOC/fruit")
    path = source / "Annotations/a.xml"
    path.write_text(
        path.read_text().replace("</annotation>", VOC_XML.split("\n", 1)[1].replace("9", "5").replace("cat", "apple"))
    )
    origins = (tmp_path / "source", source, zipped(tmp_path / "source", tmp_path / "fruit.zip"))
    for number, origin in enumerate(origins):
        root = tmp_path / f"root{number}"
        monkeypatch.setenv("CVLAB_DATA", str(root))
        capsys.readouterr()
        assert catalog.fetch("fruit", origin)["detail"].startswith("3 photos, 3 boxes, 3 classes")
        assert capsys.readouterr().err.count("warning") == 1, "told once, of the file that stays"
        assert catalog.check("fruit") == {"fruit": "3 photos, 3 boxes, 3 classes, every annotation can be read"}
        assert [path.name for path in root.iterdir()] == ["VOC"]
        assert datasets.get("fruit").load(root).classes == ("apple", "banana", "orange")
    catalog.fetch("fruit", source)  # over what is there


def test_wrong_origins_install_nothing(tmp_path):
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


def served(monkeypatch, content):
    """Let a download write what `content` gives for its first address."""
    asked = []

    def fetch(urls, target, sha256, size, wait):
        asked.append(urls[0])
        write(target, "")
        target.write_bytes(content(target))
        download.verify(target, sha256)
        return target

    monkeypatch.setattr(download, "fetch", fetch)
    return asked


def test_bccd_is_installed_from_github_only_if_complete(tmp_path, monkeypatch):
    source = tmp_path / "made/BCCD_Dataset-master/BCCD"
    voc_set(source)
    for name in "abc":
        xml = writers.write_voc_xml(BOXES, ["RBC", "WBC", "Platelets"], SIZE, "x.jpg")
        write(source / f"Annotations/{name}.xml", xml)
    archive = zipped(tmp_path / "made", tmp_path / "made.zip").read_bytes()
    asked = served(monkeypatch, lambda target: archive)
    with pytest.raises(DataError, match="3 photos where bccd has 364"):
        downloads.BCCD.fetch(tmp_path / "root", None, True)
    assert not downloads.BCCD.ready(tmp_path / "root")
    assert not list((tmp_path / "root/downloads").iterdir())
    monkeypatch.setattr(downloads, "BCCD_PHOTOS", 3)
    downloads.BCCD.fetch(tmp_path / "root", None, True)
    assert downloads.BCCD.ready(tmp_path / "root")
    assert asked[0].startswith("https://github.com/Shenggan/BCCD_Dataset/")
    with pytest.raises(DataError, match=r"published nowhere that stays; `cvlab data fetch fruit --from"):
        downloads.FRUIT.fetch(tmp_path / "root", None, True)


@pytest.fixture
def tars(tmp_path, monkeypatch):
    """Small archives of VOC 2007 with their checksums, and the folder of them."""
    voc_set(tmp_path / "trainval/VOCdevkit/VOC2007")
    voc_set(tmp_path / "test/VOCdevkit/VOC2007", names=("x", "y"))
    (tmp_path / "trainval/VOCdevkit/VOC2007/ImageSets/Main/test.txt").unlink()
    write(tmp_path / "trainval/VOCdevkit/VOC2007/ImageSets/Main/val.txt", "c\n")
    (tmp_path / "test/VOCdevkit/VOC2007/ImageSets/Main/train.txt").unlink()
    write(tmp_path / "trainval/VOCdevkit/VOC2007/SegmentationClass/a.png", "not needed")
    made = []
    for one, name in zip(downloads.ARCHIVES, ("trainval", "test"), strict=True):
        (tmp_path / "tars").mkdir(exist_ok=True)
        with tarfile.open(tmp_path / "tars" / one.name, "w") as tar:
            tar.add(tmp_path / name / "VOCdevkit", "VOCdevkit")
        raw = (tmp_path / "tars" / one.name).read_bytes()
        raw += bytes(512 * (name == "test"))  # of another size, by which they are told apart
        (tmp_path / "tars" / one.name).write_bytes(raw)
        made.append(dataclasses.replace(one, sha256=hashlib.sha256(raw).hexdigest(), size=len(raw)))
    monkeypatch.setattr(downloads, "ARCHIVES", tuple(made))
    return tmp_path / "tars"


def test_voc07_is_installed_from_every_form(tmp_path, monkeypatch, tars):
    asked = served(monkeypatch, lambda target: (tars / target.name).read_bytes())
    downloads.VOC07.fetch(tmp_path / "net", None, True)
    assert [url.rpartition("/")[2] for url in asked] == [one.name for one in downloads.ARCHIVES]
    downloads.VOC07.fetch(tmp_path / "folder", tars, True)
    downloads.VOC07.fetch(tmp_path / "unpacked", tmp_path / "net", True)
    for one in downloads.ARCHIVES:
        downloads.VOC07.fetch(tmp_path / "single", tars / one.name, True)
    for name in ("net", "folder", "unpacked", "single"):
        found = downloads.VOC07.load(tmp_path / name)
        assert found.classes == downloads.VOC_CLASSES
        assert len(found.classes) == 20
        stems = {split: [item.path.stem for item in items] for split, items in found.splits.items()}
        assert stems == {"train": ["a", "b"], "val": ["c"], "test": ["y"]}, name
        assert found.classes[of(found, "a").labels[1]] == "dog"
        assert not (tmp_path / name / "VOCdevkit/VOC2007/SegmentationClass").exists()
    assert [path.name for path in (tmp_path / "net/downloads").iterdir()] == []
    shutil.move(tmp_path / "net/VOCdevkit", tmp_path / "net/VOC")
    assert downloads.VOC07.ready(tmp_path / "net"), "VOC/VOC2007 is taken too"


def test_an_altered_archive_of_voc07_is_rejected(tmp_path, tars):
    path = tars / downloads.ARCHIVES[0].name
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match="differs from the published file"):
        downloads.VOC07.fetch(tmp_path / "root", path, True)
    assert not (tmp_path / "root").exists()


def test_unknown_class_in_voc07(tmp_path):
    folder = voc_set(tmp_path / "VOCdevkit/VOC2007")
    write(folder / "Annotations/a.xml", VOC_XML.replace("cat", "cta"))
    with pytest.raises(DataError, match=r"a.xml:2: unknown class 'cta'; did you mean 'cat'"):
        dataset.load("voc07", tmp_path)


def test_sources_are_as_published():
    assert [one.urls[0] for one in downloads.ARCHIVES] == [
        "http://host.robots.ox.ac.uk/pascal/VOC/voc2007/VOCtrainval_06-Nov-2007.tar",
        "http://host.robots.ox.ac.uk/pascal/VOC/voc2007/VOCtest_06-Nov-2007.tar",
    ]
    for one in downloads.ARCHIVES:
        assert len(one.sha256) == 64
        assert all(url.startswith("https://") for url in one.urls[1:])


@pytest.mark.realdata
@pytest.mark.parametrize(("name", "sizes", "boxes"), [("fruit", [192, 48, 60], 582), ("bccd", [205, 87, 72], 4886)])
def test_installed_data_sets(name, sizes, boxes, capsys):
    root = Path(REAL_DATA or "none")
    if not descriptions.get(name).ready(root):
        pytest.skip(f"CVLAB_DATA has no VOC/{name}")
    found = dataset.load(name, root)
    items = [item for split in found.splits.values() for item in split]
    assert found.classes == downloads.CLASSES[name]
    assert [len(split) for split in found.splits.values()] == sizes
    assert sum(len(item.labels) for item in items) == boxes
    for item in items[::17]:
        expected = slow_twin(root / f"VOC/{name}/Annotations/{item.path.stem}.xml")
        assert [
            (found.classes[k], *box) for k, box in zip(item.labels, item.boxes_xyxy.tolist(), strict=True)
        ] == expected
    err = capsys.readouterr().err
    assert ("boxes without area left out: 2 (" in err) == (name == "bccd")
    assert err.count("\n") == (name == "bccd")


def slow_twin(path):
    """Read an annotation by the standard library alone."""
    found = []
    for one in ElementTree.parse(path).getroot().iter("object"):
        xmin, ymin, xmax, ymax = (float(one.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax"))
        if xmax > xmin and ymax > ymin:
            found.append((one.findtext("name"), xmin - 1, ymin - 1, xmax, ymax))
    return found
