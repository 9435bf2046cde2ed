"""Pixels that increase the probability of a word: an artificial captioner, and the command."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from cvlab.data import photos
from cvlab.data.vocabulary import START
from cvlab.engine import device
from cvlab.experiments.captioning import explanation
from cvlab.experiments.captioning.model import Captioner
from cvlab.experiments.common import occlusion


class CornerSource:
    """Features that depend only on the upper left quarter of photos."""

    def maps(self, images, ctx, mirrored):
        pixels = torch.stack([photos.to_tensor(image)[:, :16, :16] for image in images])
        return [torch.nn.functional.avg_pool2d(pixels, 8).repeat(1, 2, 1, 1)]  # (N, 6, 2, 2)


@pytest.fixture
def predictor():
    torch.manual_seed(0)
    model = Captioner(6, 12, embed_dim=8, hidden_dim=8).eval()
    captioner = SimpleNamespace(model=model, feature_sources=[CornerSource()])
    return SimpleNamespace(captioner=captioner, ctx=device.select_device("cpu", "float32"))


def test_only_the_pixels_that_the_captioner_sees_have_an_effect(predictor):
    photo = Image.effect_noise((32, 32), 90).convert("RGB")
    tokens = (5, 7, 6)

    def scores(images):
        return explanation.word_log_prob(predictor, images, tokens, 2)

    values = occlusion.occlusion_map(scores, photo, 0.125, 8, lambda note, done: None)
    assert float(values[:16, :16].abs().max()) > 1e-4
    assert float(values[20:].abs().max()) < 1e-6, "rounding differs between batch sizes"
    assert float(values[:, 20:].abs().max()) < 1e-6


def test_log_probabilities_of_words_sum_to_that_of_the_caption(predictor):
    photo = Image.effect_noise((32, 32), 90).convert("RGB")
    tokens = (5, 7, 6, 8)
    total = sum(float(explanation.word_log_prob(predictor, [photo], tokens, k)[0]) for k in range(4))
    features = CornerSource().maps([photo], None, False)[0].flatten(2).mT
    model = predictor.captioner.model
    with torch.no_grad():
        expected = model.log_prob(features, torch.tensor([[START, *tokens]]), torch.tensor([0]), explanation.SUPPRESSED)
    assert total == pytest.approx(float(expected), rel=1e-5)


def test_the_command_and_a_word_that_no_caption_contains(cvlab):
    code, out, err = cvlab("saliency", "sample", "--word", "man", "window=0.6", "threads=1", "--json")
    assert code == 0, err
    result = json.loads(out)
    row = result["results"][0]
    assert "man" in row["sentence"].split()
    assert photos.load(Path(result["run"]) / row["evidence"]).width > 300
    code, _, err = cvlab("saliency", "sample", "--word", "zeppelin", "threads=1")
    assert code == 2
    assert "no caption has the word 'zeppelin'; name a word of 'a man" in err
