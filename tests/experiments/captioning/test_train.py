"""Training captioners on generated scenes: metrics, weights, evaluation, resuming, and errors."""

import json
from pathlib import Path

import pytest
import torch

from cvlab.config.loading import load
from cvlab.data import coco_sets
from cvlab.data.vocabulary import PAD
from cvlab.experiments.captioning import checkpoint, dataset
from cvlab.experiments.captioning.batches import CaptionBatch
from cvlab.experiments.captioning.model import Captioner
from cvlab.experiments.captioning.setup import make_loss_fn
from tests.coco_files import write_coco_set
from tests.conftest import weights_digest

SHORT = (
    *("model={name: captioner, cell: attention_lstm, embed_dim: 8, hidden_dim: 16}", "size=64", "batch_size=4"),
    *("duration={steps: 4}", "expect=[]", "log_every=1", "evaluate_test=false", "threads=1", "beam=2"),
)
OVERFIT = (
    *("data.num_train=4", "eval_every=1000", "optimizer={name: adam, lr: 1e-2}", "schedule={name: constant}"),
    "ema=null",
)


def train(cvlab, *args):
    code, out, err = cvlab("train", "caption_scenes", *SHORT, *args, "--json")
    assert code == 0, err
    return json.loads(out)


def read_metrics(report):
    return [json.loads(line) for line in (Path(report["run"]) / "metrics.jsonl").read_text().splitlines()]


def test_metrics_and_weights_file(cvlab):
    report = train(cvlab)
    expected = {"val_loss", "val_bleu4", "bleu1", "bleu4", "cider", "exact_match", "shape_accuracy", "word_loss"}
    assert expected | {"train_loss"} <= report["metrics"].keys()
    captioner = checkpoint.load(Path(report["run"]) / "captioner.safetensors", torch.device("cpu"))
    assert captioner.metadata.size_px == 64
    assert captioner.metadata.trained_on == "scene_captions"
    assert "red" in captioner.metadata.vocabulary
    summary = json.loads((Path(report["run"]) / "summary.json").read_text())
    assert "closest reference length" in summary["bleu_rule"]
    assert summary["beam"] == 2


EXTRA_FEATURES = "extra_features=[{backbone: nanodet_g, strides: [32, 16], size: 96}]"


def test_a_captioner_with_the_features_of_two_backbones(cvlab):
    report = train(cvlab, "strides=[32]", EXTRA_FEATURES)
    path = Path(report["run"]) / "captioner.safetensors"
    captioner = checkpoint.load(path, torch.device("cpu"))
    assert [source.size_px for source in captioner.feature_sources] == [64, 96]
    assert captioner.model.projection.in_features == 1280 + 512 + 256
    code, out, err = cvlab("caption", "sample", "--weights", path, "--json")
    assert code == 0, err
    assert "score" in json.loads(out)["results"][0]
    code, out, err = cvlab("eval", report["run"], "--split", "val", "--json")
    assert code == 0, err
    assert json.loads(out)["metrics"]["val_bleu4"] == pytest.approx(report["metrics"]["bleu4"], abs=1e-6)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("{backbone: nanodet}", "nanodet_g"),
        ("{strides: [32]}", "backbone"),
        ("{backbone: nanodet_g, strides: []}", "strides"),
        ("{backbone: nanodet_g, size: 9}", "size"),
    ],
)
def test_extra_features_are_checked(cvlab, block, message):
    code, _, err = cvlab("train", "caption_scenes", *SHORT, f"extra_features=[{block}]", "--dry-run")
    assert code == 2
    assert message in err


def test_an_invalid_stride_of_extra_features_gives_a_one_line_error(cvlab):
    code, _, err = cvlab("train", "caption_scenes", "extra_features=[{backbone: nanodet_g, strides: [7]}]", "--dry-run")
    assert code == 2
    assert err.splitlines()[0].endswith("extra_features.0.strides.0: expected 4 | 8 | 16 | 32, got 7")
    assert err.count("strides.0") == err.count("error:") == 1


