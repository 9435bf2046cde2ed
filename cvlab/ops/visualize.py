"""Pictures that are easy to optimise: as decorrelated Fourier coefficients, seen through small random movements.

Source: Olah, Mordvintsev and Schubert, 2017, "Feature Visualization", Distill (preconditioning, transformation
robustness; the colour covariance is that of ImageNet given there).
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

COLOR_COVARIANCE_SQRT = ((0.26, 0.09, 0.02), (0.27, 0.00, -0.05), (0.27, -0.09, 0.03))  # square root of the covariance
MAX_COLOR_NORM = max(math.sqrt(sum(row[k] ** 2 for row in COLOR_COVARIANCE_SQRT)) for k in range(3))
Uniform = Callable[[int], Tensor]  # of so many numbers in [0, 1)


def spectrum_shape(count: int, size_px: int) -> tuple[int, ...]:
    """Return the shape of the coefficients of `count` square pictures: (N, 3, S, S // 2 + 1, 2)."""
    return count, 3, size_px, size_px // 2 + 1, 2


def frequencies(size_px: int) -> Tensor:
    """Return the frequency of each coefficient in cycles per pixel: (S, S // 2 + 1)."""
    return torch.sqrt(torch.fft.fftfreq(size_px)[:, None] ** 2 + torch.fft.rfftfreq(size_px)[None, :] ** 2)


def spectrum_to_images(spectrum: Tensor, size_px: int, band: float = 1.0, decay: float = 1.0) -> Tensor:
    """Turn coefficients (N, 3, S, S // 2 + 1, 2) into pictures (N, 3, S, S) in [0, 1].

    Each coefficient is divided by its frequency to the power `decay`, as natural pictures have it; those above `band`
    of the largest one are left out. Colours are mixed by the root of their covariance, then squeezed by a sigmoid.
    """
    frequency = frequencies(size_px).to(spectrum.device)
    scale = frequency.clamp(min=1.0 / size_px) ** -decay * (frequency <= band * 0.5 * math.sqrt(2))
    values = torch.fft.irfft2(torch.view_as_complex(spectrum) * scale, s=(size_px, size_px), norm="ortho")
    root = torch.tensor(COLOR_COVARIANCE_SQRT, device=spectrum.device) / MAX_COLOR_NORM
    return torch.sigmoid(torch.einsum("nchw,dc->ndhw", values, root))


def images_to_spectrum(pictures: Tensor, decay: float = 1.0) -> Tensor:
    """Return the coefficients of which `decode` makes these pictures (N, 3, S, S) in [0, 1]."""
    size_px = pictures.shape[-1]
    root = torch.tensor(COLOR_COVARIANCE_SQRT, device=pictures.device) / MAX_COLOR_NORM
    values = torch.einsum("nchw,dc->ndhw", torch.logit(pictures, eps=1e-2), torch.linalg.inv(root))
    scale = frequencies(size_px).to(pictures.device).clamp(min=1.0 / size_px) ** -decay
    return torch.view_as_real(torch.fft.rfft2(values, norm="ortho") / scale)


def random_affine(pictures: Tensor, uniform: Uniform, *, turn_degrees: float, zoom: float, shift: float) -> Tensor:
    """Turn, zoom and shift each picture (N, 3, S, S) at random, each by up to so much; bilinear, edges mirrored.

    `zoom` 0.1 is a factor of 0.9 to 1.1, `shift` a share of the side.
    """
    n = len(pictures)
    u = uniform(4 * n).view(4, n).to(pictures) * 2 - 1
    angle, factor = u[0] * math.radians(turn_degrees), 1 + u[1] * zoom
    cos, sin = torch.cos(angle) / factor, torch.sin(angle) / factor
    rows = (torch.stack([cos, -sin, 2 * shift * u[2]], 1), torch.stack([sin, cos, 2 * shift * u[3]], 1))
    grid = F.affine_grid(torch.stack(rows, 1), list(pictures.shape), align_corners=False)
    return F.grid_sample(pictures, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def random_roll(pictures: Tensor, uniform: Uniform, most_px: int) -> Tensor:
    """Roll all pictures by the same up to `most_px` in both directions, what leaves on one side enters on the other."""
    down, right = (int(x) for x in (uniform(2) * (2 * most_px + 1)).floor() - most_px)
    return torch.roll(pictures, (down, right), (2, 3))


def color_jitter(pictures: Tensor, uniform: Uniform, *, grey: float, contrast: float) -> Tensor:
    """Mix each picture with its grey by up to `grey`, then weaken its contrast and shift its brightness at random.

    Contrast falls by up to `contrast`, brightness moves by up to a quarter of it.
    """
    u = uniform(3 * len(pictures)).view(3, -1, 1, 1, 1).to(pictures)
    mixed = torch.lerp(pictures, pictures.mean(1, keepdim=True), grey * u[0])
    return 0.5 + (mixed - 0.5) * (1 - contrast * u[1]) + contrast * (u[2] - 0.5) / 2


def gaussian_blur(pictures: Tensor, sigma: float) -> Tensor:
    """Blur pictures (N, C, H, W) by a Gaussian of `sigma` pixels, cut off at four of them; edges repeated."""
    reach = max(1, math.ceil(4 * sigma))
    places = torch.arange(-reach, reach + 1, dtype=pictures.dtype, device=pictures.device)
    weights = torch.exp(-0.5 * (places / sigma) ** 2)
    weights = weights / weights.sum()
    channels = pictures.shape[1]
    padded = F.pad(pictures, (reach,) * 4, mode="replicate")
    columns = F.conv2d(padded, weights.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)
    return F.conv2d(columns, weights.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
