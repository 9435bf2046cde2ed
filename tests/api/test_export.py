"""Nets of runs in files for other programs, read with those programs' own libraries."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from cvlab import registry
from cvlab.api import export
from cvlab.config import loading
from cvlab.errors import CheckpointError
from cvlab.ops import nms
from cvlab.runs import checkpoint

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")), reason="no onnx"
)
CLASSIFIER = ("quickstart", "duration={steps: 2}", "data.num_train=64", "evaluate_test=false", "batch_size=8")
DETECTOR = (
    *("yolo_scenes", "data={name: scenes, num_train: 4}", "size=64", "views=1", "batch_size=2"),
    *("duration={steps: 2}", "evaluate_test=false", "threads=1"),
)

FLOOR = 1e-5  # of a net that has hardly begun


@pytest.fixture
def trained(cvlab):
    def train(words, *more):
        code, out, err = cvlab("train", *words, *more, "expect=[]", "expect_fallback=[]", "--json")
        assert code == 0, err
        return Path(json.loads(out)["run"])

    return train


def net_of(run):
    chosen = loading.load(str(run), ["device=cpu", "precision=float32"]).config
    made = registry.get_experiment(chosen.experiment).export_spec(chosen, run, checkpoint.load_of_run(run, "last"))
    return made, made.model.eval()


def test_safetensors_have_the_names_of_the_net(cvlab, trained):
    from safetensors import safe_open

    run = trained(CLASSIFIER)
    code, out, err = cvlab("export", run, "--to", "safetensors", "--json")
    assert code == 0, err
    found = json.loads(out)
    made, _ = net_of(run)
    with safe_open(found["files"][0], "pt") as file:
        own = made.weights.state_dict()
        assert all(torch.equal(file.get_tensor(name), own[name]) for name in own)
        assert len(own) == len(file.keys())
        about = json.loads(file.metadata()[export.METADATA_KEY])
    assert len(about["classes"]) == 10
    assert "[0, 1]" in about["input"]
    assert about["run"] == run.name


@needs_onnx
@pytest.mark.filterwarnings("ignore")
class TestOnnx:
    def test_a_classifier_gives_the_same_scores(self, cvlab, trained, tmp_path):
        import onnxruntime

        run, file = trained(CLASSIFIER), tmp_path / "net.onnx"
        code, out, err = cvlab("export", run, "--to", "onnx", "--out", file, "--json")
        assert code == 0, err
        assert json.loads(out)["largest_difference"] < export.TOLERANCE
        session = onnxruntime.InferenceSession(file)
        images = torch.rand(5, 3, 32, 32)
        theirs = session.run(["scores"], {"images": images.numpy()})[0]
        torch.testing.assert_close(net_of(run)[1](images), torch.from_numpy(theirs), rtol=1e-4, atol=1e-4)
        about = json.loads(session.get_modelmeta().custom_metadata_map[export.METADATA_KEY])
        assert about["normalization"]["std"]
        assert len(about["classes"]) == 10

    @pytest.mark.parametrize(
        "more", [(), pytest.param(("finetune_epochs=1", "duration={epochs: 1}"), marks=pytest.mark.slow)]
    )
    def test_a_detector_finds_the_same_boxes(self, cvlab, trained, more):
        import onnxruntime

        run = trained(DETECTOR, *more)
        code, out, err = cvlab("export", run, "--to", "onnx", "--json")
        assert code == 0, err
        made, net = net_of(run)
        session = onnxruntime.InferenceSession(json.loads(out)["files"][0])
        images = torch.rand(2, 3, 64, 64)
        with torch.no_grad():
            maps = net.features.batch(images)
            mine = made.weights.postprocess(made.weights([maps[n] for n in net.features.names]), 64, FLOOR, 0.6, 100)
        scores, boxes = (torch.from_numpy(value) for value in session.run(None, {"images": images.numpy()}))
        for k, found in enumerate(mine):
            point, label = (scores[k] >= FLOOR).nonzero(as_tuple=True)
            place = boxes[k][point].clamp(0, 64)
            kept = nms.batched_nms(place, scores[k][point, label], label, 0.6, 100)
            apart = (place[kept][:, None] - found.boxes_xyxy[None]).abs().amax(2)
            apart += 1e3 * (label[kept][:, None] != found.labels[None])
            # of two boxes as sure but for the last bits either may go first
            assert len(kept) > 50
            assert float((apart.amin(0) < 0.02).float().mean()) > 0.9

    def test_of_two_stages_only_the_weights_can_be_taken(self, cvlab, trained):
        run = trained(DETECTOR, "model={name: faster_rcnn}")
        code, _, err = cvlab("export", run, "--to", "onnx")
        assert code == 2
        assert "--to safetensors" in err
        assert cvlab("export", run, "--to", "safetensors")[0] == 0


def test_refusals(cvlab, trained):
    run = trained(CLASSIFIER)
    assert "did you mean 'onnx'" in cvlab("export", run, "--to", "onx")[2]
    code, _, _ = cvlab("export", run, "--to", "safetensors", "--out", run / "no" / "x")
    assert code == 5
    assert not (run / "no").exists()
    assert cvlab("export", "nothing", "--to", "onnx")[0] == 5


def test_a_file_that_differs_is_not_written():
    good = [torch.tensor([1.0, 2.0])]
    assert export._largest_difference(good, [torch.tensor([1.0, 2.00001])]) < 1e-4
    for bad in (torch.tensor([1.0, 2.1]), torch.tensor([1.0]), torch.tensor([1.0, torch.nan])):
        with pytest.raises(CheckpointError):
            export._largest_difference(good, [bad])
