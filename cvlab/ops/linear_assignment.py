"""Linear assignment: pair rows with columns at the smallest total cost.

References:
    Kuhn, 1955, "The Hungarian method for the assignment problem"; Jonker and Volgenant, 1987, "A shortest augmenting
    path algorithm for dense and sparse linear assignment problems".
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]


def linear_assignment(cost: Floats) -> tuple[Indices, Indices]:
    """Return the assignment of the smallest total cost, exactly, in O(min(N, M)^2 max(N, M)).

    Args:
        cost: (N, M), finite.

    Returns:
        Rows, ascending, and the column that each is paired with; both (min(N, M),).
    """
    num_rows, num_columns = cost.shape
    if num_rows > num_columns:
        columns, rows = linear_assignment(cost.T)
        order = np.argsort(rows)
        return rows[order], columns[order]
    row_of = np.full(num_columns, -1)  # the row that each column is paired with
    row_potential, column_potential = np.zeros(num_rows), np.zeros(num_columns)
    for row in range(num_rows):
        _augment(cost, row, row_of, row_potential, column_potential)
    columns = np.flatnonzero(row_of >= 0)
    order = np.argsort(row_of[columns])
    return np.arange(num_rows), columns[order]


def _augment(cost: Floats, row: int, row_of: Indices, row_potential: Floats, column_potential: Floats) -> None:
    """Pair one more row, along the shortest alternating path to a free column; all arrays but `cost` are changed."""
    distance = np.full(len(row_of), np.inf)  # of the columns, from `row`
    previous = np.full(len(row_of), -1)  # column before it on the path
    is_done = np.zeros(len(row_of), dtype=bool)
    column, reached, current = -1, 0.0, row
    while True:
        through = reached + cost[current] - row_potential[current] - column_potential
        is_shorter = ~is_done & (through < distance)
        distance[is_shorter], previous[is_shorter] = through[is_shorter], column
        column = int(np.where(is_done, np.inf, distance).argmin())
        reached = distance[column]
        if row_of[column] < 0:
            break
        is_done[column] = True
        current = row_of[column]
    row_potential[row] += reached
    row_potential[row_of[is_done]] += reached - distance[is_done]
    column_potential[is_done] -= reached - distance[is_done]
    while column >= 0:
        before = previous[column]
        row_of[column] = row if before < 0 else row_of[before]
        column = before
