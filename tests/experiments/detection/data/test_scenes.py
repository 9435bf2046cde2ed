"""The built-in scenes: a pure function of the seed, with tight boxes, generated once and verified."""

import json
import os
import shutil

import pytest
import torch

from cvlab.data import datasets, photos
from cvlab.data.scenes import generator
from cvlab.data.scenes.render import COLORS, SHAPES
from cvlab.errors import DataError
from cvlab.experiments.detection.data import dataset, scenes, voc

COUNTS = {"train": 8, "val": 2, "test": 4}


@pytest.fixture(autouse=True)
def one_thread(clean_environment):
    torch.set_num_threads(1)  # several threads would be slower with such small images


@pytest.fixture(scope="module")
def generated_scenes():
    return [generator.generate_scene(9, number) for number in range(60)]


@pytest.fixture
def small_counts(monkeypatch):
    monkeypatch.setattr(scenes, "COUNTS", COUNTS)


def iou(a, b):
    intersection = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    area_a, area_b = (a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1])
    return intersection / (area_a + area_b - intersection), intersection / area_a


def test_drawing_is_a_pure_function_of_seed_and_number(generated_scenes):
    scene = generator.generate_scene(9, 7)
    assert torch.equal(scene.image, generated_scenes[7].image)
    assert scene.objects == generated_scenes[7].objects
    assert scene.image.shape == (224, 224, 3)
    assert scene.image.dtype == torch.uint8
    assert not torch.equal(generator.generate_scene(10, 7).image, scene.image)


def test_contents_of_the_images(generated_scenes):
    all_objects = [item for scene in generated_scenes for item in scene.objects]
    assert {item.shape for item in all_objects} == set(SHAPES)
    assert {item.color for item in all_objects} == set(COLORS)
    assert {len(scene.objects) for scene in generated_scenes} >= {1, 2, 3, 4, 5}
    assert max(len(s.objects) for s in generated_scenes) == 5
    across = [max(x2 - x1, y2 - y1) for x1, y1, x2, y2 in (item.box_xyxy for item in all_objects)]
    assert 24 <= min(across) < 36
    assert 90 < max(across) <= 110
    assert all(0 <= edge <= generator.SIZE_PX for item in all_objects for edge in item.box_xyxy)
    empty = sum(not generator.generate_scene(3, number).objects for number in range(0, 200))
    assert 4 <= empty <= 20


def test_boxes_overlap_little_and_no_object_is_hidden(generated_scenes):
    for scene in generated_scenes:
        boxes = [item.box_xyxy for item in scene.objects]
        for k, box in enumerate(boxes):
            assert all(iou(box, other)[0] < 0.2 for other in boxes[:k])
            assert sum(iou(box, other)[1] for other in boxes[k + 1 :]) < 0.4


def test_boxes_are_tight(generated_scenes):
    """An object covers the pixels that do not depend on the background, when drawn alone on two backgrounds."""
    for item in [item for scene in generated_scenes[:20] for item in scene.objects]:
        images = []
        for background in (0.0, 1.0):
            canvas = torch.full((1, 3, generator.SIZE_PX, generator.SIZE_PX), background)
            images.append(generator._draw_object(canvas, item, iter([0.5] * 20))[0, 0])
        covered = (images[0] - images[1]).abs() < 0.5
        rows, columns = covered.any(1).nonzero(), covered.any(0).nonzero()
        expected = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert item.box_xyxy == tuple(float(edge) for edge in expected)


def test_objects_are_visible(generated_scenes):
    """Many pixels in each box have approximately the color of the object's attributes."""
    for scene in generated_scenes:
        image = scene.image.float() / 255
        for item in scene.objects:
            x1, y1, x2, y2 = map(int, item.box_xyxy)
            inside = image[y1:y2, x1:x2].reshape(-1, 3)
            color = torch.tensor(COLORS[item.color])
            # Texture darkens a color by up to 0.45; the remaining tolerance is for the random hue.
            shades = torch.stack([color * shade for shade in (1.0, 0.85, 0.7, 0.55)])
            is_similar = (inside[:, None] - shades).abs().amax(2).amin(1) < 0.15
            assert is_similar.float().mean() > 0.1, item


def test_attributes():
    def attributes(*box):
        return generator.SceneObject("star", "red", box, (0, 0), 0.1, 0.0).attributes

    assert attributes(0, 0, 30, 30) == ("star", "red", "small", "top left")
    assert attributes(80, 80, 140, 140) == ("star", "red", "medium", "centre")
    assert attributes(100, 140, 200, 220) == ("star", "red", "large", "bottom right")
    assert attributes(90, 150, 130, 200)[2:] == ("medium", "bottom centre")
    assert attributes(0, 100, 20, 124)[3] == "middle left"


