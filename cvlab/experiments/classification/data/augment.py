"""Augmentation of training images, batched on the device; a pure function of (seed, epoch, index) for each image."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cvlab.data.rng import uniform

ALTERNATING_FLIP = "alternating"


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
    """

    flip: bool | str = False
    translate_px: int = 0
    cutout_px: int = 0
    crop: tuple[float, float] | None = None

    def __call__(self, images: Tensor, indices: Tensor, seed: int, epoch: int) -> Tensor:
        """Zoom, flip and translate uint8 images (N, H, W, C); `indices` (N,) are their indices in the data set."""
        if self.crop is not None:
            images = self._zoom(images, indices, seed, epoch)
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
        """Set a random square of normalized images (N, C, H, W) to 0, the mean, in place.

        Its position is uniform among those where it lies entirely inside the image.
        """
        if not self.cutout_px:
            return images
        masks = []  # (N, H) and (N, W)
        for size, stream in zip(images.shape[2:], ("cut down", "cut right"), strict=True):
            first = (uniform(seed, epoch, indices, stream) * (size - self.cutout_px + 1)).long()[:, None]  # (N, 1)
            positions = torch.arange(size, device=images.device)
            masks.append((positions >= first) & (positions < first + self.cutout_px))
        rows, columns = masks
        return images.masked_fill_((rows[:, :, None] & columns[:, None, :])[:, None], 0)


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
