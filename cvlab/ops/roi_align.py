"""Cut boxes out of maps and resize them to one size, differentiably: RoIAlign.

Paper: He et al., 2017, "Mask R-CNN", section 3. Differs: bilinear samples and their means are separable, so that a box
is rows @ map @ columns^T with two small matrices of weights; nothing loops over boxes.
"""

import torch
from torch import Tensor


def roi_align(
    maps: Tensor, boxes_xyxy: Tensor, image: Tensor, size: int, scale: float = 1.0, samples: int = 2
) -> Tensor:
    """Return the boxes' parts of maps (N, C, H, W): (R, C, size, size).

    boxes_xyxy: (R, 4), in units of which one is `scale` cells; `image`: int64 (R,), whose map each box is cut from.
    Each of the size x size bins is the mean of samples x samples points, or, where `samples` is 0, of as many as there
    are cells in it. Cells are where their middles are (torchvision's `aligned=True`). Gradients go to the maps only.
    """
    n, c, h, w = maps.shape
    boxes_xyxy = boxes_xyxy.detach().to(maps.dtype)
    start = boxes_xyxy[:, :2] * scale - 0.5
    sides = boxes_xyxy[:, 2:] * scale - 0.5 - start
    rows = _weights(start[:, 1], sides[:, 1], size, h, samples)  # (R, size, H)
    columns = _weights(start[:, 0], sides[:, 0], size, w, samples)  # (R, size, W)
    pieces = []
    order = []
    lines = maps.permute(0, 2, 3, 1).reshape(n, h, w * c)  # no copy where the maps are channels_last
    for k in image.unique().tolist():
        own = (image == k).nonzero()[:, 0]
        down = (rows[own].reshape(-1, h) @ lines[k]).view(len(own) * size, w, c)
        across = columns[own].repeat_interleave(size, 0)  # (R_k*size, size, W)
        pieces.append(torch.bmm(across, down).view(len(own), size, size, c))
        order.append(own)
    if not pieces:
        return maps.new_empty(0, c, size, size) + 0 * maps.sum()
    back = torch.argsort(torch.cat(order))
    return torch.cat(pieces)[back].permute(0, 3, 1, 2)


def _weights(start: Tensor, side: Tensor, size: int, length: int, samples: int) -> Tensor:
    """Return how much of each of `length` cells goes into each bin along one direction: (R, size, length)."""
    count = torch.full_like(side, samples) if samples else (side / size).ceil().clamp(min=1)
    most = samples or (int(count.max()) if len(count) else 1)
    step = torch.arange(most, dtype=side.dtype, device=side.device)
    inside = (step + 0.5) / count[:, None]  # (R, most): places in a bin, as a share of it
    bins = torch.arange(size, dtype=side.dtype, device=side.device)
    place = start[:, None, None] + (bins[:, None] + inside[:, None]) * (side / size)[:, None, None]  # (R, size, most)
    counts = (step < count[:, None])[:, None] & (place >= -1) & (place <= length)
    place = place.clamp(0, length - 1)
    low = place.floor().long().clamp(max=max(length - 2, 0))
    share = place - low
    made = side.new_zeros(len(side), size, length)
    made.scatter_add_(2, low, (1 - share) * counts)
    made.scatter_add_(2, (low + 1).clamp(max=length - 1), share * counts)
    return made / count[:, None, None]
