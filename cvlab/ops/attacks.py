"""Steps that change photos so that a net sees something else.

Papers: Szegedy et al., 2014, "Intriguing properties of neural networks" (l2: the course's normalised gradient);
Goodfellow et al., 2015, section 4 (fgsm); Madry et al., 2018, section 2.1 (pgd).
Differs: everything stays in [0, 1]; each photo has a step size of its own, so that photos of any size change alike.
"""

import math

import torch
from torch import Tensor

MAX_UINT8 = 255
ROWS_PER_CHUNK = 256


def attack_loss(scores: Tensor, classes: Tensor, targeted: bool) -> Tensor:
    """Return what is to fall, (N,): minus the score of the target, or the score of the class to get away from."""
    picked: Tensor = scores.float().gather(1, classes[:, None])[:, 0]
    toward: Tensor = -picked if targeted else picked
    return toward


def l2_step(photo: Tensor, gradient: Tensor, length: float) -> Tensor:
    """Go `length` (L2 norm over all pixels) down the gradient, then back into [0, 1]."""
    moved: Tensor = photo - gradient * (length / gradient.norm().clamp(min=1e-20))
    return moved.clamp_(0, 1)


def linf_step(photo: Tensor, gradient: Tensor, original: Tensor, alpha: float, eps: float) -> Tensor:
    """Change every pixel by `alpha` down the gradient's sign, stay within `eps` of the original and in [0, 1]."""
    moved = photo - alpha * gradient.sign()
    return torch.minimum(torch.maximum(moved, original - eps), original + eps).clamp_(0, 1)


def distances(before: Tensor, after: Tensor) -> dict[str, float]:
    """Return how far two photos in [0, 1] of one shape are apart.

    `l2` over all pixels, `linf_255` the largest change in steps of 1/255, `psnr_db` (inf for equal photos).
    """
    squares = largest = 0.0
    for a, b in zip(
        before.split(ROWS_PER_CHUNK, 1), after.split(ROWS_PER_CHUNK, 1), strict=True
    ):  # a photo may have 50 megapixels
        difference = (b - a).double()
        squares += difference.square().sum().item()
        largest = max(largest, difference.abs().max().item())
    psnr_db = -10 * math.log10(squares / before.numel()) if squares else math.inf
    return {"l2": math.sqrt(squares), "linf_255": largest * MAX_UINT8, "psnr_db": psnr_db}


def random_start(photo: Tensor, noise: Tensor, eps: float) -> Tensor:
    """Return a photo changed at random by up to `eps`, for noise uniform in [0, 1)."""
    return (photo + (2 * noise - 1) * eps).clamp_(0, 1)


def attack_succeeded(scores: Tensor, classes: Tensor, targeted: bool) -> Tensor:
    """Say of each photo, (N,) bool, whether its top class is the target, or is not the one to get away from."""
    return scores.argmax(1).eq(classes).eq(targeted)
