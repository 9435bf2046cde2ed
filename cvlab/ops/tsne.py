"""t-SNE: place points in the plane so that near points of a high-dimensional space stay near.

References:
    van der Maaten and Hinton, 2008, "Visualizing data using t-SNE"; Kobak and Berens, 2019, "The art of using t-SNE for
    single-cell transcriptomics" (initialization by the principal components, learning rate N / 12).

Differences from the papers:
    The gradient is exact, O(N^2) a step, for up to a few thousand points. The result depends on the points alone: no
    random numbers are drawn.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

SEARCH_STEPS = 64  # bisections of the bandwidth of a point
EXAGGERATION = 12.0  # of the probabilities in the first quarter of the steps
MIN_LR = 50.0
INIT_STD = 1e-4
MOMENTUM = (0.5, 0.8)  # during the exaggeration, and afterwards
MIN_GAIN = 0.01
TINY = 1e-12


def plane_kernel(y: Tensor) -> Tensor:
    """Return 1 / (1 + squared distance) of all pairs of points (N, 2), 0 on the diagonal: (N, N).

    From differences, as in float32 the products of far points would drown the distances of near ones.
    """
    dx, dy = (column[:, None] - column[None, :] for column in y.unbind(1))
    return dx.square_().add_(dy.square_()).add_(1).reciprocal_().fill_diagonal_(0)


def squared_distances(x: Tensor) -> Tensor:
    """Return the squared distances (N, N) of all pairs of points (N, D); 0 on the diagonal."""
    norms = x.square().sum(1)
    return torch.addmm(norms[:, None] + norms[None, :], x, x.T, alpha=-2).clamp_(min=0).fill_diagonal_(0)


def joint_probabilities(x: Tensor, perplexity: float) -> Tensor:
    """Return the symmetric similarities of points, which sum to 1.

    Args:
        x: float64 (N, D), N > perplexity.
        perplexity: 2 to the entropy of each point's distribution over its neighbors; it sets the bandwidth.

    Returns:
        Float64 (N, N), 0 on the diagonal.
    """
    distances = squared_distances(x)
    distances.fill_diagonal_(math.inf)
    distances -= distances.amin(1, keepdim=True)
    # a scale at which no exponential underflows at the start of the search
    scale = distances.masked_fill(distances.isinf(), 0).sum(1, keepdim=True) / (len(x) - 1)
    distances /= torch.where(scale > 0, scale, torch.ones_like(scale))
    finite = distances.masked_fill(distances.isinf(), 0)
    low, high = torch.zeros(len(x), 1).to(x), torch.full((len(x), 1), math.inf).to(x)
    beta = torch.ones_like(low)
    for _ in range(SEARCH_STEPS):
        weights = (-beta * distances).exp_()
        total = weights.sum(1, keepdim=True)
        entropy = total.log() + beta * (finite * weights).sum(1, keepdim=True) / total
        is_broad = entropy > math.log(perplexity)
        low, high = torch.where(is_broad, beta, low), torch.where(is_broad, high, beta)
        beta = torch.where(high.isinf(), 2 * beta, (low + high) / 2)
    weights = (-beta * distances).exp_()
    conditional = weights / weights.sum(1, keepdim=True)
    return (conditional + conditional.T) / (2 * len(x))


def kl_divergence(p: Tensor, y: Tensor) -> float:
    """Return KL(P || Q) of similarities P (N, N) and those of points (N, 2) in the plane."""
    kernel = plane_kernel(y.double())
    q = (kernel / kernel.sum()).clamp_(min=TINY)
    return float((p * (p.clamp(min=TINY) / q).log()).sum())


def gradient(p: Tensor, y: Tensor) -> Tensor:
    """Return the gradient (N, 2) of KL(P || Q) by the points (N, 2) in the plane; equation 5 of the paper."""
    kernel = plane_kernel(y)
    force = (p - kernel / kernel.sum()).mul_(kernel)  # (N, N)
    return 4 * (force.sum(1, keepdim=True) * y - force @ y)


def principal_components(x: Tensor) -> Tensor:
    """Return the first two principal components (N, 2) of points (N, D), each with its largest loading positive."""
    centered = x - x.mean(0)
    u, s, vh = torch.linalg.svd(centered, full_matrices=False)
    count = min(2, len(s))
    signs = vh[:count].gather(1, vh[:count].abs().argmax(1, keepdim=True)).sign().T  # (1, count)
    scores = u[:, :count] * s[:count] * torch.where(signs == 0, torch.ones_like(signs), signs)
    return torch.nn.functional.pad(scores, (0, 2 - count))


def tsne(
    x: Tensor, perplexity: float = 30.0, steps: int = 1000, on_step: Callable[[int], None] = lambda _: None
) -> tuple[Tensor, float]:
    """Place points in the plane by t-SNE.

    Args:
        x: (N, D).
        perplexity: About the number of near neighbors; at most (N - 1) / 3 is used.
        steps: Steps of gradient descent, a quarter of them with exaggerated similarities.
        on_step: Called before each step with its number; may raise to stop.

    Returns:
        Points, float32 (N, 2), and the Kullback-Leibler divergence of their similarities from those of `x`.
    """
    x = x.double()
    p = joint_probabilities(x, min(perplexity, (len(x) - 1) / 3))
    y = principal_components(x)
    y = (y / y[:, 0].std().clamp(min=TINY) * INIT_STD).float()
    target, exaggerated = p.float(), EXAGGERATION * p.float()
    lr = max(len(x) / EXAGGERATION / 4, MIN_LR)
    for step in range(steps):
        on_step(step)
        is_early = step < steps // 4
        if step in (0, steps // 4):
            velocity, gains = torch.zeros_like(y), torch.ones_like(y)
        slope = gradient(exaggerated if is_early else target, y)
        gains = torch.where(slope.sign() != velocity.sign(), gains + 0.2, gains * 0.8).clamp_(min=MIN_GAIN)
        velocity = velocity * MOMENTUM[not is_early] - lr * gains * slope
        y = y + velocity
        y = y - y.mean(0)
    return y, kl_divergence(p, y)
