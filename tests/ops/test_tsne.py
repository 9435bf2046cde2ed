"""t-SNE against a slow reference, the definitions of its paper, and the results of scikit-learn."""

import math

import pytest
import torch

from cvlab.ops import tsne

# KL divergences of sklearn.manifold.TSNE(method="exact", init="pca", perplexity=10), scikit-learn 1.9.1
SKLEARN_KL = {"blob": 0.59978, "curve": 0.15409}


def clusters(count=4, size=15, dims=8):
    """Return points around `count` centers, and the index of the center of each."""
    generator = torch.Generator().manual_seed(0)
    centers = 3 * torch.randn(count, dims, generator=generator, dtype=torch.float64)
    noise = torch.randn(count * size, dims, generator=generator, dtype=torch.float64)
    labels = torch.arange(count).repeat_interleave(size)
    return centers[labels] + noise, labels


def test_joint_probabilities_have_the_perplexity_and_match_a_slow_reference():
    x, _ = clusters(2, 6)
    p = tsne.joint_probabilities(x, 3.0)
    rows = []
    for i in range(len(x)):
        others = [j for j in range(len(x)) if j != i]
        distances = torch.stack([(x[i] - x[j]).square().sum() for j in others])
        low, high = 1e-6, 1e6
        for _ in range(200):
            beta = math.sqrt(low * high)
            row = torch.softmax(-beta * distances, 0)
            perplexity = 2 ** float(-(row * row.log2()).sum())
            low, high = (beta, high) if perplexity > 3 else (low, beta)
        assert perplexity == pytest.approx(3, rel=1e-6)
        rows.append(torch.zeros(len(x), dtype=torch.float64).index_put_((torch.tensor(others),), row))
    conditional = torch.stack(rows)
    torch.testing.assert_close(p, (conditional + conditional.T) / (2 * len(x)), rtol=1e-6, atol=1e-12)
    assert float(p.sum()) == pytest.approx(1)


def test_gradient_and_divergence_match_autograd():
    x, _ = clusters(2, 6)
    p = tsne.joint_probabilities(x, 3.0)
    y = torch.randn(12, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    distances = (y[:, None] - y[None]).square().sum(2)
    kernel = (1 / (1 + distances)) * (1 - torch.eye(12))
    q = kernel / kernel.sum()
    off_diagonal = ~torch.eye(12, dtype=torch.bool)
    divergence = (p[off_diagonal] * (p[off_diagonal] / q[off_diagonal]).log()).sum()
    divergence.backward()
    torch.testing.assert_close(tsne.gradient(p, y.detach()), y.grad)
    assert tsne.kl_divergence(p, y.detach()) == pytest.approx(divergence.item())


def blob_and_curve():
    generator = torch.Generator().manual_seed(0)
    t = torch.linspace(0, 6, 80, dtype=torch.float64)
    blob = torch.randn(80, 5, generator=generator, dtype=torch.float64)
    noise = torch.randn(80, 3, generator=generator, dtype=torch.float64)
    return {"blob": blob, "curve": torch.stack([t.cos() * t, t.sin() * t, t], 1) + 0.3 * noise}


def test_the_divergence_is_no_worse_than_that_of_scikit_learn():
    for name, x in blob_and_curve().items():
        assert tsne.tsne(x, 10.0)[1] <= 1.02 * SKLEARN_KL[name]


def test_clusters_stay_together():
    x, labels = clusters()
    y, _ = tsne.tsne(x, 10.0, steps=300)
    assert y.equal(tsne.tsne(x, 10.0, steps=300)[0])
    nearest = tsne.squared_distances(y).fill_diagonal_(math.inf).argmin(1)
    assert (labels[nearest] == labels).all()


@pytest.mark.parametrize("x", [torch.zeros(6, 3), torch.arange(5.0)[:, None], torch.eye(5)])
def test_degenerate_points_have_finite_positions(x):
    y, divergence = tsne.tsne(x, 30.0, steps=20)
    assert y.shape == (len(x), 2)
    assert y.isfinite().all()
    assert math.isfinite(divergence)
