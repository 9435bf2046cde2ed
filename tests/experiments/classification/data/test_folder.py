"""A folder of photos as a data set: layouts, splits, unusual files, and one-line errors."""

import csv
import os
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from cvlab.data import photos
from cvlab.errors import DataError
from cvlab.experiments.classification.data import folder
from cvlab.experiments.classification.data.folder import SplitConfig, scan
from cvlab.ops.resample import EvalTransform

TRANSFORM = EvalTransform(16, 18)


def write_photo(path, seed=0, size=(24, 20)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(zlib.crc32(f"{path.name} {seed}".encode())).integers(0, 255, (size[1], size[0], 3))
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


@pytest.fixture
def class_folders(tmp_path):
    root = tmp_path / "photos"
    for label, count in (("cat", 20), ("dog", 10), ("newt", 5)):
        for k in range(count):
            write_photo(root / label / f"{k}.png", seed=f"{label} {k}")
    return root


def counts(listing):
    result = {}
    for photo in listing.photos:
        result.setdefault(photo.split, {}).setdefault(photo.label, 0)
        result[photo.split][photo.label] += 1
    return result


def test_class_folders_are_split_class_by_class(class_folders):
    listing = scan(class_folders, SplitConfig(0.2, 0.1))
    assert listing.classes == ("cat", "dog", "newt")
    assert counts(listing)["val"] == {"cat": 4, "dog": 2, "newt": 1}
    assert counts(listing)["test"] == {"cat": 2, "dog": 1}
    assert [photo.split for photo in listing.photos] == sorted(
        (photo.split for photo in listing.photos), key=folder.SPLITS.index
    )
    assert scan(class_folders, SplitConfig(0.2, 0.1)) == listing
    other = scan(class_folders, SplitConfig(0.2, 0.1, seed=1))
    assert counts(other) == counts(listing)
    assert other != listing


def test_a_new_photo_moves_few_others(class_folders):
    before = {photo.path: photo.split for photo in scan(class_folders, SplitConfig()).photos}
    write_photo(class_folders / "cat" / "new.png", seed=999)
    after = {photo.path: photo.split for photo in scan(class_folders, SplitConfig()).photos}
    assert sum(before[path] != after[path] for path in before) <= 1


@pytest.mark.parametrize("val", ["val", "valid", "Validation", "dev"])
@pytest.mark.parametrize("has_test", [False, True])
def test_split_folders(tmp_path, val, has_test):
    for split in ("train", val, *(["test"] if has_test else [])):
        for label in ("a", "b"):
            write_photo(tmp_path / split / label / f"{split}.png", seed=ord(label))
    listing = scan(tmp_path, SplitConfig())
    expected = {"train": {"a": 1, "b": 1}, "val": {"a": 1, "b": 1}, "test": {"a": 1, "b": 1}}
    assert counts(listing) == {split: expected[split] for split in ("train", "val", *(["test"] if has_test else []))}


def test_training_photos_are_used_for_validation_if_there_is_no_folder_for_it(tmp_path):
    for k in range(10):
        for label in ("a", "b"):
            write_photo(tmp_path / "train" / label / f"{k}.png", seed=k + ord(label))
            write_photo(tmp_path / "test" / label / f"{k}.png", seed=-k - ord(label))
    listing = scan(tmp_path, SplitConfig(0.2, 0.5))
    assert counts(listing) == {"train": {"a": 8, "b": 8}, "val": {"a": 2, "b": 2}, "test": {"a": 10, "b": 10}}


@pytest.mark.parametrize("has_splits", [False, True])
def test_a_csv_file(tmp_path, has_splits):
    rows = []
    for k in range(10):
        write_photo(tmp_path / "all" / f"a, {k}.png", seed=k)
        rows.append((f"all/a, {k}.png", "ab"[k % 2], ("train", "val", "test")[min(k // 4, 2)]))
    with (tmp_path / "photos.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "label", "split"][: 3 if has_splits else 2])
        writer.writerows(row[: 3 if has_splits else 2] for row in rows)
    listing = scan(tmp_path / "photos.csv", SplitConfig(0.2))
    assert listing.classes == ("a", "b")
    if has_splits:
        assert {photo.path.name: photo.split for photo in listing.photos} == {row[0][4:]: row[2] for row in rows}
    else:
        assert counts(listing) == {"train": {"a": 4, "b": 4}, "val": {"a": 1, "b": 1}}


def test_hidden_files_links_and_nested_folders(class_folders):
    for name in (".hidden.png", "._0.png", "notes.txt", "Thumbs.db"):
        (class_folders / "cat" / name).write_bytes(b"no photo")
    write_photo(class_folders / "cat" / "more" / "nested.PNG", seed=5)
    write_photo(class_folders / "__MACOSX" / "0.png")
    (class_folders / "dog" / "loop").symlink_to(class_folders / "dog")
    elsewhere = write_photo(class_folders.parent / "elsewhere" / "linked.png", seed=6)
    (class_folders / "dog" / "linked").symlink_to(elsewhere.parent)
    listing = scan(class_folders, SplitConfig(0.0))
    assert counts(listing) == {"train": {"cat": 21, "dog": 11, "newt": 5}}
    assert any("2 files" in note and "HEIC" not in note for note in listing.notes)
    (class_folders / "cat" / "IMG_0001.HEIC").write_bytes(b"no photo")
    assert any(
        "3 files" in note and "1 in Apple's format HEIC" in note for note in scan(class_folders, SplitConfig(0.0)).notes
    )


def test_unusual_contents_are_noted(class_folders):
    (class_folders / "empty").mkdir()
    write_photo(class_folders / "single" / "0.png", seed=1)
    content = (class_folders / "cat" / "0.png").read_bytes()
    (class_folders / "dog" / "copy.png").write_bytes(content)
    (class_folders / "cat" / "again.png").write_bytes(content)
    other_content = (class_folders / "newt" / "0.png").read_bytes()
    (class_folders / "newt" / "same.png").write_bytes(other_content)
    notes = "\n".join(scan(class_folders, SplitConfig()).notes)
    for text in ("empty has no photo", "in two classes", "twice in one class", "one training photo only: single"):
        assert text in notes
    listing = scan(class_folders, SplitConfig())
    split_of = {photo.path.relative_to(class_folders).as_posix(): photo.split for photo in listing.photos}
    assert split_of["cat/0.png"] == split_of["cat/again.png"] == split_of["dog/copy.png"]
    assert split_of["newt/0.png"] == split_of["newt/same.png"]


def test_a_photo_in_two_splits_is_noted(tmp_path):
    for label in ("a", "b"):
        write_photo(tmp_path / "train" / label / "0.png", seed=ord(label))
        write_photo(tmp_path / "test" / label / "1.png", seed=2 * ord(label))
    (tmp_path / "test" / "a" / "copy.png").write_bytes((tmp_path / "train" / "a" / "0.png").read_bytes())
    assert any("two splits" in note and "copy.png" in note for note in scan(tmp_path, SplitConfig(0.0)).notes)


def _empty(root):
    root.mkdir()


def _one_class(root):
    write_photo(root / "cat" / "0.png")


def _no_classes(root):
    write_photo(root / "0.png")


def _control_character(root):
    write_photo(root / "c\nat" / "0.png")
    write_photo(root / "dog" / "0.png")


def _a_file(root):
    root.write_text("photos")


def _unknown_class_in_test(root):
    for path in ("train/a", "train/b", "test/c"):
        write_photo(root / path / "0.png", seed=len(path))


def _missing(root):
    pass


@pytest.mark.parametrize(
    "make", [_empty, _one_class, _no_classes, _control_character, _a_file, _unknown_class_in_test, _missing]
)
def test_an_unusable_folder_gives_a_one_line_error(tmp_path, make):
    make(tmp_path / "photos")
    with pytest.raises(DataError) as error:
        scan(tmp_path / "photos", SplitConfig())
    assert "\n" not in str(error.value)
    assert error.value.hint


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a,b\n1,2\n",
        "image,label\n",
        "image,label\n0.png\n",
        "image,label\n0.png,a,b\n",
        "image,label\nmissing.png,a\n0.png,b\n",
        "image,label,split\n0.png,a,fold 1\n",
        "image,label,split\n0.png,a,val\n0.png,b,val\n",
        "image,label,split\n0.png,a,train\n0.png,b,\n",
        'image,label\n"0.png,a\n',
        "image,label\n0.png,\xff\n",
    ],
)
def test_an_invalid_csv_file_gives_a_one_line_error(tmp_path, text):
    write_photo(tmp_path / "0.png")
    (tmp_path / "photos.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=r"photos\.csv|missing\.png"):
        scan(tmp_path / "photos.csv", SplitConfig())


def test_images_equal_those_of_the_photo_reader(class_folders, capsys):
    rotated = Image.new("RGB", (30, 20), "red")
    rotated.putpixel((0, 0), (0, 0, 255))
    exif = Image.Exif()
    exif[0x112] = 6
    rotated.save(class_folders / "cat" / "rotated.jpg", exif=exif)
    Image.new("CMYK", (20, 20), (0, 255, 0, 0)).save(class_folders / "cat" / "cmyk.jpg")
    Image.fromarray(np.full((20, 20), 40000, np.uint16)).save(class_folders / "cat" / "gray16.png")
    (class_folders / "cat" / "cut.png").write_bytes((class_folders / "cat" / "0.png").read_bytes()[:60])
    (class_folders / "dog" / "text.jpg").write_text("no photo")
    listing = scan(class_folders, SplitConfig(0.2))
    dataset = folder.load(listing, TRANSFORM)
    errors = capsys.readouterr().err
    assert "2 of 40 photos cannot be read" in errors
    assert "cut.png" in errors
    assert "text.jpg" in errors
    for split, (images, labels) in dataset.splits().items():
        for k, name in enumerate(dataset.files[split]):
            expected = np.asarray(TRANSFORM(photos.load(class_folders / name)))
            assert np.array_equal(images[torch.tensor([k])][0].numpy(), expected)
            assert name.startswith(dataset.classes[labels[k]])


def test_decoded_photos_are_cached_and_decoded_again_after_changes(class_folders, monkeypatch):
    folder.load(scan(class_folders, SplitConfig()), TRANSFORM)
    load, names = photos.load, []
    monkeypatch.setattr(photos, "load", lambda path: (names.append(path.name), load(path))[1])
    first = folder.load(scan(class_folders, SplitConfig(0.4)), TRANSFORM)
    assert names == []
    write_photo(class_folders / "cat" / "3.png", seed=77)
    os.utime(class_folders / "cat" / "3.png", ns=(1, 1))
    second = folder.load(scan(class_folders, SplitConfig(0.4)), TRANSFORM)
    assert "3.png" in names
    assert first.digest() != second.digest()


def test_a_photo_removed_during_decoding_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("CVLAB_DATA", str(tmp_path / "data"))
    for k in range(200):
        path = tmp_path / "photos" / ("a", "b")[k % 2] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (k, 0, 0)).save(path)
    listing = folder.scan(tmp_path / "photos", folder.SplitConfig())
    last = max(photo.path for photo in listing.photos)
    content = last.read_bytes()
    last.unlink()
    with pytest.raises(
        DataError, match=rf"{last.name}: was removed while the photos were decoded; restore it, or start"
    ):
        folder.load(listing, EvalTransform(16, 16))
    last.write_bytes(content)
    assert len(folder.load(listing, EvalTransform(16, 16)).train_images) == listing.count("train")
