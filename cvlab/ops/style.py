"""Losses of neural style transfer, and similarity measures of images.

References:
    Gatys, Ecker and Bethge, 2016, "Image style transfer using convolutional neural networks", section 2 (content and
    style losses).
    Gatys et al., 2017, "Controlling perceptual factors in neural style transfer", sections 4 (regions) and 5 (color).
    Wang et al., 2004, "Image quality assessment: from error visibility to structural similarity", section III-B (SSIM).

Differences from the paper:
    Gram matrices are means over the spatial positions, divided by C, as in EECS 498, so that their size does not
    depend on that of the image.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from cvlab.ops import sampling

LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601
CHROMA_SCALE = (0.5 / (1 - LUMINANCE[2]), 0.5 / (1 - LUMINANCE[0]))  # Cb and Cr of RGB in [0, 1] are in [-0.5, 0.5]
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2


def gram_matrix(features: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the correlations of channels, F F^T / (C * H * W).

    Args:
        features: F, (C, H, W).
        mask: (H, W) in [0, 1], weights of the spatial positions: F diag(mask) F^T / (C * sum of the mask). Its sum
            must not be 0.

    Returns:
        gram (C, C).
    """
    c, h, w = features.shape
    flat = features.flatten(1)  # (C, H*W)
    if mask is None:
        return flat @ flat.T / (c * h * w)
    return (flat * mask.flatten()) @ flat.T / (c * mask.sum())


def content_loss(features: Tensor, target: Tensor) -> Tensor:
    """Return the sum of squared differences of features (C, H, W) and their target (C, H, W), a scalar."""
    return (features - target).square().sum()


def style_loss(features: Tensor, target_gram: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the squared distance of a Gram matrix from its target.

    Args:
        features: (C, H, W).
        target_gram: (C, C).
        mask: (H, W) in [0, 1], as in `gram_matrix`.

    Returns:
        loss, a scalar.
    """
    return (gram_matrix(features, mask) - target_gram).square().sum()


def tv_loss(image: Tensor) -> Tensor:
    """Return the total variation of an image (C, H, W): the sum of squared differences of neighbors, a scalar."""
    return image.diff(dim=2).square().sum() + image.diff(dim=1).square().sum()


def luminance(image: Tensor) -> Tensor:
    """Return the luminance (1, H, W) of an RGB image (3, H, W)."""
    weights = torch.tensor(LUMINANCE, dtype=image.dtype, device=image.device)
    return torch.einsum("chw,c->hw", image, weights)[None]


def chroma(image: Tensor) -> Tensor:
    """Return the chroma Cb, Cr (2, H, W) in [-0.5, 0.5] of an RGB image (3, H, W) in [0, 1] (ITU-R BT.601)."""
    luma = luminance(image)[0]
    return torch.stack([(image[2] - luma) * CHROMA_SCALE[0], (image[0] - luma) * CHROMA_SCALE[1]])


def ycbcr_to_rgb(luminance_map: Tensor, chroma_map: Tensor) -> Tensor:
    """Return the RGB image of a luminance and a chroma of any size.

    Args:
        luminance_map: (1, H, W).
        chroma_map: Cb, Cr, (2, h, w); resized bilinearly if its size is another one.

    Returns:
        image (3, H, W).
    """
    luma = luminance_map[0]
    if chroma_map.shape[1:] != luma.shape:
        chroma_map = sampling.upsample_bilinear(chroma_map[None], (luma.shape[0], luma.shape[1]))[0]
    red = luma + chroma_map[1] / CHROMA_SCALE[1]
    blue = luma + chroma_map[0] / CHROMA_SCALE[0]
    green = (luma - LUMINANCE[0] * red - LUMINANCE[2] * blue) / LUMINANCE[1]
    return torch.stack([red, green, blue])


def transfer_color(luminance_map: Tensor, color_image: Tensor) -> Tensor:
    """Return an image with one image's luminance and the chrominance of another.

    Args:
        luminance_map: (1, H, W) in [0, 1].
        color_image: (3, H, W) in [0, 1].

    Returns:
        image (3, H, W) in [0, 1].
    """
    return (luminance_map + color_image - luminance(color_image)).clamp(0, 1)


def match_mean_std(values: Tensor, reference: Tensor) -> Tensor:
    """Shift and scale values to the mean and standard deviation of others (Gatys et al., 2017, section 5.2).

    Args:
        values: Any shape.
        reference: Any shape.

    Returns:
        The values, of their own shape.
    """
    scale = reference.std() / values.std().clamp(min=1e-6)
    return (values - values.mean()) * scale + reference.mean()


def ssim(image: Tensor, other: Tensor) -> float:
    """Return the structural similarity of two images: 1 for equal ones.

    The window is a Gaussian of 11 pixels with sigma 1.5; the result is the mean over all of its positions within the
    image, and over the channels.

    Args:
        image: (C, H, W) in [0, 1], at least 11 pixels wide and high.
        other: (C, H, W) in [0, 1].

    Returns:
        a number in [-1, 1].
    """
    offsets = torch.arange(SSIM_WINDOW, dtype=image.dtype, device=image.device) - SSIM_WINDOW // 2
    line = torch.exp(-0.5 * (offsets / SSIM_SIGMA) ** 2)
    window = (torch.outer(line, line) / line.sum() ** 2)[None, None]

    def mean(values: Tensor) -> Tensor:
        return F.conv2d(values[:, None], window)  # (C, 1, H-10, W-10)

    mean_a, mean_b = mean(image), mean(other)
    var_a, var_b = mean(image**2) - mean_a**2, mean(other**2) - mean_b**2
    covariance = mean(image * other) - mean_a * mean_b
    numerator = (2 * mean_a * mean_b + SSIM_C1) * (2 * covariance + SSIM_C2)
    denominator = (mean_a**2 + mean_b**2 + SSIM_C1) * (var_a + var_b + SSIM_C2)
    return float((numerator / denominator).mean())


def psnr_db(image: Tensor, other: Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB of two images in [0, 1] of one shape; inf for equal ones."""
    mean_squared_error = float((image.double() - other.double()).square().mean())
    return -10 * math.log10(mean_squared_error) if mean_squared_error else math.inf
