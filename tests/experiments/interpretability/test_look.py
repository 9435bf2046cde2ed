"""The look command: filters, statistics, feature space and loss landscape of runs and of pretrained models."""

import csv
import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import cvlab as api
from cvlab.errors import StoppedError
from cvlab.experiments.interpretability import image_sets, landscape, layer_pictures
from cvlab.models.pretrained import NormalizedModel

TINY = {
    "duration": {"steps": 20},
    "data.num_train": 300,
    "data.val_fraction": 0.04,
    "eval_every": 1000,
    "expect": [],
    "evaluate_test": False,
    "model.filters": [6],
    "model.pools": [0],
}
SMALL = ("num_images=40", "tsne_steps=20", "neighbors=2")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data_root):
    """Return the run directory of a small classifier."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CVLAB_DATA", str(data_root))
        return api.train("quickstart", TINY, seed=0, runs_dir=tmp_path_factory.mktemp("trained")).path


def read_csv(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_a_run_is_described_layer_by_layer(trained, cvlab, tmp_path):
    code, out, err = cvlab("look", trained, "--on", "test", *SMALL, "--json")
    assert code == 0, err
    result = json.loads(out)
    run = tmp_path / result["run"]
    file_names = {Path(row["image"]).name for row in result["results"]}
    assert {"filters.png", "weights.png", "gradients.png", "neighbors.png", "tsne.png"} < file_names
    assert all((run / row["image"]).is_file() for row in result["results"])
    (table,) = result["tables"]
    assert table["columns"][:6] == ["layer", "type", "output", "mean", "std", "dead"]
    rows = {row[0]: dict(zip(table["columns"], row, strict=True)) for row in table["rows"]}
    assert [row["type"] for row in rows.values()] == ["Conv2d", "BatchNorm2d", "MaxPool2d", "ReLU", "Linear"]
    assert rows["0"]["output"] == "6 x 32 x 32"
    assert rows["3"]["dead"] == result["metrics"]["dead_fraction"]
    assert rows["0"]["dead"] is None
    assert result["metrics"]["images"] == 40
    assert 0 <= result["metrics"]["same_class_fraction"] <= 1
    assert result["metrics"]["kl_divergence"] > 0
    assert len(read_csv(run / "tsne.csv")) == 40
    page = (run / "report.html").read_text()
    assert "layers, over 40 images: scenes10 test" in page
    assert "6 x 32 x 32" in page
    weights = read_csv(run / "weights.csv")
    state = api.load_run(trained).model().state_dict()
    for row in weights:
        name = next(key for key in state if key.endswith(f".{row['weight']}"))
        assert float(row["std"]) == pytest.approx(float(state[name].std(correction=0)), rel=1e-4, abs=1e-8)
        assert float(row["gradient std"]) >= 0


def test_the_center_of_the_landscape_has_the_loss_of_the_run_and_an_interrupted_landscape_continues(
    trained, cvlab, monkeypatch, tmp_path
):
    arguments = ("look", trained, "--landscape", "num_images=10_000", "resolution=3", "tsne_steps=0")
    losses_along, calls = landscape.loss_landscape.losses_along, []

    def stop_in_second_row(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise StoppedError("stopped for a test", "", 130)
        return losses_along(*arguments)

    monkeypatch.setattr(landscape.loss_landscape, "losses_along", stop_in_second_row)
    assert cvlab(*arguments)[0] == 130
    (first,) = (tmp_path / "runs" / "latest" / "metrics.jsonl").read_text().splitlines()
    code, out, err = cvlab("resume", "latest", "--json")
    assert code == 0, err
    result = json.loads(out)
    rows = (tmp_path / result["run"] / "metrics.jsonl").read_text().splitlines()
    assert rows[0] == first
    assert len(rows) == 3
    assert len(calls) == 4
    val_loss = json.loads((trained / "summary.json").read_text())["metrics"]["val_loss"]
    assert result["metrics"]["loss"] == json.loads(rows[1])["losses"][1] == pytest.approx(val_loss, rel=1e-5)
    ends = [json.loads(rows[k])["losses"][j] for k, j in ((0, 1), (1, 0), (1, 2), (2, 1))]
    assert result["metrics"]["loss_at_radius"] == pytest.approx(sum(ends) / 4)
    assert [row["direction 2"] for row in read_csv(tmp_path / result["run"] / "landscape.csv")] == ["-1", "0", "1"]


def test_photos_and_a_folder_with_classes(trained, two_photos, cvlab, tmp_path):
    for number in range(3):
        for name in ("red", "blue"):
            (tmp_path / "set" / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 30 + number), name).save(tmp_path / "set" / name / f"{number}.png")
    (tmp_path / "set" / "red" / "broken.png").write_bytes(b"no image")
    arguments = ("look", trained, two_photos[0], "--on", "set", "--layer", "3", "tsne_steps=3")
    code, out, err = cvlab(*arguments, "--json")
    assert code == 0, err
    assert "broken.png" in err
    result = json.loads(out)
    assert result["metrics"]["images"] == 6
    assert result["metrics"]["same_class_fraction"] == 1
    assert result["tables"][0]["title"] == "layers, over 6 images: set"
    names = [row["image"] for row in result["results"]]
    assert names[-3:] == [f"images/{Path(two_photos[0]).stem}-3.png", "images/neighbors.png", "images/tsne.png"]


class Functional(nn.Module):
    """A network whose weights are used by functions, without layers."""

    def __init__(self):
        super().__init__()
        self.filters = nn.Parameter(torch.randn(4, 3, 5, 5))

    def forward(self, images):
        return nn.functional.conv2d(images, self.filters).mean((2, 3))


@pytest.mark.parametrize(
    ("network", "channels", "text", "has_picture"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 5), nn.Flatten()), 3, "0: 4 filters of 5 x 5 pixels", True),
        (nn.Sequential(nn.Conv2d(1, 4, 5), nn.Flatten()), 1, "0: 4 filters of 5 x 5 pixels", True),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), 3, "1: 4 templates of 8 x 8 pixels", True),
        (nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, 4, 3)), 3, "1 takes 12 channels, which are no colors", True),
        (nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(192, 4)), 3, "2 does not take the pixels as they are", True),
        (nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 4, 3)), 3, "no picture of the first weights, 1, of shape", False),
        (Functional(), 3, "filters: 4 filters of 5 x 5 pixels", True),
    ],
)
def test_the_first_layer_is_drawn_or_the_reason_is_given(network, channels, text, has_picture):
    model = NormalizedModel(network.eval(), (0.5,) * channels, (0.5,) * channels)
    layer = layer_pictures.find_first_layer(network, model, torch.rand(1, channels, 8, 8))
    image, description = layer_pictures.draw_filters(layer)
    assert text in description
    assert (image is not None) == has_picture
    assert layer_pictures.find_first_layer(nn.Flatten(), nn.Flatten(), torch.rand(1, 3, 8, 8)) is None


def test_a_template_shows_its_weights():
    weight = torch.zeros(2, 3 * 4 * 4)
    weight[0, 5] = -2.0  # red channel, row 1, column 1
    layer = layer_pictures.FirstLayer("fc", weight, True, (3, 4, 4))
    image, _ = layer_pictures.draw_filters(layer)
    tile = image.width // 2
    pixel = 2 + (tile - 4) // 4 * 3 // 2
    assert image.getpixel((pixel, pixel)) == (0, 128, 128)
    assert image.getpixel((tile + pixel, pixel)) == (128, 128, 128)


def test_evenly_spaced_images_grids_of_channels_and_the_axis_of_a_landscape():
    assert image_sets.evenly_spaced(10, 4) == [0, 2, 5, 7]
    assert image_sets.evenly_spaced(3, 10) == [0, 1, 2]
    image, description = layer_pictures.draw_channels(torch.rand(1, 70, 4, 4), 64)
    assert description.startswith("64 of 70 channels of 4 x 4, from 0 to ")
    assert image.width >= 8 * 4
    assert layer_pictures.draw_channels(-torch.rand(1, 10), 64)[1].startswith("10 units, from -")
    assert math.isclose(landscape.axis(landscape.LookConfig(experiment="look", resolution=5, radius=0.5))[1], -0.25)


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        ([], 2, "no network is named"),
        (["sample"], 2, "sample is a photo; the network comes first"),
        (["nothing"], 2, "unknown model 'nothing'"),
        (["efficientnet_lite0", "gone.jpg"], 4, "gone.jpg: no such file"),
        (["nanodet_g", "--layer", "stage.1"], 2, "unknown layer 'stage.1'; did you mean 'stages.1'?"),
        (["efficientnet_lite0", "--layer", "a,,b"], 2, "an empty name"),
        (["efficientnet_lite0", "--on", "test"], 2, "test is a split of the data of a training run"),
        (["efficientnet_lite0", "--on", "nowhere"], 2, "'nowhere' is neither train, val or test nor a folder"),
        (["efficientnet_lite0", "--landscape"], 2, "landscape: the loss is that of a training run"),
        (["efficientnet_lite0", "resolution=4"], 2, "give an odd number"),
    ],
)
def test_errors_are_one_line(cvlab, arguments, code, text):
    result, _, err = cvlab("look", *arguments)
    assert result == code
    assert text in err.splitlines()[-1]
