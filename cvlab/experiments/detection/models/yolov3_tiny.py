"""The original YOLOv3-tiny: 80 classes of COCO in a photo, at 416 pixels in a few ten milliseconds on two cores.

Paper: Redmon and Farhadi, 2018, "YOLOv3: An incremental improvement"; darknet's `yolov3-tiny.cfg` and its weights,
fetched by `cvlab models fetch yolov3_tiny` (33.1 mAP@0.5 on COCO). Differs: the fine head takes anchors 1, 2, 3, with
which these weights were trained, and not 0, 1, 2, as the usual file says; photos are made smaller without aliases.
"""

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from cvlab.data import photos
from cvlab.errors import ConfigError, DataError
from cvlab.experiments.detection.data.coco_classes import COCO_CLASSES
from cvlab.experiments.detection.models import darknet
from cvlab.experiments.detection.models.darknet import Conv
from cvlab.models import weights

NAME = "yolov3_tiny"
SIZE_PX = 416
STRIDE = 32  # of the coarse head: sides are multiples of it
ANCHORS = ((10, 14), (23, 27), (37, 58), (81, 82), (135, 169), (344, 319))  # width, height in pixels
HEADS = ((32, (3, 4, 5)), (16, (1, 2, 3)))  # stride and anchors of each
VALUES = 5 + len(COCO_CLASSES)  # x, y, width, height, objectness, classes
OUTPUTS = 3 * VALUES
MOST_GROWTH = 10.0  # e^10 anchors: more than any photo has, and far from overflow
GREY = 0.5
HINT = f"`cvlab models fetch {NAME}` gets the right file"
CONVS = (  # in the order of the file; the numbers are those of the layers in yolov3-tiny.cfg
    Conv("conv0", 3, 16, 3),
    Conv("conv2", 16, 32, 3),
    Conv("conv4", 32, 64, 3),
    Conv("conv6", 64, 128, 3),
    Conv("conv8", 128, 256, 3),
    Conv("conv10", 256, 512, 3),
    Conv("conv12", 512, 1024, 3),
    Conv("conv13", 1024, 256, 1),
    Conv("conv14", 256, 512, 3),
    Conv("conv15", 512, OUTPUTS, 1, has_norm=False),
    Conv("conv18", 256, 128, 1),
    Conv("conv21", 384, 256, 3),
    Conv("conv22", 256, OUTPUTS, 1, has_norm=False),
)

Detections = tuple[Tensor, Tensor, Tensor]  # boxes_xyxy (n, 4) in pixels, scores (n,) in [0, 1], labels int64 (n,)


class YoloV3Tiny(nn.Module):
    """The convolutions with their normalisations folded in: photos in, the maps of both heads out."""

    def __init__(self) -> None:
        super().__init__()
        for conv in CONVS:
            self.add_module(conv.name, nn.Conv2d(conv.inside, conv.outside, conv.size, padding=conv.size // 2))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the maps (N, 255, H/32, W/32) and (N, 255, H/16, W/16) of photos (N, 3, H, W) in [0, 1]."""
        x = images
        for name in ("conv0", "conv2", "conv4", "conv6"):
            x = _leaky(F.max_pool2d(self._conv(name, x), 2))  # pooled first: the same numbers from a quarter of them
        fine = _leaky(self._conv("conv8", x))  # (N, 256, H/16, W/16)
        x = self._conv("conv10", F.max_pool2d(fine, 2))  # (N, 512, H/32, W/32)
        x = _leaky(F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=float("-inf")), 2, stride=1))  # padded right and below
        x = _leaky(self._conv("conv12", x))
        x = _leaky(self._conv("conv13", x))  # (N, 256, H/32, W/32)
        coarse_map = self._conv("conv15", _leaky(self._conv("conv14", x)))
        up = F.interpolate(_leaky(self._conv("conv18", x)), scale_factor=2, mode="nearest")  # (N, 128, H/16, W/16)
        x = _leaky(self._conv("conv21", torch.cat([up, fine], 1)))  # (N, 384, H/16, W/16) in
        return coarse_map, self._conv("conv22", x)

    def _conv(self, name: str, x: Tensor) -> Tensor:
        made: Tensor = self.get_submodule(name)(x)
        return made


def _leaky(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.1, inplace=True)


