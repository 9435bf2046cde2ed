"""Models of runs exported to files of other formats, read with the libraries of those formats."""

import importlib.util
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from PIL import Image

from cvlab import registry
from cvlab.api import export
from cvlab.config import loading
from cvlab.data import photos
from cvlab.errors import CheckpointError
from cvlab.ops import nms
from cvlab.ops.resample import EvalTransform
from cvlab.runs import checkpoint

ROOT = Path(__file__).parent.parent.parent

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")), reason="no onnx"
)
CLASSIFIER = ("quickstart", "duration={steps: 2}", "data.num_train=64", "evaluate_test=false", "batch_size=8")
DETECTOR = (
    *("yolo_scenes", "data={name: scenes, num_train: 4}", "size=64", "views=1", "batch_size=2"),
    *("duration={steps: 2}", "evaluate_test=false", "threads=1"),
)

MIN_SCORE = 1e-5  # low: the model is hardly trained


@pytest.fixture
def trained(cvlab):
    def train(args, *overrides):
        code, out, err = cvlab("train", *args, *overrides, "expect=[]", "expect_fallback=[]", "--json")
        assert code == 0, err
        return Path(json.loads(out)["run"])

    return train


def load_model(run):
    config = loading.load(str(run), ["device=cpu", "precision=float32"]).config
    spec = registry.get_experiment(config.experiment).export_spec(config, run, checkpoint.load_of_run(run, "last"))
    return spec, spec.model.eval()


def test_safetensors_have_the_parameter_names_of_the_model(cvlab, trained):
    from safetensors import safe_open

    run = trained(CLASSIFIER)
    code, out, err = cvlab("export", run, "--to", "safetensors", "--json")
    assert code == 0, err
    result = json.loads(out)
    spec, _ = load_model(run)
    with safe_open(result["files"][0], "pt") as file:
        state_dict = spec.weights.state_dict()
        assert all(torch.equal(file.get_tensor(name), state_dict[name]) for name in state_dict)
        assert len(state_dict) == len(file.keys())
        metadata = json.loads(file.metadata()[export.METADATA_KEY])
    assert len(metadata["classes"]) == 10
    assert "[0, 1]" in metadata["input"]
    assert metadata["run"] == run.name


@needs_onnx
@pytest.mark.filterwarnings("ignore")
class TestOnnx:
    def test_a_classifier_gives_the_same_scores(self, cvlab, trained, tmp_path):
        import onnxruntime

        run, file = trained(CLASSIFIER), tmp_path / "model.onnx"
        code, out, err = cvlab("export", run, "--to", "onnx", "--out", file, "--json")
        assert code == 0, err
        assert json.loads(out)["largest_difference"] < export.TOLERANCE
        session = onnxruntime.InferenceSession(file)
        images = torch.rand(5, 3, 32, 32)
        actual = session.run(["scores"], {"images": images.numpy()})[0]
        torch.testing.assert_close(load_model(run)[1](images), torch.from_numpy(actual), rtol=1e-4, atol=1e-4)
        metadata = json.loads(session.get_modelmeta().custom_metadata_map[export.METADATA_KEY])
        assert metadata["normalization"]["std"]
        text = (ROOT / "docs/guides/export.md").read_text()
        names = {}
        exec(text.partition('```python title="center_crop.py"\n')[2].partition("```")[0], names)
        photo = Image.effect_noise((61, 40), 60).convert("RGB")
        transform = EvalTransform(**metadata["preprocessing"])
        for evaluated in (transform, EvalTransform(24, 30), EvalTransform(24, 30, "bilinear", squash=True)):
            expected = photos.to_tensor(evaluated(photo))
            assert torch.equal(torch.from_numpy(names["center_crop"](photo, **asdict(evaluated)))[0], expected)
        assert len(metadata["classes"]) == 10

    @pytest.mark.parametrize(
        "overrides", [(), pytest.param(("finetune_epochs=1", "duration={epochs: 1}"), marks=pytest.mark.slow)]
    )
    def test_a_detector_returns_the_same_boxes(self, cvlab, trained, overrides):
        import onnxruntime

        run = trained(DETECTOR, *overrides)
        code, out, err = cvlab("export", run, "--to", "onnx", "--json")
        assert code == 0, err
        spec, model = load_model(run)
        session = onnxruntime.InferenceSession(json.loads(out)["files"][0])
        images = torch.rand(2, 3, 64, 64)
        with torch.no_grad():
            maps = model.features.batch(images)
            outputs = spec.weights([maps[name] for name in model.features.names])
            expected = spec.weights.postprocess(outputs, 64, MIN_SCORE, 0.6, 100)
        scores, boxes = (torch.from_numpy(value) for value in session.run(None, {"images": images.numpy()}))
        for k, detections in enumerate(expected):
            point, label = (scores[k] >= MIN_SCORE).nonzero(as_tuple=True)
            candidates_xyxy = boxes[k][point].clamp(0, 64)
            keep = nms.batched_nms(candidates_xyxy, scores[k][point, label], label, 0.6, 100)
            distance = (candidates_xyxy[keep][:, None] - detections.boxes_xyxy[None]).abs().amax(2)
            distance += 1e3 * (label[keep][:, None] != detections.labels[None])
            # Two boxes whose scores differ in the last bits only may be in either order.
            assert len(keep) > 50
            assert float((distance.amin(0) < 0.02).float().mean()) > 0.9

    def test_of_a_two_stage_detector_only_the_weights_can_be_exported(self, cvlab, trained):
        run = trained(DETECTOR, "model={name: faster_rcnn}")
        code, _, err = cvlab("export", run, "--to", "onnx")
        assert code == 2
        assert "--to safetensors" in err
        assert cvlab("export", run, "--to", "safetensors")[0] == 0


def test_invalid_exports_are_rejected(cvlab, trained):
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
