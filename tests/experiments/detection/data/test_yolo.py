"""YOLO's format: written annotations are read back, and invalid ones are rejected with file and line."""

import shutil

import pytest
import torch

from cvlab.errors import DataError
from cvlab.experiments.detection.data import writers
from tests.experiments.detection.data.box_files import BOXES, SIZE, find_sample, load, write, yolo_set


def test_round_trip(tmp_path):
    loaded = load(yolo_set(tmp_path))
    assert loaded.classes == ("dog", "cat")
    assert [len(items) for items in loaded.splits.values()] == [2, 1, 1]
    torch.testing.assert_close(find_sample(loaded, "d").boxes_xyxy, BOXES, atol=1e-4, rtol=0)
    assert find_sample(loaded, "d").labels.tolist() == [1, 0, 1]
    empty = find_sample(loaded, "b")
    assert empty.boxes_xyxy.shape == (0, 4)
    assert empty.labels.shape == empty.difficult.shape == (0,)
    assert empty.labels.dtype == torch.int64
    assert empty.difficult.dtype == torch.bool


def test_layouts(tmp_path):
    yolo_set(tmp_path / "one")
    for split, folder_name in (("train", "train"), ("val", "valid"), ("test", "test")):
        for kind in ("images", "labels"):
            (tmp_path / "two" / folder_name).mkdir(parents=True, exist_ok=True)
            shutil.copytree(tmp_path / "one" / kind / split, tmp_path / "two" / folder_name / kind)
    write(tmp_path / "two/data.yaml", "nc: 2\nnames: ['dog', 'cat']\n")
    for kind in ("images", "labels"):
        shutil.copytree(tmp_path / "one" / kind / "train", tmp_path / "three" / kind)
    write(tmp_path / "three/labels/classes.txt", "dog\ncat\n")
    scores = torch.tensor([0.5, 0.25, 1.0])
    write(tmp_path / "three/labels/b.txt", writers.write_yolo_txt(BOXES, torch.tensor([1, 0, 1]), SIZE, scores))
    first, second, third = (load(tmp_path / name) for name in ("one", "two", "three"))
    assert first.classes == second.classes == third.classes == ("dog", "cat")
    assert torch.equal(find_sample(first, "c").boxes_xyxy, find_sample(second, "c").boxes_xyxy)
    assert len(second.splits["val"]) == 1
    assert find_sample(third, "b").labels.tolist() == [1, 0, 1]
    assert [len(i) for i in third.splits.values()] == [1, 1, 0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("2 0.5 0.5 0.5 0.5", r"a.txt:2: class '2' is none of 0..1"),
        ("-1 0.5 0.5 0.5 0.5", r"a.txt:2: class '-1' is none"),
        ("00000000099 0.5 0.5 0.5 0.5", r"a.txt:2: class '00000000099' is none of 0..1"),
        ("1e300 0.5 0.5 0.5 0.5", r"a.txt:2: class '1e300' is none"),
        ("0.5 0.5 0.5 0.5 0.5", r"a.txt:2: class '0.5' is none"),
        ("bird 0.5 0.5 0.5 0.5\n7 .5 .5 .5 .5", r"a.txt:2: class 'bird' is none of 0..1, as in 1 more line"),
    ],
)
def test_invalid_lines_are_rejected(tmp_path, line, message):
    write(yolo_set(tmp_path) / "labels/train/a.txt", f"0 0.5 0.5 0.5 0.5\n{line}\n")
    with pytest.raises(DataError, match=message):
        load(tmp_path)


def test_invalid_folders_are_rejected(tmp_path):
    write(yolo_set(tmp_path) / "data.yaml", "names: 3\n")
    with pytest.raises(DataError, match=r"data.yaml:1:8: names is no list"):
        load(tmp_path)
    write(tmp_path / "data.yaml", "names: [a,\n")
    with pytest.raises(DataError, match=r"data.yaml:\d:\d+: not valid YAML"):
        load(tmp_path)
    write(tmp_path / "data.yaml", "names: [dog, dog]\n")
    with pytest.raises(DataError, match=r"the class 'dog' is named twice"):
        load(tmp_path)
    (tmp_path / "data.yaml").unlink()
    with pytest.raises(DataError, match=r"neither data\.yaml nor classes\.txt"):
        load(tmp_path)
    write(tmp_path / "classes.txt", "dog\ncat\n")
    assert load(tmp_path).classes == ("dog", "cat")
