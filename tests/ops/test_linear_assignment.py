"""The assignment against all permutations, and against scipy."""

import itertools

import numpy as np
import pytest

from cvlab.ops.linear_assignment import linear_assignment


def total_cost(cost):
    rows, columns = linear_assignment(cost)
    assert len(rows) == len(columns) == min(cost.shape)
    assert rows.tolist() == sorted({*rows.tolist()})
    assert len({*columns.tolist()}) == len(columns)
    return cost[rows, columns].sum()


@pytest.mark.parametrize("shape", [(1, 1), (3, 3), (2, 5), (5, 2), (4, 6), (6, 4)])
def test_no_permutation_costs_less(shape):
    rng = np.random.default_rng(0)
    for _ in range(20):
        cost = rng.normal(size=shape)
        small = cost if shape[0] <= shape[1] else cost.T
        best = min(
            sum(small[row, column] for row, column in enumerate(columns))
            for columns in itertools.permutations(range(small.shape[1]), small.shape[0])
        )
        assert total_cost(cost) == pytest.approx(best)


@pytest.mark.parametrize("shape", [(40, 40), (7, 90), (90, 7)])
@pytest.mark.parametrize("decimals", [12, 1, 0])
def test_total_cost_equals_that_of_scipy(shape, decimals):
    """Rounded costs have many ties."""
    optimize = pytest.importorskip("scipy.optimize", reason="scipy is not installed")
    cost = np.random.default_rng(1).uniform(0, 3, shape).round(decimals)
    rows, columns = optimize.linear_sum_assignment(cost)
    assert total_cost(cost) == pytest.approx(cost[rows, columns].sum())


@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (3, 0)])
def test_an_empty_cost_matrix(shape):
    rows, columns = linear_assignment(np.zeros(shape))
    assert len(rows) == len(columns) == 0