def test_manual_layers_train_like_those_of_torch(cvlab):
    sizes = "embed_dim: 8, hidden_dim: 16, dropout: 0, feature_dropout: 0"
    losses = [
        train(cvlab, f"model={{name: captioner, cell: lstm, {sizes}, layers: {layers}}}", "precision=float32")[
            "metrics"
        ]["train_loss"]
        for layers in ("torch", "manual")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_parts_of_a_batch_have_the_loss_and_gradient_of_the_whole_batch():
    torch.manual_seed(0)
    model = Captioner(8, 12, cell="attention_lstm", embed_dim=6, hidden_dim=7, dropout=0.0, feature_dropout=0.0)
    token_ids = torch.randint(4, 12, (7, 6))
    token_ids[torch.arange(7), torch.tensor([3, 4, 5, 3, 5, 4, 3])] = PAD
    token_ids[0, 3:] = token_ids[3, 3:] = PAD
    photo_indices = torch.tensor([0, 1, 1, 1, 2, 3, 3])  # 1 + 3 captions in the first half, 1 + 2 in the second
    batch = CaptionBatch(torch.randn(4, 9, 8), torch.arange(4), token_ids, photo_indices, is_self_critical=False)
    loss_fn = make_loss_fn(load("caption_scenes").config, None)
    results = []
    for parts in ([batch], batch.split(2)):
        model.zero_grad()
        losses = [loss_fn(model, part) for part in parts]
        sum(part["loss"] / len(parts) for part in losses).backward()
        means = {name: sum(part[name].detach() for part in losses) / len(parts) for name in losses[0]}
        results.append([*means.values(), *(parameter.grad for parameter in model.parameters())])
    for whole, parts in zip(*results, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-6)


def test_gradient_accumulation_gives_the_same_losses(cvlab):
    sizes = "embed_dim: 8, hidden_dim: 16, dropout: 0, feature_dropout: 0"
    args = (f"model={{name: captioner, cell: lstm, {sizes}}}", "precision=float32")
    expected, accumulated = (train(cvlab, *args, *options)["metrics"] for options in ((), ("accumulate=2",)))
    for name in ("train_loss", "word_loss", "val_loss"):
        assert accumulated[name] == pytest.approx(expected[name], rel=1e-6)


def test_an_interrupted_run_resumes_to_the_same_weights(stopped_and_resumed):
    uninterrupted, resumed = stopped_and_resumed(
        "caption_scenes", *SHORT, "save_seconds=0", "mirror=true", "reward_epochs=1", "accumulate=2"
    )
    assert weights_digest(uninterrupted) == weights_digest(resumed)
    assert uninterrupted["run"] != resumed["run"]


def test_eval_repeats_the_metrics_of_the_run(cvlab):
    report = train(cvlab)
    code, out, err = cvlab("eval", report["run"], "--split", "val", "--json")
    assert code == 0, err
    metrics = json.loads(out)["metrics"]
    assert metrics["val_bleu1"] == pytest.approx(report["metrics"]["bleu1"])
    assert metrics["val_loss"] > 0


@pytest.fixture
def data_with_people(data_root, tmp_path, monkeypatch):
    """Return a data folder with the scenes and a tiny coco_people."""
    dataset.load("scene_captions", data_root)
    (tmp_path / "data").mkdir()
    for folder in data_root.iterdir():
        (tmp_path / "data" / folder.name).symlink_to(folder)
    write_coco_set(tmp_path / "data", coco_sets.COCO_PEOPLE, {"train": 8, "val": 3, "test": 4})
    monkeypatch.setenv("CVLAB_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def test_extra_data_sets_are_used_for_training_and_evaluation(cvlab, data_with_people):
    rule = "expect=[coco_people_bleu4 >= 0]"
    report = train(cvlab, "data={name: scene_captions, extra: [coco_people]}", rule, "evaluate_test=true")
    assert {"bleu4", "shape_accuracy", "coco_people_bleu4", "coco_people_cider"} <= report["metrics"].keys()
    summary = json.loads((Path(report["run"]) / "summary.json").read_text())
    assert summary["data"] == "scene_captions + coco_people"
    captioner = checkpoint.load(Path(report["run"]) / "captioner.safetensors", torch.device("cpu"))
    assert captioner.metadata.trained_on == "scene_captions + coco_people"
    assert {"circle", "caption"} <= set(captioner.metadata.vocabulary)
    code, out, err = cvlab("eval", report["run"], "--json")
    assert code == 0, err
    metrics = json.loads(out)["metrics"]
    assert metrics["test_coco_people_bleu1"] == pytest.approx(report["metrics"]["coco_people_bleu1"])
    assert metrics["test_bleu1"] == pytest.approx(report["metrics"]["bleu1"])
    assert "val_coco_people_bleu1" in metrics
    code, _, err = cvlab("train", "caption_scenes", "expect=[coco_people_bleu4 >= 0]")
    assert code == 2
    assert "no metric 'coco_people_bleu4'" in err


def test_a_missing_extra_data_set_triggers_the_fallback(cvlab):
    data = "data={name: scene_captions, extra: [coco_people], fallback: scene_captions}"
    code, out, err = cvlab("train", "caption_scenes", *SHORT, data, "expect_fallback=[]", "--json")
    assert code == 0, err
    assert "coco_people is not on the disk (offline); falling back to scene_captions" in err
    assert "coco_people_bleu4" not in json.loads(out)["metrics"]
    summary = json.loads((Path(json.loads(out)["run"]) / "summary.json").read_text())
    assert summary["data"] == "scene_captions (fallback for scene_captions + coco_people)"
    code, _, err = cvlab("train", "caption_scenes", *SHORT, data, "--no-fallback")
    assert code == 4
    assert "`cvlab data fetch coco_people` gets it" in err
    code, out, err = cvlab("train", "caption_scenes", *SHORT, data, "--dry-run")
    assert code == 4, "the plan reads the captions"


def test_self_critical_training_raises_the_reward(cvlab):
    model = "model={name: captioner, cell: lstm, embed_dim: 16, hidden_dim: 32, dropout: 0, feature_dropout: 0}"
    rows = read_metrics(train(cvlab, model, *OVERFIT, "duration={steps: 60}", "reward_epochs=40"))
    rewards = [row["reward"] for row in rows if "reward" in row]
    assert len(rewards) == 40
    assert sum(rewards[-5:]) > sum(rewards[:5])


def test_the_model_overfits_a_few_captions(cvlab):
    sizes = "embed_dim: 16, hidden_dim: 32, dropout: 0, feature_dropout: 0"
    model = f"model={{name: captioner, cell: attention_lstm, {sizes}}}"
    rows = read_metrics(train(cvlab, model, *OVERFIT, "duration={steps: 120}", "schedule={name: cosine}"))
    losses = [row["train_loss"] for row in rows if "train_loss" in row]
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("data.name=scenes",), "captioned photos are needed"),
        (("data.num_train=9999",), "has 12 photos"),
        (("data.name=captions",), "requires a path"),
        (("model.cell=gru",), "cell"),
        (("duration={epochs: 2}", "reward_epochs=3"), "reward_epochs: 3 is more than duration.epochs: 2"),
        (("duration={seconds: 5}", "reward_epochs=1"), "reward_epochs are counted from the end"),
        (("min_word_count=99999",), "no word occurs 99999 times"),
        (("expect=[bleu5>0]",), "no metric"),
        (("batch_size=4", "accumulate=3"), "3 does not divide batch_size: 4"),
    ],
)
def test_errors(cvlab, args, message):
    code, _, err = cvlab("train", "caption_scenes", *args, "--dry-run")
    assert code in (2, 4), err
    assert message in err, err
