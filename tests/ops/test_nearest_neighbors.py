"""Distances with two, one and no loops against torch.cdist; neighbors and votes against a full sort and a count."""

from collections import Counter

import pytest
import torch

from cvlab.ops import nearest_neighbors

IMPLEMENTATIONS = (
    nearest_neighbors.distances_two_loops,
    nearest_neighbors.distances_one_loop,
    nearest_neighbors.distances_no_loops,
)


def pixels(count, seed):
    return torch.randint(0, 256, (count, 3072), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("distances_fn", IMPLEMENTATIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_distances_equal_those_of_cdist(distances_fn, dtype, tolerance):
    x, y = pixels(3, 0).to(dtype), pixels(5, 1).to(dtype)
    expected = torch.cdist(x.double(), y.double(), compute_mode="donot_use_mm_for_euclid_dist")
    torch.testing.assert_close(distances_fn(x, y).double(), expected, rtol=tolerance, atol=0)


@pytest.mark.parametrize("distances_fn", IMPLEMENTATIONS)
def test_an_image_has_distance_zero_to_itself(distances_fn):
    x = pixels(4, 0).double()
    distances = distances_fn(x, x)
    assert distances.isfinite().all()
    assert distances.diag().abs().max() < 1e-2
    assert distances_fn(x[:0], x).shape == (0, 4)


def test_distances_between_long_and_close_vectors_are_precise():
    x, y = 1e4 + torch.rand(6, 50), 1e4 + torch.rand(7, 50)
    expected = torch.cdist(x.double(), y.double(), compute_mode="donot_use_mm_for_euclid_dist")
    torch.testing.assert_close(nearest_neighbors.distances_no_loops(x, y).double(), expected, rtol=1e-3, atol=0)


def test_nearest_equals_a_stable_sort():
    distances = torch.rand(8, 30, generator=torch.Generator().manual_seed(0))
    assert nearest_neighbors.nearest(distances, 30).equal(distances.argsort(dim=1, stable=True))
    assert nearest_neighbors.nearest(distances, 4).equal(distances.argsort(dim=1, stable=True)[:, :4])
    assert nearest_neighbors.nearest(torch.tensor([[2.0, 1.0, 1.0, 0.0]]), 3).tolist() == [[3, 1, 2]]


def test_votes_and_majority_equal_a_count():
    labels = torch.randint(0, 4, (50, 6), generator=torch.Generator().manual_seed(0))
    votes = nearest_neighbors.count_votes(labels, 4)
    for row, count, chosen in zip(labels.tolist(), votes.tolist(), nearest_neighbors.majority(votes), strict=True):
        expected = Counter(row)
        assert count == [expected[k] for k in range(4)]
        assert chosen == min(expected, key=lambda k: (-expected[k], k))