def test_the_data_set_is_generated_once_and_verified(tmp_path, small_counts, capsys):
    assert scenes.SET.check(tmp_path) == "built in, generated at first use"
    loaded = dataset.load("scenes", tmp_path)
    assert "generating scenes" in capsys.readouterr().err
    assert scenes.SET.ready(tmp_path)
    assert loaded.classes == tuple(SHAPES)
    assert {s: len(items) for s, items in loaded.splits.items()} == COUNTS
    assert [path.name for path in tmp_path.iterdir()] == [scenes.SET.folder_name]
    reloaded = dataset.load("scenes", tmp_path)
    assert capsys.readouterr().err == ""
    assert scenes.SET.check(tmp_path) == "32 files equal to their checksums"
    attributes = json.loads((tmp_path / scenes.SET.folder_name / "scenes.json").read_text())
    assert len(attributes) == 14
    for split, items in loaded.splits.items():
        for number, item in enumerate(items):
            scene = generator.generate_scene(scenes.SEEDS[split], number)
            assert item.boxes_xyxy.tolist() == [list(drawn.box_xyxy) for drawn in scene.objects]
            assert [loaded.classes[k] for k in item.labels] == [drawn.shape for drawn in scene.objects]
            assert [tuple(values) for values in attributes[item.path.stem]] == [d.attributes for d in scene.objects]
            assert torch.equal((photos.to_tensor(loaded.load(item)) * 255).round().byte().permute(1, 2, 0), scene.image)
            assert torch.equal(item.boxes_xyxy, reloaded.splits[split][number].boxes_xyxy)


def test_the_data_set_has_the_layout_of_voc(tmp_path, small_counts):
    scenes.SET.write(tmp_path)
    assert voc.matches(tmp_path)
    loaded = dataset.load("boxes", tmp_path, str(tmp_path))
    assert {split: len(items) for split, items in loaded.splits.items()} == COUNTS


@pytest.mark.parametrize("name", ["JPEGImages/train_0003.png", "Annotations/test_0001.xml", "scenes.json"])
def test_damage_is_detected(tmp_path, small_counts, name):
    scenes.SET.folder(tmp_path)
    path = tmp_path / scenes.SET.folder_name / name
    raw = path.read_bytes()
    path.write_bytes(raw[:-5] + b"#" + raw[-4:])
    with pytest.raises(DataError, match=rf"{name}: damaged, its checksum differs; remove that folder"):
        dataset.load("scenes", tmp_path)
    path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        dataset.load("scenes", tmp_path)
    shutil.rmtree(tmp_path / scenes.SET.folder_name)
    (tmp_path / scenes.SET.folder_name).mkdir()
    assert len(dataset.load("scenes", tmp_path).splits["train"]) == 8, "a folder without checksums is generated again"


def test_without_a_writable_folder_a_temporary_one_is_used(tmp_path, small_counts):
    (tmp_path / "file").touch()
    first, second = dataset.load("scenes", tmp_path / "file"), dataset.load("scenes", tmp_path / "file")
    path = first.splits["test"][0].path
    assert len(first.splits["train"]) == 8
    assert path == second.splits["test"][0].path
    assert path.is_file()
    scenes.SET.temporary.cleanup()
    scenes.SET.temporary = None
    assert not path.exists()


def test_concurrent_generation(tmp_path, small_counts, monkeypatch):
    """The slower process uses the data set that the other one has generated."""
    original = scenes.SET.write

    def write(target):
        original(target)
        if not scenes.SET.ready(tmp_path):
            shutil.copytree(target, tmp_path / scenes.SET.folder_name)

    monkeypatch.setattr(scenes.SET, "write", write)
    assert scenes.SET.folder(tmp_path) == tmp_path / scenes.SET.folder_name
    assert os.listdir(tmp_path) == [scenes.SET.folder_name]


def test_the_commands(cvlab, tmp_path, small_counts, monkeypatch):
    monkeypatch.setenv("CVLAB_DATA", str(tmp_path / "data"))
    assert datasets.get("scenes").is_builtin
    assert datasets.get("scenes").kind == "boxes"
    code, out, _ = cvlab("data", "fetch", "scenes")
    assert code == 0
    assert "32 files equal to their checksums" in out
    assert "32 files" in cvlab("data", "check", "scenes")[1]
    assert scenes.SEEDS.keys() == COUNTS.keys()
    assert len(set(scenes.SEEDS.values())) == 3
