"""Losses of pictures that are painted: content, style by Gram matrices, smoothness; and how alike two pictures are.

Papers: Gatys, Ecker and Bethge, 2016, "Image style transfer using convolutional neural networks", section 2; Gatys et
al., 2017, "Controlling perceptual factors in neural style transfer", section 4 (regions); Wang et al., 2004, section
III-B (structural similarity). Differs: Gram matrices are means over the cells, divided by C, as in EECS 498: their size
does not depend on that of the picture.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2


def gram_matrix(features: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return how channels go together, (C, C), of features (C, H, W): F F^T / (C * H * W).

    `mask` (H, W) in [0, 1] weighs the cells: F diag(mask) F^T / (C * sum of the mask), which must not be 0.
    """
    c, h, w = features.shape
    flat = features.flatten(1)  # (C, H*W)
    if mask is None:
        return flat @ flat.T / (c * h * w)
    return (flat * mask.flatten()) @ flat.T / (c * mask.sum())


def content_loss(features: Tensor, wanted: Tensor) -> Tensor:
    """Return the sum of squared differences of features (C, H, W)."""
    return (features - wanted).square().sum()


def style_loss(features: Tensor, wanted: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the squared distance of the Gram matrix of features (C, H, W) from the one wanted, (C, C)."""
    return (gram_matrix(features, mask) - wanted).square().sum()


def tv_loss(picture: Tensor) -> Tensor:
    """Return the sum of squared differences of neighbours, across and down, of a picture (C, H, W)."""
    return picture.diff(dim=2).square().sum() + picture.diff(dim=1).square().sum()


def luminance(picture: Tensor) -> Tensor:
    """Return the brightness (1, H, W) of a picture (3, H, W)."""
    weights = torch.tensor(LUMINANCE, dtype=picture.dtype, device=picture.device)
    return torch.einsum("chw,c->hw", picture, weights)[None]


def transfer_color(brightness: Tensor, colours: Tensor) -> Tensor:
    """Give a picture's brightness (1, H, W) the colours of another one (3, H, W): its differences from grey."""
    return (brightness + colours - luminance(colours)).clamp(0, 1)


def match_mean_std(values: Tensor, to: Tensor) -> Tensor:
    """Shift and scale values to the mean and deviation of others (Gatys et al., 2017, section 5.2)."""
    return (values - values.mean()) * (to.std() / values.std().clamp(min=1e-6)) + to.mean()


def ssim(picture: Tensor, other: Tensor) -> float:
    """Return the structural similarity of two pictures (C, H, W) in [0, 1], at least 11 pixels wide: 1 for the same.

    Gaussian window of 11 pixels, sigma 1.5, mean over all places where it fits, and over the channels.
    """
    places = torch.arange(SSIM_WINDOW, dtype=picture.dtype, device=picture.device) - SSIM_WINDOW // 2
    line = torch.exp(-0.5 * (places / SSIM_SIGMA) ** 2)
    window = (torch.outer(line, line) / line.sum() ** 2)[None, None]

    def mean(values: Tensor) -> Tensor:
        return F.conv2d(values[:, None], window)  # (C, 1, H-10, W-10)

    mean_a, mean_b = mean(picture), mean(other)
    var_a, var_b = mean(picture**2) - mean_a**2, mean(other**2) - mean_b**2
    covariance = mean(picture * other) - mean_a * mean_b
    alike = (2 * mean_a * mean_b + SSIM_C1) * (2 * covariance + SSIM_C2)
    largest = (mean_a**2 + mean_b**2 + SSIM_C1) * (var_a + var_b + SSIM_C2)
    return float((alike / largest).mean())


def psnr_db(picture: Tensor, other: Tensor) -> float:
    """Return the peak signal-to-noise ratio of two pictures in [0, 1]; inf where they are the same."""
    error = float((picture.double() - other.double()).square().mean())
    return -10 * math.log10(error) if error else math.inf
