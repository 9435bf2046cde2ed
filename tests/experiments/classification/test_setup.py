"""Metrics of a batch, also for models that modify their input, and class weights."""

import json

import pytest
import torch
from torch import nn

from cvlab.experiments.classification import setup
from cvlab.experiments.classification.setup import compute_metrics


class Classifier(nn.Module):
    """A classifier whose logits are sums over channels; it scales its input, in place or not."""

    def __init__(self, in_place):
        super().__init__()
        self.in_place = in_place

    def forward(self, images):
        images = images.mul_(4).sub_(1) if self.in_place else images * 4 - 1
        return (images[:, :, :2, :2] ** 3).sum((2, 3))


@pytest.mark.parametrize("tta", ["none", "flip", "flip_shift"])
def test_a_model_that_modifies_its_input_in_place_has_the_same_metrics(tta):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand((200, 3, 8, 8), generator=generator)
    labels = torch.randint(0, 3, (200,), generator=generator)
    expected = compute_metrics(Classifier(in_place=False), (images.clone(), labels), tta)
    actual = compute_metrics(Classifier(in_place=True), (images.clone(), labels), tta)
    assert actual == expected
    assert 0 < expected["accuracy"] < 200


def test_balanced_weights_match_their_definition():
    labels = torch.tensor([0] * 6 + [1] * 3 + [3])
    weights = setup.balanced_weights(labels)
    assert torch.allclose(weights[labels].mean(), torch.tensor(1.0))
    sums = [float(weights[labels][labels == k].sum()) for k in (0, 1, 3)]
    assert sums == pytest.approx([10 / 3] * 3)


def test_training_with_balanced_class_weights(cvlab):
    arguments = ("quickstart", "data.num_train=300", "data.val_fraction=0.02", "duration={steps: 3}", "expect=[]")
    results = {}
    for value in ("none", "balanced"):
        code, out, err = cvlab("train", *arguments, f"class_weights={value}", "--json")
        assert code == 0, err
        results[value] = json.loads(out)["metrics"]["train_loss"]
    assert results["none"] != results["balanced"]
    assert results["none"] == pytest.approx(results["balanced"], rel=0.1)  # scenes10 is nearly even
