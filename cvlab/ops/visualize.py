"""Parametrizations of images for feature visualization: decorrelated Fourier coefficients and random transforms.

References:
    Olah, Mordvintsev and Schubert, 2017, "Feature Visualization", Distill (preconditioning, transformation
    robustness; the color covariance of ImageNet is the one given there).
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from cvlab.ops import sampling, style

COLOR_COVARIANCE_SQRT = ((0.26, 0.09, 0.02), (0.27, 0.00, -0.05), (0.27, -0.09, 0.03))
MAX_COLOR_NORM = max(math.sqrt(sum(row[k] ** 2 for row in COLOR_COVARIANCE_SQRT)) for k in range(3))
Uniform = Callable[[int], Tensor]  # uniform(n) returns n random numbers in [0, 1)


def spectrum_shape(count: int, size_px: int) -> tuple[int, ...]:
    """Return the shape of the Fourier coefficients of `count` square RGB images: (N, 3, S, S // 2 + 1, 2)."""
    return count, 3, size_px, size_px // 2 + 1, 2


def frequencies(size_px: int) -> Tensor:
    """Return the frequency of each Fourier coefficient in cycles per pixel: (S, S // 2 + 1)."""
    return torch.sqrt(torch.fft.fftfreq(size_px)[:, None] ** 2 + torch.fft.rfftfreq(size_px)[None, :] ** 2)


def spectrum_to_images(spectrum: Tensor, size_px: int, band: float = 1.0, decay: float = 1.0) -> Tensor:
    """Turn Fourier coefficients into images.

    Each coefficient is divided by its frequency to the power `decay`, as in natural images. Colors are mixed by the
    square root of their covariance, then squashed by a sigmoid.

    Args:
        spectrum: (N, 3, S, S // 2 + 1, 2), real and imaginary parts.
        size_px: S.
        band: Frequencies above this share of the largest one are left out.
        decay: Exponent of the frequency.

    Returns:
        images (N, 3, S, S) in [0, 1].
    """
    frequency = frequencies(size_px).to(spectrum.device)
    scale = frequency.clamp(min=1.0 / size_px) ** -decay * (frequency <= band * 0.5 * math.sqrt(2))
    values = torch.fft.irfft2(torch.view_as_complex(spectrum) * scale, s=(size_px, size_px), norm="ortho")
    mixing = torch.tensor(COLOR_COVARIANCE_SQRT, device=spectrum.device) / MAX_COLOR_NORM
    return torch.sigmoid(torch.einsum("nchw,dc->ndhw", values, mixing))


def images_to_spectrum(images: Tensor, decay: float = 1.0) -> Tensor:
    """Return the Fourier coefficients of which `spectrum_to_images` makes these images.

    Args:
        images: (N, 3, S, S) in [0, 1].
        decay: Exponent of the frequency.

    Returns:
        spectrum (N, 3, S, S // 2 + 1, 2).
    """
    size_px = images.shape[-1]
    mixing = torch.tensor(COLOR_COVARIANCE_SQRT, device=images.device) / MAX_COLOR_NORM
    values = torch.einsum("nchw,dc->ndhw", torch.logit(images, eps=1e-2), torch.linalg.inv(mixing))
    scale = frequencies(size_px).to(images.device).clamp(min=1.0 / size_px) ** -decay
    return torch.view_as_real(torch.fft.rfft2(values, norm="ortho") / scale)


def random_affine(
    images: Tensor,
    uniform: Uniform,
    *,
    rotate_degrees: float,
    zoom: float,
    shift: float,
    padding: Tensor | None = None,
) -> Tensor:
    """Rotate, zoom and shift each image at random, bilinear.

    Args:
        images: (N, 3, S, S).
        uniform: Source of random numbers.
        rotate_degrees: The largest angle in either direction.
        zoom: The largest relative change in size; 0.1 is a factor of 0.9 to 1.1.
        shift: The largest shift in either direction, as a share of the side.
        padding: Colors (N, 3) around the images; None: the edges are mirrored.

    Returns:
        images (N, 3, S, S).
    """
    n = len(images)
    u = uniform(4 * n).view(4, n).to(images) * 2 - 1
    angle, factor = u[0] * math.radians(rotate_degrees), 1 + u[1] * zoom
    cos, sin = torch.cos(angle) / factor, torch.sin(angle) / factor
    rows = (torch.stack([cos, -sin, 2 * shift * u[2]], 1), torch.stack([sin, cos, 2 * shift * u[3]], 1))
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    if padding is None:
        return sampling.grid_sample(images, grid, padding_mode="reflection")
    color = padding[:, :, None, None].to(images)
    return sampling.grid_sample(images - color, grid) + color


def saturation_loss(images: Tensor, saturation: float, cell_px: int) -> Tensor:
    """Return how much the colors of images are grayer than a saturation, as a sum over the images.

    Args:
        images: (N, 3, S, S) in [0, 1].
        saturation: Distance from gray, as the length of (Cb, Cr), that a cell should have at least.
        cell_px: Side of the square cells whose mean colors are taken.

    Returns:
        loss, a scalar: for each image between 0, and 1 if it is gray; the mean over its cells.
    """
    cells = F.avg_pool2d(images, min(cell_px, images.shape[-1]))
    distance = (torch.stack([style.chroma(image) for image in cells]).square().sum(1) + 1e-8).sqrt()
    return (1 - distance / saturation).clamp(min=0).square().mean((1, 2)).sum()


def random_roll(images: Tensor, uniform: Uniform, max_px: int) -> Tensor:
    """Roll all images by the same random offset; what leaves on one side enters on the other.

    Args:
        images: (N, 3, H, W).
        uniform: Source of random numbers.
        max_px: The largest offset in either direction, down and across.

    Returns:
        images (N, 3, H, W).
    """
    down, right = (int(x) for x in (uniform(2) * (2 * max_px + 1)).floor() - max_px)
    return torch.roll(images, (down, right), (2, 3))


def color_jitter(images: Tensor, uniform: Uniform, *, gray: float, contrast: float) -> Tensor:
    """Mix each image with its gray version, then weaken its contrast and shift its brightness, all at random.

    Args:
        images: (N, 3, H, W) in [0, 1].
        uniform: Source of random numbers.
        gray: The largest share of the gray version.
        contrast: The largest loss of contrast; brightness moves by up to a quarter of it in either direction.

    Returns:
        images (N, 3, H, W).
    """
    u = uniform(3 * len(images)).view(3, -1, 1, 1, 1).to(images)
    mixed = torch.lerp(images, images.mean(1, keepdim=True), gray * u[0])
    return 0.5 + (mixed - 0.5) * (1 - contrast * u[1]) + contrast * (u[2] - 0.5) / 2


def gaussian_blur(images: Tensor, sigma: float) -> Tensor:
    """Blur images by a Gaussian that is cut off at four standard deviations; edges are repeated.

    Args:
        images: (N, C, H, W).
        sigma: Standard deviation in pixels.

    Returns:
        images (N, C, H, W).
    """
    radius = max(1, math.ceil(4 * sigma))
    offsets = torch.arange(-radius, radius + 1, dtype=images.dtype, device=images.device)
    weights = torch.exp(-0.5 * (offsets / sigma) ** 2)
    weights = weights / weights.sum()
    channels = images.shape[1]
    padded = sampling.pad_edges(images, radius, radius, radius, radius)
    columns = F.conv2d(padded, weights.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)
    return F.conv2d(columns, weights.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)


def multiscale_blur(gradient: Tensor, sigma: float) -> Tensor:
    """Sum up a gradient blurred at three scales, each divided by its standard deviation.

    High frequencies, which dominate the gradient of a network, no longer hide the patterns of lower ones.

    Args:
        gradient: (C, H, W).
        sigma: The middle standard deviation in pixels; the others are half and twice this.

    Returns:
        gradient (C, H, W).
    """
    blurred = [gaussian_blur(gradient[None], factor * sigma)[0] for factor in (0.5, 1.0, 2.0)]
    return torch.stack([one / one.std().clamp(min=1e-30) for one in blurred]).sum(0)


def gram_similarity(features: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Return the cosine of the Gram matrices of pairs of images: 1 for those with the same textures.

    The channels of each image are centered; the means of positive features would make every pair similar.

    Args:
        features: (N, C, H, W).
        first: int64 (P,), the numbers of the first images of the pairs.
        second: int64 (P,), those of the second ones.

    Returns:
        similarity (P,) in [0, 1].
    """
    centered = (features - features.mean((2, 3), keepdim=True)).flatten(2)  # (N, C, H*W)
    gram_matrices = F.normalize((centered @ centered.transpose(1, 2)).flatten(1), dim=1)  # (N, C*C)
    return (gram_matrices[first] * gram_matrices[second]).sum(1)
