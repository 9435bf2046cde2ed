"""Random changes of training images, on the device, a batch at once; each a pure function of (seed, epoch, index)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cvlab.data.rng import uniform

ALTERNATING = "alternating"


@dataclass(frozen=True)
class Augmentation:
    """A flip, a shift of at most `translate_px` with mirrored borders, a square of `cutout_px` blanked out.

    `flip` is False, True (each image with probability 1/2 in every epoch), or "alternating": at random in the first
    epoch, then in turn, so that two epochs always show both sides (Jordan, 2024, section 3.6).
    """

    flip: bool | str = False
    translate_px: int = 0
    cutout_px: int = 0

    def __call__(self, images: Tensor, indices: Tensor, seed: int, epoch: int) -> Tensor:
        """Flip and shift images (N, H, W, C); what happens to one depends on seed, epoch and its index only."""
        if not self.flip and not self.translate_px:
            return images
        n, h, w, _ = images.shape
        flipped = self._flipped(indices, seed, epoch)
        if not self.translate_px:
            return torch.where(flipped[:, None, None, None], images.flip(2), images)
        rows = torch.arange(h, device=images.device).expand(n, h)
        columns = torch.arange(w, device=images.device).expand(n, w)
        columns = torch.where(flipped[:, None], w - 1 - columns, columns)
        rows = _mirrored(rows + self._offset(indices, seed, epoch, "down")[:, None], h)
        columns = _mirrored(columns + self._offset(indices, seed, epoch, "right")[:, None], w)
        return images[torch.arange(n, device=images.device)[:, None, None], rows[:, :, None], columns[:, None, :]]

    def _flipped(self, indices: Tensor, seed: int, epoch: int) -> Tensor:
        if not self.flip:
            return torch.zeros_like(indices, dtype=torch.bool)
        if self.flip == ALTERNATING:
            return (uniform(seed, 0, indices, "flip") < 0.5) ^ (epoch % 2 == 1)
        return uniform(seed, epoch, indices, "flip") < 0.5

    def _offset(self, indices: Tensor, seed: int, epoch: int, stream: str) -> Tensor:
        choices = 2 * self.translate_px + 1
        return (uniform(seed, epoch, indices, stream) * choices).long() - self.translate_px

    def cut(self, images: Tensor, indices: Tensor, seed: int, epoch: int) -> Tensor:
        """Set a square of normalised images (N, C, H, W) to 0, their mean, in place (DeVries and Taylor, 2017).

        Its place is uniform among those where it lies wholly inside.
        """
        if not self.cutout_px:
            return images
        inside = []
        for size, stream in zip(images.shape[2:], ("cut down", "cut right"), strict=True):
            first = (uniform(seed, epoch, indices, stream) * (size - self.cutout_px + 1)).long()[:, None]  # (N, 1)
            places = torch.arange(size, device=images.device)
            inside.append((places >= first) & (places < first + self.cutout_px))  # (N, size)
        rows, columns = inside
        return images.masked_fill_((rows[:, :, None] & columns[:, None, :])[:, None], 0)


def _mirrored(positions: Tensor, size: int) -> Tensor:
    """Fold positions outside 0..size-1 back in, without repeating the border."""
    inside = positions.abs()
    return torch.where(inside >= size, 2 * (size - 1) - inside, inside)


def views(images: Tensor, kind: str) -> list[tuple[float, Tensor]]:
    """Return the views that test-time augmentation averages the scores of: (weight, images (N, C, H, W)), sum 1.

    `flip`: the images and their mirror images. `flip_shift`: these, and both shifted by one pixel towards two opposite
    corners with mirrored borders, each shift with half the weight (Jordan, 2024, section 3.5).
    """
    if kind == "flip":
        return [(0.5, images), (0.5, images.flip(3))]
    h, w = images.shape[2:]
    padded = F.pad(images, (1, 1, 1, 1), "reflect")
    shifted = [padded[:, :, :h, :w], padded[:, :, 2:, 2:]]
    pairs = [(0.5, images), (0.25, shifted[0]), (0.25, shifted[1])]
    return [(weight / 2, view) for weight, one in pairs for view in (one, one.flip(3))]