def build(weights_file: str | None = None, device: torch.device | str = "cpu") -> YoloV3Tiny:
    """Build the net with its weights, frozen and in evaluation mode; DataError where they are not there or damaged."""
    path = weights.find_pinned(NAME, weights_file)
    raw = darknet.read_darknet(path, CONVS, HINT)
    net = YoloV3Tiny().eval().requires_grad_(False)
    state = darknet.folded(raw, CONVS)
    if not all(bool(torch.isfinite(tensor).all()) for tensor in state.values()):
        raise DataError(f"{path}: a variance is negative", HINT)
    net.load_state_dict(state)
    made: YoloV3Tiny = net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return made


def decode(raw_map: Tensor, stride: int, anchors: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Return boxes_xyxy (N, P, 4) in pixels, objectness (N, P) and class scores (N, P, 80), not yet probabilities.

    `raw_map` is a head's (N, 255, h, w); P = 3*h*w, anchor by anchor, row by row. The objectness is in [0, 1].
    """
    n, _, h, w = raw_map.shape
    values = raw_map.float().view(n, len(anchors), VALUES, h, w).permute(0, 1, 3, 4, 2)  # (N, 3, h, w, 85)
    rows, columns = (torch.arange(side, device=raw_map.device) for side in (h, w))
    cells = torch.stack([columns.expand(h, w), rows[:, None].expand(h, w)], 2)  # (h, w, 2): x, y
    sizes = torch.tensor([ANCHORS[k] for k in anchors], device=raw_map.device).view(1, -1, 1, 1, 2)
    centres = (values[..., :2].sigmoid() + cells) * stride
    halves = sizes * values[..., 2:4].clamp(max=MOST_GROWTH).exp() / 2
    boxes_xyxy = torch.cat([centres - halves, centres + halves], -1)
    return boxes_xyxy.flatten(1, 3), values[..., 4].sigmoid().flatten(1), values[..., 5:].flatten(1, 3)


@torch.inference_mode()
def detect(net: YoloV3Tiny, images: Tensor, score_floor: float) -> list[Detections]:
    """Return what is found in photos (N, 3, S, S) in [0, 1] with scores over the floor, doubles not yet left out.

    A score is objectness times the class's probability; a box comes once for each class that is over the floor. Boxes
    are in pixels of `images` and may reach beyond them.
    """
    require_size(images.shape[-1])
    maps = net(images.contiguous(memory_format=torch.channels_last))
    heads = [decode(raw, stride, anchors) for raw, (stride, anchors) in zip(maps, HEADS, strict=True)]
    boxes_xyxy, objectness, classes = (torch.cat(parts, 1) for parts in zip(*heads, strict=True))
    results = []
    for box, sure, score in zip(boxes_xyxy, objectness, classes, strict=True):
        likely = (sure > score_floor).nonzero().squeeze(1)  # a score is never more than its objectness
        scores = sure[likely, None] * score[likely].sigmoid()  # (likely, 80)
        place, label = (scores > score_floor).nonzero(as_tuple=True)
        results.append((box[likely[place]], scores[place, label], label))
    return results


def require_size(size_px: int) -> None:
    """Raise ConfigError unless the heads' cells tile a square of `size_px` pixels."""
    if size_px < STRIDE or size_px % STRIDE:
        near = max(STRIDE, round(size_px / STRIDE) * STRIDE)
        raise ConfigError(f"{NAME}: {size_px} pixels is not a multiple of {STRIDE}", f"{near} is the nearest")


def letterbox(image: Image.Image, size_px: int = SIZE_PX) -> tuple[Tensor, float, int, int]:
    """Fit an RGB photo into a grey square (3, size_px, size_px) in [0, 1]; return it, the scale, and its left and top.

    A point x, y of the photo comes to x * scale + left, y * scale + top. As in darknet the sides are cut to whole
    pixels; what one of them then lacks, less than a pixel, is left out at the end so that both have the same scale.
    """
    require_size(size_px)
    width, height = image.size
    scale = size_px / max(width, height)
    w, h = (max(1, side * size_px // max(width, height)) for side in (width, height))
    part = (0.0, 0.0, min(width, w / scale), min(height, h / scale))
    resized = photos.to_tensor(image.resize((w, h), Image.Resampling.BILINEAR, box=part))
    left, top = (size_px - w) // 2, (size_px - h) // 2
    made = torch.full((3, size_px, size_px), GREY)
    made[:, top : top + h, left : left + w] = resized
    return made, scale, left, top


def unletterbox(boxes_xyxy: Tensor, scale: float, left: int, top: int) -> Tensor:
    """Return boxes (n, 4) in pixels of the photo from those in pixels of its letterbox."""
    return (boxes_xyxy - boxes_xyxy.new_tensor([left, top, left, top])) / scale
