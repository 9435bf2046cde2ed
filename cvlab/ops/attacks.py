"""Steps of gradient-based adversarial attacks on single images.

References:
    Szegedy et al., 2014, "Intriguing properties of neural networks" (`l2_step`: the course's normalized gradient).
    Goodfellow et al., 2015, "Explaining and harnessing adversarial examples", section 4 (FGSM).
    Madry et al., 2018, "Towards deep learning models resistant to adversarial attacks", section 2.1 (PGD).

Differences from the paper:
    Images stay in [0, 1]. Each image has a step size of its own, so that images of any size change alike.
"""

import math

import torch
from torch import Tensor

MAX_UINT8 = 255
ROWS_PER_CHUNK = 256


def attack_loss(logits: Tensor, classes: Tensor, targeted: bool) -> Tensor:
    """Return what an attack minimizes.

    Args:
        logits: (N, C).
        classes: int64 (N,), the target class if `targeted`, else the class to move away from.
        targeted: Whether the attack aims at a class.

    Returns:
        loss (N,): minus the target's logit, or the logit of the class to move away from.
    """
    class_logits: Tensor = logits.float().gather(1, classes[:, None])[:, 0]
    loss: Tensor = -class_logits if targeted else class_logits
    return loss


def l2_step(image: Tensor, gradient: Tensor, length: float) -> Tensor:
    """Take a step of L2 norm `length` down the gradient, then clamp to [0, 1].

    Args:
        image: (C, H, W) in [0, 1].
        gradient: (C, H, W), of the loss.
        length: Norm of the step over all pixels.

    Returns:
        The changed image (C, H, W) in [0, 1].
    """
    stepped: Tensor = image - gradient * (length / gradient.norm().clamp(min=1e-20))
    return stepped.clamp_(0, 1)


def linf_step(image: Tensor, gradient: Tensor, original: Tensor, alpha: float, eps: float) -> Tensor:
    """Change every pixel by `alpha` down the gradient's sign, then project onto the L-infinity ball and [0, 1].

    Args:
        image: (C, H, W) in [0, 1].
        gradient: (C, H, W), of the loss.
        original: (C, H, W) in [0, 1], the center of the ball.
        alpha: Step size in [0, 1].
        eps: Radius of the ball in [0, 1].

    Returns:
        The changed image (C, H, W) in [0, 1], at most `eps` from the original in every pixel.
    """
    return project(image - alpha * gradient.sign(), original, eps)


def project(images: Tensor, originals: Tensor, eps: float) -> Tensor:
    """Return the nearest images that are at most `eps` from the originals in every pixel, and in [0, 1]."""
    return torch.minimum(torch.maximum(images, originals - eps), originals + eps).clamp_(0, 1)


def distances(before: Tensor, after: Tensor) -> dict[str, float]:
    """Return how far apart two images are.

    Args:
        before: (C, H, W) in [0, 1].
        after: (C, H, W) in [0, 1].

    Returns:
        `l2`, the norm of the difference over all pixels; `linf_255`, its largest absolute value in steps of 1/255;
        `psnr_db`, the peak signal-to-noise ratio (inf for equal images).
    """
    squared_sum = largest = 0.0
    # Row by row in chunks: an image may have 50 megapixels.
    for a, b in zip(before.split(ROWS_PER_CHUNK, 1), after.split(ROWS_PER_CHUNK, 1), strict=True):
        difference = (b - a).double()
        squared_sum += difference.square().sum().item()
        largest = max(largest, difference.abs().max().item())
    psnr_db = -10 * math.log10(squared_sum / before.numel()) if squared_sum else math.inf
    return {"l2": math.sqrt(squared_sum), "linf_255": largest * MAX_UINT8, "psnr_db": psnr_db}


def paste(image: Tensor, pixels: Tensor, region: tuple[int, int, int, int]) -> Tensor:
    """Return a copy of an image with other pixels in a region; differentiable by these.

    Args:
        image: (C, H, W).
        pixels: (C, bottom - top, right - left).
        region: Left, top, right, bottom in whole pixels.
    """
    left, top, right, bottom = region
    pasted = image.clone()
    pasted[:, top:bottom, left:right] = pixels
    return pasted


def random_start(image: Tensor, noise: Tensor, eps: float) -> Tensor:
    """Return a random point of the L-infinity ball around an image.

    Args:
        image: (C, H, W) in [0, 1].
        noise: (C, H, W), uniform in [0, 1).
        eps: Radius of the ball.

    Returns:
        The changed image (C, H, W) in [0, 1].
    """
    return (image + (2 * noise - 1) * eps).clamp_(0, 1)


def attack_succeeded(logits: Tensor, classes: Tensor, targeted: bool) -> Tensor:
    """Return whether each image's top class is the target, or is no longer the class to move away from.

    Args:
        logits: (N, C).
        classes: int64 (N,), as in `attack_loss`.
        targeted: Whether the attack aims at a class.

    Returns:
        bool (N,).
    """
    return logits.argmax(1).eq(classes).eq(targeted)
