"""`cvlab data show` and `cvlab embed`: the reports agree with the files."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cvlab.experiments.common import embedding
from tests.experiments.classification.test_photos import CLASSES, scene_photos


@pytest.fixture
def photos(tmp_path, data_root):
    """Write photos of three classes, with an exact and a near copy in another split; return their folder."""
    for first, split in enumerate(("train", "test")):
        scene_photos(tmp_path / "photos" / split, 4, data_root, first=4 * first)
    original = sorted((tmp_path / "photos" / "train" / "ring").iterdir())[0]
    (tmp_path / "photos" / "test" / "ring" / "copy.png").write_bytes(original.read_bytes())
    other = sorted((tmp_path / "photos" / "train" / "square").iterdir())[0]
    with Image.open(other) as image:
        image.save(tmp_path / "photos" / "test" / "square" / "near.jpg", quality=99, subsampling=0)
    return tmp_path / "photos"


def test_photos_of_classes(photos, cvlab):
    code, out, err = cvlab("data", "show", "photos", f"data.path={photos}", "--samples", 4, "--json")
    assert code == 0, err
    overview = json.loads(out)
    assert sum(overview["images"].values()) == 26
    assert {name for counts in overview["classes"].values() for name in counts} == set(CLASSES)
    assert sum(sum(counts.values()) for counts in overview["classes"].values()) == 26
    assert overview["sizes"]["width"] == [64, 64, 64]
    assert overview["num_copies"] == overview["num_copies_across_splits"] == 1
    assert any(row["image"].endswith("copy.png") for row in overview["copies"][0])
    near = [{row["image"].rpartition("/")[2] for row in pair["images"]} for pair in overview["near_copies"]]
    assert any("near.jpg" in names for names in near)
    sheet_path, json_path, page_path = map(Path, overview["files"])
    with Image.open(sheet_path) as sheet:
        assert min(sheet.size) > 200
    assert json.loads(json_path.read_text())["images"] == overview["images"]
    assert "data:image/png" in page_path.read_text()


@pytest.mark.parametrize("config", ["quickstart", "yolo_scenes", "caption_scenes"])
def test_every_kind_of_data(config, cvlab, tmp_path, monkeypatch):
    monkeypatch.setattr("cvlab.experiments.common.data_overview.MAX_EMBEDDED", 0)
    code, out, err = cvlab("data", "show", config, "--samples", 3, "--out", tmp_path / "out")
    assert code == 0, err
    assert "near copies were not searched" in out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["data.html", "data.json", "samples.png"]


def test_an_experiment_without_data_gives_a_one_line_error(cvlab):
    code, _, err = cvlab("data", "show", "attack")
    assert code == 2
    assert "no data set" in err


def test_features_and_nearest_photos(photos, cvlab):
    folder = photos / "train" / "ring"
    query = sorted(folder.iterdir())[0]
    pattern = str(photos / "*" / "*" / "*")
    code, out, err = cvlab("embed", pattern, "--out", "f.npz", "--nearest", query, "--top", 3, "--json")
    assert code == 0, err
    result = json.loads(out)
    with np.load("f.npz") as file:
        features, files = torch.from_numpy(file["features"]), [Path(name) for name in file["files"]]
    assert features.shape == (26, result["features"])
    assert torch.allclose(features.norm(dim=1), torch.ones(26), atol=1e-5)
    assert result["nearest"][0]["image"].endswith("copy.png")
    assert result["nearest"][0]["similarity"] == pytest.approx(1, abs=1e-4)
    similarity = features @ features[files.index(query)]
    expected = sorted((float(s), str(p)) for s, p in zip(similarity, files, strict=True) if p != query)[::-1][:3]
    assert [row["image"] for row in result["nearest"]] == [name for _, name in expected]


def test_embed_without_an_output_is_rejected(cvlab):
    code, _, err = cvlab("embed", "sample")
    assert code == 2
    assert "--out" in err


def test_near_pairs_are_sorted():
    features = torch.nn.functional.normalize(torch.tensor([[1.0, 0], [0.99, 0.1], [0, 1], [1, 0.01]]), dim=1)
    pairs = embedding.near_pairs(features, 0.9)
    assert [(i, j) for i, j, _ in pairs] == [(0, 3), (1, 3), (0, 1)]
    assert [s for *_, s in pairs] == sorted((s for *_, s in pairs), reverse=True)
