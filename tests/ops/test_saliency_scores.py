"""Scores of saliency maps compared with slow references."""

import itertools

import pytest
import torch
from torch import nn

from cvlab.ops import saliency_scores, visualize


def test_curves_equal_a_loop_over_pixels():
    torch.manual_seed(0)
    image, values, fill = torch.rand(3, 6, 6), torch.rand(6, 6), torch.tensor([0.1, 0.2, 0.3])

    def probability(batch):
        return batch.square().mean((1, 2, 3))

    curves = saliency_scores.insertion_and_deletion(probability, image, values, fill, steps=4, batch_size=3)
    inserted = visualize.gaussian_blur(image[None], saliency_scores.BLUR * 6)[0]
    deleted = image.clone()
    insertion, deletion = [probability(inserted[None])[0]], [probability(deleted[None])[0]]
    by_value = sorted(((r, c) for r in range(6) for c in range(6)), key=lambda rc: -values[rc])
    for step in range(4):
        for r, c in by_value[9 * step : 9 * step + 9]:
            inserted[:, r, c], deleted[:, r, c] = image[:, r, c], fill
        insertion.append(probability(inserted[None])[0])
        deletion.append(probability(deleted[None])[0])
    torch.testing.assert_close(curves.insertion, torch.stack(insertion))
    torch.testing.assert_close(curves.deletion, torch.stack(deletion))
    area = sum(float(a + b) / 2 for a, b in itertools.pairwise(deletion)) / 4
    assert curves.areas()["deletion"] == pytest.approx(area, rel=1e-5)


def test_the_better_map_has_the_better_scores():
    image = torch.ones(3, 8, 8)
    pixels = torch.zeros(8, 8)
    pixels[2, 3] = 1

    def probability(batch):
        return (batch[:, 0] * pixels).sum((1, 2))

    fill = torch.zeros(3)
    good, bad = (
        saliency_scores.insertion_and_deletion(probability, image, values, fill, 8, 4).areas()
        for values in (pixels, 1 - pixels)
    )
    assert good["deletion"] < bad["deletion"] == pytest.approx(1 - 0.5 / 8)


def test_rank_correlation():
    a = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert saliency_scores.rank_correlation(a, a.exp()) == pytest.approx(1)
    assert saliency_scores.rank_correlation(a, -a) == pytest.approx(-1)
    assert saliency_scores.rank_correlation(a, torch.ones(2, 2)) == 0
    tied = torch.tensor([0.0, 0.0, 1.0, 5.0])  # ranks 1.5, 1.5, 3, 4
    expected = torch.corrcoef(torch.tensor([[1.5, 1.5, 3, 4], [1, 3, 2, 4]]))[0, 1]
    assert saliency_scores.rank_correlation(tied, torch.tensor([1.0, 3.0, 2.0, 4.0])) == pytest.approx(float(expected))


def test_only_the_last_layers_are_randomized_and_keep_their_values():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 4), nn.Linear(4, 9))
    other = saliency_scores.randomize_last_layers(model, 0.5, seed=1)
    assert [torch.equal(a.weight, b.weight) for a, b in zip(model, other, strict=True)] == [True, True, False, False]
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a.flatten().sort().values, b.flatten().sort().values)
    last = saliency_scores.randomize_last_layers(model, 0.0, seed=1)
    assert [torch.equal(a.weight, b.weight) for a, b in zip(model, last, strict=True)] == [True, True, True, False]
