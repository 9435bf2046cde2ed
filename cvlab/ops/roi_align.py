"""RoIAlign: crop boxes out of feature maps and resample them to one size, differentiably.

References:
    He et al., 2017, "Mask R-CNN", section 3.

Differences from the paper:
    None in the results. Bilinear sampling and averaging are separable, so that a box is rows @ features @ columns^T
    with two small matrices of weights; nothing loops over boxes.
"""

import torch
from torch import Tensor


def roi_align(
    features: Tensor,
    boxes_xyxy: Tensor,
    image_index: Tensor,
    output_size: int,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 2,
) -> Tensor:
    """Return the features of boxes, as torchvision's `roi_align` with `aligned=True`.

    Gradients flow to the features only, not to the boxes.

    Args:
        features: (N, C, H, W).
        boxes_xyxy: (R, 4) in pixels of the image, or another unit of which one is `spatial_scale` cells.
        image_index: int64 (R,) in [0, N), whose features each box is cropped from.
        output_size: Height and width of the result.
        spatial_scale: Cells of the feature map per unit of the boxes.
        sampling_ratio: Each bin is the mean of `sampling_ratio`^2 points; 0: of as many as there are cells in it.

    Returns:
        (R, C, output_size, output_size).
    """
    n, c, h, w = features.shape
    dtype = torch.promote_types(features.dtype, torch.float32)  # 16 bits would round the boxes by several pixels
    boxes_xyxy = boxes_xyxy.detach().to(dtype)
    start = boxes_xyxy[:, :2] * spatial_scale - 0.5
    sides = boxes_xyxy[:, 2:] * spatial_scale - 0.5 - start
    rows = _weights(start[:, 1], sides[:, 1], output_size, h, sampling_ratio).to(features.dtype)  # (R, output_size, H)
    columns = _weights(start[:, 0], sides[:, 0], output_size, w, sampling_ratio).to(features.dtype)  # (R, ..., W)
    pooled = []
    order = []
    flat = features.permute(0, 2, 3, 1).reshape(n, h, w * c)  # no copy where the features are channels_last
    for k in image_index.unique().tolist():
        of_image = (image_index == k).nonzero()[:, 0]
        down = (rows[of_image].reshape(-1, h) @ flat[k]).view(len(of_image) * output_size, w, c)
        across = columns[of_image].repeat_interleave(output_size, 0)  # (R_k*output_size, output_size, W)
        pooled.append(torch.bmm(across, down).view(len(of_image), output_size, output_size, c))
        order.append(of_image)
    if not pooled:
        return features.new_empty(0, c, output_size, output_size) + 0 * features.sum()
    inverse = torch.argsort(torch.cat(order))
    return torch.cat(pooled)[inverse].permute(0, 3, 1, 2)


def _weights(start: Tensor, side: Tensor, output_size: int, length: int, sampling_ratio: int) -> Tensor:
    """Return the weight of each of `length` cells in each bin along one direction: (R, output_size, length)."""
    count = torch.full_like(side, sampling_ratio) if sampling_ratio else (side / output_size).ceil().clamp(min=1)
    max_count = sampling_ratio or (int(count.max()) if len(count) else 1)
    sample = torch.arange(max_count, dtype=side.dtype, device=side.device)
    offset = (sample + 0.5) / count[:, None]  # (R, max_count): position within a bin, as a share of it
    bins = torch.arange(output_size, dtype=side.dtype, device=side.device)
    bin_side = (side / output_size)[:, None, None]
    position = start[:, None, None] + (bins[:, None] + offset[:, None]) * bin_side  # (R, output_size, max_count)
    is_counted = (sample < count[:, None])[:, None] & (position >= -1) & (position <= length)
    position = position.clamp(0, length - 1)
    cells = torch.arange(length, dtype=side.dtype, device=side.device)
    weights = (1 - (position[..., None] - cells).abs()).clamp(min=0)  # (R, output_size, max_count, length), bilinear
    return (weights * is_counted[..., None]).sum(2) / count[:, None, None]
