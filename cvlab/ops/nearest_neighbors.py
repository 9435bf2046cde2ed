"""k-nearest neighbors: distances between all pairs of vectors with two, one and no loops, and the vote of the nearest.

References:
    Cover and Hart, 1967, "Nearest neighbor pattern classification"; CS231n (Stanford) and EECS 498 (Johnson, University
    of Michigan), assignment 1, whose three ways of computing distances these are.
"""

import torch
from torch import Tensor


def distances_two_loops(x: Tensor, y: Tensor) -> Tensor:
    """Return the Euclidean distances (N, M) of vectors (N, D) and (M, D), one pair at a time."""
    distances = x.new_empty(len(x), len(y))
    for i in range(len(x)):
        for j in range(len(y)):
            distances[i, j] = (x[i] - y[j]).square().sum().sqrt()
    return distances


def distances_one_loop(x: Tensor, y: Tensor) -> Tensor:
    """Return the Euclidean distances (N, M) of vectors (N, D) and (M, D), one row at a time."""
    distances = x.new_empty(len(x), len(y))
    for i in range(len(x)):
        distances[i] = (x[i] - y).square().sum(1).sqrt()
    return distances


def distances_no_loops(x: Tensor, y: Tensor) -> Tensor:
    """Return the Euclidean distances (N, M) of vectors (N, D) and (M, D) by one matrix product.

    |x - y|^2 = |x|^2 - 2 x y + |y|^2, in which digits are lost where x and y are long and close to each other; so the
    mean of all y is subtracted from both first, which changes no distance.
    """
    center = y.mean(0)
    x, y = x - center, y - center
    squared = torch.addmm(y.square().sum(1), x, y.T, alpha=-2)  # (N, M)
    return squared.add_(x.square().sum(1, keepdim=True)).clamp_(min=0).sqrt_()


def nearest(distances: Tensor, k: int) -> Tensor:
    """Return the k nearest of M, the nearest first: int64 (N, k) of distances (N, M); equal ones in their order.

    Where the k-th and the next one are equal, either may be among the k.
    """
    values, indices = distances.topk(k, largest=False)  # (N, k), equal ones in any order
    order = torch.argsort(indices, stable=True)
    values, indices = values.gather(1, order), indices.gather(1, order)
    return indices.gather(1, torch.argsort(values, dim=1, stable=True))


def count_votes(labels: Tensor, num_classes: int) -> Tensor:
    """Return how many of k neighbors have each class: int64 (N, C) of their labels, int64 (N, k)."""
    votes = labels.new_zeros(len(labels), num_classes)
    return votes.scatter_add_(1, labels, torch.ones_like(labels))


def majority(votes: Tensor) -> Tensor:
    """Return the class with most votes, int64 (N,) of (N, C); of equal ones the first."""
    num_classes = votes.shape[1]
    preference = torch.arange(num_classes - 1, -1, -1, device=votes.device)
    return (votes * num_classes + preference).argmax(1)
