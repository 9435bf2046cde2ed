"""`cvlab caption`: captions, attention maps, and errors."""

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from cvlab.data import photo_paths, photos, vocabulary
from cvlab.engine import device
from cvlab.experiments.captioning import base as captioner_base
from cvlab.experiments.captioning import checkpoint, feature_store
from cvlab.experiments.captioning.feature_store import FeatureSpec

WORDS = ("a", "red", "blue", "star", "ring")


@pytest.fixture
def weights(tmp_path):
    """Return the weights files of untrained captioners by cell, in which END is unlikely, to avoid empty captions."""
    cpu = torch.device("cpu")
    files = {}
    for cell in ("attention_lstm", "rnn"):
        arguments = {"cell": cell, "embed_dim": 8, "hidden_dim": 16}
        metadata = checkpoint.CaptionerMetadata(arguments, WORDS, 64, 12, trained_on="nothing")
        sources = checkpoint.build_feature_sources(metadata, cpu)
        files[cell] = tmp_path / f"{cell}.safetensors"
        torch.manual_seed(0)  # building the backbone draws random numbers only the first time
        model = checkpoint.build(metadata, sources, cpu).model
        model.output_projection.bias.detach()[vocabulary.END] = -4.0
        checkpoint.save(metadata, model, files[cell])
    return files


def test_each_photo_gets_a_caption_and_attention_maps(cvlab, weights, tmp_path):
    photo, broken = tmp_path / "wide.png", tmp_path / "broken.png"
    Image.new("RGB", (90, 30), "red").save(photo)
    broken.write_bytes(b"no photo")
    images = ("sample", str(photo), str(broken))
    options = ("--weights", weights["attention_lstm"], "--beam", 2, "--attention", "--json")
    code, out, _ = cvlab("caption", *images, *options)
    report = json.loads(out)
    assert code == 4
    assert report["metrics"]["num_photos"] == 2
    assert "error" in report["results"][2]
    for result in report["results"][:2]:
        tokens = result["sentence"].split()
        assert 1 <= len(tokens) <= 11
        assert set(tokens) <= set(WORDS)
        assert result["score"] < 0
        sheet = Image.open(Path(report["run"]) / result["picture"])
        assert sheet.width > 200
        assert sheet.getbbox() is not None


def test_user_captioners_are_guided_on_request(cvlab, weights):
    code, out, err = cvlab("caption", "sample", "--weights", weights["attention_lstm"], "--guide", "--json")
    assert code == 0, err
    assert "person" in [item["label"] for item in json.loads(out)["results"][0]["guide"]]
    code, out, _ = cvlab("caption", "sample", "--weights", weights["attention_lstm"], "--json")
    assert "guide" not in json.loads(out)["results"][0]


def test_the_table_shows_the_caption(cvlab, weights):
    code, out, err = cvlab("caption", "sample", "--weights", weights["rnn"])
    assert code == 0, err
    assert re.search(r"^caption  +\w", out, re.MULTILINE), err
    assert "rnn" in err, err


def test_a_beam_of_width_one_is_greedy(cvlab, weights):
    captioner = checkpoint.load(weights["attention_lstm"], torch.device("cpu"))
    photo = photos.load(photo_paths.find_images(("sample",))[0])
    ctx = device.select_device("cpu", "float32", 1)
    features = feature_store.extract_features(captioner.feature_sources, [photo], ctx, FeatureSpec(False))
    state, token_ids = captioner.model.initial_state(features), [vocabulary.START]
    while len(token_ids) < captioner.metadata.max_length and token_ids[-1] != vocabulary.END:
        logits, state, _ = captioner.model.step(state, torch.tensor([token_ids[-1]]))
        logits[:, [vocabulary.PAD, vocabulary.START, vocabulary.UNKNOWN]] = -torch.inf
        token_ids.append(int(logits.argmax()))
    options = ("--weights", weights["attention_lstm"], "--beam", 1, "precision=float32", "--json")
    out = cvlab("caption", "sample", *options)[1]
    if token_ids[-1] == vocabulary.END:
        assert json.loads(out)["results"][0]["sentence"] == " ".join(captioner.vocabulary.decode(token_ids))


@pytest.mark.parametrize(
    ("args", "expected_code", "message"),
    [
        (("--weights", "nowhere.safetensors"), 4, "no such file"),
        (("--weights", "{folder}"), 4, "this run has no captioner.safetensors"),
        (("--weights", "{rnn}", "--attention"), 2, "has no attention weights"),
        (("--beam", "0"), 2, "beam"),
    ],
)
def test_errors(cvlab, weights, tmp_path, args, expected_code, message):
    code, _, err = cvlab("caption", "sample", *(arg.format(folder=tmp_path, **weights) for arg in args))
    assert code == expected_code, err
    assert message in err, err
    assert err.count("\n") <= 3, err


def test_no_photo(cvlab):
    code, _, err = cvlab("caption")
    assert code == 2
    assert "no photo is named" in err


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_of_16_bits_are_upcast_to_float32(dtype):
    assert captioner_base.upcast(torch.zeros(2, 3, dtype=dtype)).dtype == torch.float32
    assert captioner_base.upcast(torch.zeros(2, 3, dtype=torch.float64)).dtype == torch.float64
