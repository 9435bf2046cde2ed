"""Augmentation of training images: a pure function of (seed, epoch, index) for each image, of the step for mixtures.

Zoom, flip, translation and cutout are batched on the device; rotation, color jitter, policies and random erasing are
transforms of torchvision, image by image.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cvlab import _compat
from cvlab.data.rng import hashes, uniform

ALTERNATING_FLIP = "alternating"
POLICIES = {"trivial": "TrivialAugmentWide", "rand": "RandAugment"}  # of torchvision.transforms.v2
HUE_SHARE = 0.1 / 0.4  # of the strength of the color jitter: SimCLR has hue 0.1 or 0.2 at 0.4 or 0.8


@dataclass(frozen=True)
class Augmentation:
    """Random zoom, horizontal flip, translation and cutout.

    Attributes:
        crop: Least and largest area of a random square, as fractions of the image's, which is resized to the image's
            size (Szegedy et al., 2015, section 6, without changes of the aspect ratio).
        flip: False, True (each image with probability 1/2 in every epoch), or "alternating": at random in the first
            epoch, then in turn, so that any two consecutive epochs show both orientations (Jordan, 2024, section 3.6).
        translate_px: Largest translation along each axis, with reflected borders.
        cutout_px: Side of the square that is set to 0 (DeVries and Taylor, 2017).
        rotate: Largest rotation in degrees, with reflected borders.
        color: Strength of random changes of brightness, contrast and saturation; of the hue a quarter of it.
        policy: `trivial` (Mueller and Hutter, 2021) or `rand` (Cubuk et al., 2020, two operations), or None.
        erase: Probability that a random rectangle is set to 0 (Zhong et al., 2020).
        mixup: Parameter of the beta distribution of the weights of two mixed images (Zhang et al., 2018); 0: none.
        cutmix: The same for the area that is replaced by another image's (Yun et al., 2019); 0: none.
    """

    flip: bool | str = False
    translate_px: int = 0
    cutout_px: int = 0
    crop: tuple[float, float] | None = None
    rotate: float = 0.0
    color: float = 0.0
    policy: str | None = None
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        """Import torchvision where it is needed, before the first step is timed."""
        if self.rotate or self.color or self.policy or self.erase:
            _compat.transforms()

    def __call__(self, images: Tensor, indices: Tensor, seed: int, epoch: int) -> Tensor:
        """Change uint8 images (N, H, W, C); `indices` (N,) are their indices in the data set."""
        if self.crop is not None:
            images = self._zoom(images, indices, seed, epoch)
        images = self._flip_and_translate(images, indices, seed, epoch)
        if not (self.rotate or self.color or self.policy):
            return images
        changed = _each(self._transform, images.permute(0, 3, 1, 2), indices, seed, epoch, "transforms")
        return changed.permute(0, 2, 3, 1)

    @functools.cached_property
    def _transform(self) -> Callable[[Tensor], Tensor]:
        """Return rotation, color jitter and policy as one transform of uint8 images (C, H, W)."""
        v2 = _compat.transforms()
        chosen: list[Any] = []
        if self.rotate:
            chosen.append(functools.partial(_rotate, transform=v2.RandomRotation(self.rotate, _bilinear())))
        if self.color:
            hue = min(HUE_SHARE * self.color, 0.5)
            chosen.append(v2.ColorJitter(self.color, self.color, self.color, hue))
        if self.policy is not None:
            chosen.append(getattr(v2, POLICIES[self.policy])(interpolation=_bilinear()))
        return v2.Compose(chosen)  # type: ignore[no-any-return]

    @property
    def has_mixtures(self) -> bool:
        """Whether the images of a batch are mixed, so that their targets are probabilities of classes."""
        return bool(self.mixup or self.cutmix)

    def mix(self, images: Tensor, targets: Tensor, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """Mix each image but the first with the one before it: by mixup or cutmix, at random if both are set.

        Args:
            images: Normalized images (N + 1, C, H, W).
            targets: Their probabilities of classes (N + 1, K).
            seed: Seed of the run.
            step: The step; one weight for the whole batch is drawn from (seed, step).

        Returns:
            Mixed images (N, C, H, W) and targets (N, K).
        """
        draw = np.random.default_rng([seed, step])
        uses_cutmix = self.cutmix > 0 and (self.mixup == 0 or draw.random() < 0.5)
        alpha = self.cutmix if uses_cutmix else self.mixup
        weight = float(draw.beta(alpha, alpha))
        current, previous = images[1:], images[:-1]
        if uses_cutmix:
            rows, columns = (_cut(size, weight, draw.random()) for size in images.shape[2:])
            mixed = current.clone()
            mixed[:, :, rows, columns] = previous[:, :, rows, columns]
            area = (rows.stop - rows.start) * (columns.stop - columns.start)
            weight = 1 - area / (images.shape[2] * images.shape[3])
        else:
            mixed = weight * current + (1 - weight) * previous
        return mixed, weight * targets[1:] + (1 - weight) * targets[:-1]

    def _flip_and_translate(self, images: Tensor, indices: Tensor, seed: int, epoch: int) -> Tensor:
        if not self.flip and not self.translate_px:
            return images
        n, h, w, _ = images.shape
        is_flipped = self._is_flipped(indices, seed, epoch)
        if not self.translate_px:
            return torch.where(is_flipped[:, None, None, None], images.flip(2), images)
        rows = torch.arange(h, device=images.device).expand(n, h)
        columns = torch.arange(w, device=images.device).expand(n, w)
        columns = torch.where(is_flipped[:, None], w - 1 - columns, columns)
        rows = _reflect(rows + self._offset(indices, seed, epoch, "down")[:, None], h)
        columns = _reflect(columns + self._offset(indices, seed, epoch, "right")[:, None], w)
        return images[torch.arange(n, device=images.device)[:, None, None], rows[:, :, None], columns[:, None, :]]

    def _zoom(self, images: Tensor, indices: Tensor, seed: int, epoch: int) -> Tensor:
        """Return a random square of each image, resized to its size, uint8 (N, H, W, C)."""
        assert self.crop is not None
        low, high = self.crop
        side = (low + (high - low) * uniform(seed, epoch, indices, "crop area")).sqrt().float()
        theta = torch.zeros(len(images), 2, 3, device=images.device)
        for axis, stream in enumerate(("crop right", "crop down")):
            theta[:, axis, axis] = side
            theta[:, axis, 2] = (2 * uniform(seed, epoch, indices, stream).float() - 1) * (1 - side)
        pixels = images.permute(0, 3, 1, 2).float()
        grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
        zoomed = F.grid_sample(pixels, grid, padding_mode="reflection", align_corners=False)
        return zoomed.round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1)

    def _is_flipped(self, indices: Tensor, seed: int, epoch: int) -> Tensor:
        if not self.flip:
            return torch.zeros_like(indices, dtype=torch.bool)
        if self.flip == ALTERNATING_FLIP:
            return (uniform(seed, 0, indices, "flip") < 0.5) ^ (epoch % 2 == 1)
        return uniform(seed, epoch, indices, "flip") < 0.5

    def _offset(self, indices: Tensor, seed: int, epoch: int, stream: str) -> Tensor:
        choices = 2 * self.translate_px + 1
        return (uniform(seed, epoch, indices, stream) * choices).long() - self.translate_px

    def cutout(self, images: Tensor, indices: Tensor, seed: int, epoch: int) -> Tensor:
        """Set a random square, or rectangle of `erase`, of normalized images (N, C, H, W) to 0, the mean, in place.

        The position of the square is uniform among those where it lies entirely inside the image.
        """
        if self.erase:
            erasing = _compat.transforms().RandomErasing(self.erase)
            images = _each(erasing, images, indices, seed, epoch, "erase")
        if not self.cutout_px:
            return images
        masks = []  # (N, H) and (N, W)
        for size, stream in zip(images.shape[2:], ("cut down", "cut right"), strict=True):
            first = (uniform(seed, epoch, indices, stream) * (size - self.cutout_px + 1)).long()[:, None]  # (N, 1)
            positions = torch.arange(size, device=images.device)
            masks.append((positions >= first) & (positions < first + self.cutout_px))
        rows, columns = masks
        return images.masked_fill_((rows[:, :, None] & columns[:, None, :])[:, None], 0)


def _bilinear() -> Any:
    return _compat.transforms().InterpolationMode.BILINEAR


def _rotate(image: Tensor, transform: Callable[[Tensor], Tensor]) -> Tensor:
    """Rotate an image (C, H, W) with reflected borders: padded by half its size, rotated, cropped."""
    h, w = image.shape[1:]
    top, left = h // 2, w // 2
    padded = F.pad(image[None].float(), (left, left, top, top), "reflect")[0].to(image.dtype)
    return transform(padded)[:, top : top + h, left : left + w]


def _each(
    transform: Callable[[Tensor], Tensor], images: Tensor, indices: Tensor, seed: int, epoch: int, stream: str
) -> Tensor:
    """Apply a random transform of torchvision to each image, with a generator seeded by (seed, epoch, index)."""
    state = torch.random.get_rng_state()
    outputs = []
    for image, number in zip(images, hashes(seed, epoch, indices, stream).tolist(), strict=True):
        torch.default_generator.manual_seed(number)
        outputs.append(transform(image))
    torch.random.set_rng_state(state)
    return torch.stack(outputs)


def _cut(size: int, weight: float, position: float) -> slice:
    """Return the part of an axis that cutmix replaces, sqrt(1 - weight) of it, clipped at the borders."""
    half, center = size * (1 - weight) ** 0.5 / 2, position * size
    return slice(max(0, round(center - half)), min(size, round(center + half)))


def _reflect(positions: Tensor, size: int) -> Tensor:
    """Reflect positions outside 0..size-1 back inside, without repeating the border pixel."""
    reflected = positions.abs()
    return torch.where(reflected >= size, 2 * (size - 1) - reflected, reflected)


def tta_views(images: Tensor, kind: str) -> list[tuple[float, Tensor]]:
    """Return the views whose logits test-time augmentation averages.

    Args:
        images: Normalized images (N, C, H, W).
        kind: `flip`: the images and their mirror images. `flip_shift`: these, and both translated by one pixel towards
            two opposite corners with reflected borders, each translation with half the weight (Jordan, 2024, section
            3.5).

    Returns:
        Pairs of weight and images (N, C, H, W); the weights sum to 1.
    """
    if kind == "flip":
        return [(0.5, images), (0.5, images.flip(3))]
    h, w = images.shape[2:]
    padded = F.pad(images, (1, 1, 1, 1), "reflect")
    shifted = [padded[:, :, :h, :w], padded[:, :, 2:, 2:]]
    pairs = [(0.5, images), (0.25, shifted[0]), (0.25, shifted[1])]
    return [(weight / 2, view) for weight, shift in pairs for view in (shift, shift.flip(3))]
