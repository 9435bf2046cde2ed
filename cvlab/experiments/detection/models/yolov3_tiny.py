"""The original YOLOv3-tiny: the 80 classes of COCO, at 416 pixels in some ten milliseconds per photo on two cores.

References: Redmon and Farhadi, 2018, "YOLOv3: An incremental improvement"; darknet's `yolov3-tiny.cfg` and its weights,
downloaded by `cvlab models fetch yolov3_tiny` (33.1 mAP@0.5 on COCO). Differences from the published file: the fine
head uses anchors 1, 2, 3, with which these weights were trained, not 0, 1, 2; photos are downsampled with antialiasing.
"""

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from cvlab.data import photos
from cvlab.errors import ConfigError, DataError
from cvlab.experiments.detection.models import darknet
from cvlab.experiments.detection.models.darknet import ConvSpec
from cvlab.models import weights

NAME = "yolov3_tiny"
# The classes of COCO (Lin et al., 2014) in the order and spelling of darknet: those that VOC has too, as in VOC.
# fmt: off
COCO_CLASSES = (
    "person", "bicycle", "car", "motorbike", "aeroplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "sofa", "pottedplant", "bed", "diningtable", "toilet",
    "tvmonitor", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave", "oven", "toaster", "sink",
    "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)
# fmt: on
SIZE_PX = 416
STRIDE = 32  # of the coarse head: sides are multiples of it
ANCHORS = ((10, 14), (23, 27), (37, 58), (81, 82), (135, 169), (344, 319))  # width, height in pixels
HEADS = ((32, (3, 4, 5)), (16, (1, 2, 3)))  # stride and anchor indices of each
DARKNET_NAMES = {  # of the classes that COCO's own files call otherwise
    "motorcycle": "motorbike",
    "airplane": "aeroplane",
    "couch": "sofa",
    "potted plant": "pottedplant",
    "dining table": "diningtable",
    "tv": "tvmonitor",
}
VALUES_PER_ANCHOR = 5 + len(COCO_CLASSES)  # x, y, width, height, objectness, class logits
HEAD_CHANNELS = 3 * VALUES_PER_ANCHOR
MAX_LOG_SCALE = 10.0  # e^10 anchors: larger than any photo, and far from overflow
GRAY = 0.5  # around a letterboxed photo
HINT = f"`cvlab models fetch {NAME}` downloads the right file"
CONVS = (  # in the order of the file; the numbers are those of the layers in yolov3-tiny.cfg
    ConvSpec("conv0", 3, 16, 3),
    ConvSpec("conv2", 16, 32, 3),
    ConvSpec("conv4", 32, 64, 3),
    ConvSpec("conv6", 64, 128, 3),
    ConvSpec("conv8", 128, 256, 3),
    ConvSpec("conv10", 256, 512, 3),
    ConvSpec("conv12", 512, 1024, 3),
    ConvSpec("conv13", 1024, 256, 1),
    ConvSpec("conv14", 256, 512, 3),
    ConvSpec("conv15", 512, HEAD_CHANNELS, 1, has_norm=False),
    ConvSpec("conv18", 256, 128, 1),
    ConvSpec("conv21", 384, 256, 3),
    ConvSpec("conv22", 256, HEAD_CHANNELS, 1, has_norm=False),
)

Detections = tuple[Tensor, Tensor, Tensor]  # boxes_xyxy (n, 4) in pixels, scores (n,) in [0, 1], labels int64 (n,)


class YoloV3Tiny(nn.Module):
    """The network with its batch norms folded into the convolutions."""

    def __init__(self) -> None:
        super().__init__()
        for conv in CONVS:
            padding = conv.kernel_size // 2
            self.add_module(
                conv.name, nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, padding=padding)
            )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the heads' raw maps (N, 255, H/32, W/32), (N, 255, H/16, W/16) of images (N, 3, H, W) in [0, 1]."""
        x = images
        for name in ("conv0", "conv2", "conv4", "conv6"):
            x = _leaky(F.max_pool2d(self._conv(name, x), 2))  # pooling first gives the same values with less work
        fine = _leaky(self._conv("conv8", x))  # (N, 256, H/16, W/16)
        x = self._conv("conv10", F.max_pool2d(fine, 2))  # (N, 512, H/32, W/32)
        x = _leaky(F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=float("-inf")), 2, stride=1))  # right and bottom
        x = _leaky(self._conv("conv12", x))
        x = _leaky(self._conv("conv13", x))  # (N, 256, H/32, W/32)
        coarse_map = self._conv("conv15", _leaky(self._conv("conv14", x)))
        up = F.interpolate(_leaky(self._conv("conv18", x)), scale_factor=2, mode="nearest")  # (N, 128, H/16, W/16)
        x = _leaky(self._conv("conv21", torch.cat([up, fine], 1)))  # (N, 384, H/16, W/16) in
        return coarse_map, self._conv("conv22", x)

    def _conv(self, name: str, x: Tensor) -> Tensor:
        output: Tensor = self.get_submodule(name)(x)
        return output


def _leaky(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.1, inplace=True)


def build(weights_file: str | None = None, device: torch.device | str = "cpu") -> YoloV3Tiny:
    """Build the model with its weights, frozen and in evaluation mode. DataError if they are missing or damaged."""
    path = weights.find_pinned(NAME, weights_file)
    model = YoloV3Tiny().eval().requires_grad_(False)
    state = darknet.fold_batch_norms(darknet.read_darknet(path, CONVS, HINT), CONVS)
    if not all(bool(torch.isfinite(tensor).all()) for tensor in state.values()):
        raise DataError(f"{path}: a variance is negative", HINT)
    model.load_state_dict(state)
    return model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def decode(raw_map: Tensor, stride: int, anchors: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Return boxes_xyxy (N, P, 4) in pixels, objectness (N, P) in [0, 1] and class logits (N, P, 80) of a head.

    `raw_map` is the head's (N, 255, h, w); P = 3*h*w, anchor by anchor, row by row.
    """
    n, _, h, w = raw_map.shape
    values = raw_map.float().view(n, len(anchors), VALUES_PER_ANCHOR, h, w).permute(0, 1, 3, 4, 2)  # (N, 3, h, w, 85)
    rows, columns = (torch.arange(side, device=raw_map.device) for side in (h, w))
    cells = torch.stack([columns.expand(h, w), rows[:, None].expand(h, w)], 2)  # (h, w, 2): x, y
    anchor_sides = torch.tensor([ANCHORS[k] for k in anchors], device=raw_map.device).view(1, -1, 1, 1, 2)
    centers = (values[..., :2].sigmoid() + cells) * stride
    halves = anchor_sides * values[..., 2:4].clamp(max=MAX_LOG_SCALE).exp() / 2
    boxes_xyxy = torch.cat([centers - halves, centers + halves], -1)
    return boxes_xyxy.flatten(1, 3), values[..., 4].sigmoid().flatten(1), values[..., 5:].flatten(1, 3)


@torch.inference_mode()
def detect(model: YoloV3Tiny, images: Tensor, score_threshold: float) -> list[Detections]:
    """Return the detections in images (N, 3, S, S) in [0, 1] with scores above the threshold, before NMS.

    A score is objectness times class probability; a box is returned once for each class above the threshold. Boxes are
    in pixels of `images` and may reach beyond them.
    """
    require_size(images.shape[-1])
    maps = model(images.contiguous(memory_format=torch.channels_last))
    heads = [decode(raw, stride, anchors) for raw, (stride, anchors) in zip(maps, HEADS, strict=True)]
    boxes_xyxy, objectness, class_logits = (torch.cat(parts, 1) for parts in zip(*heads, strict=True))
    results = []
    for image_boxes, image_objectness, logits in zip(boxes_xyxy, objectness, class_logits, strict=True):
        candidate = (image_objectness > score_threshold).nonzero().squeeze(1)  # an upper bound of every score
        scores = image_objectness[candidate, None] * logits[candidate].sigmoid()  # (candidates, 80)
        row, label = (scores > score_threshold).nonzero(as_tuple=True)
        results.append((image_boxes[candidate[row]], scores[row, label], label))
    return results


def require_size(size_px: int) -> None:
    """Raise ConfigError unless the heads' cells tile a square of `size_px` pixels."""
    if size_px < STRIDE or size_px % STRIDE:
        nearest = max(STRIDE, round(size_px / STRIDE) * STRIDE)
        raise ConfigError(f"{NAME}: {size_px} pixels is not a multiple of {STRIDE}", f"{nearest} is the nearest")


def letterbox(image: Image.Image, size_px: int = SIZE_PX) -> tuple[Tensor, float, int, int]:
    """Fit an RGB photo into a gray square, aspect ratio kept.

    As in darknet the sides are cut to whole pixels; the fraction of a pixel that one side then lacks is cropped at its
    end, so that both have the same scale.

    Returns:
        The square (3, size_px, size_px) in [0, 1], the scale, and the left and top margins: a point x, y of the photo
        is at x * scale + left, y * scale + top.
    """
    require_size(size_px)
    width, height = image.size
    scale = size_px / max(width, height)
    w, h = (max(1, side * size_px // max(width, height)) for side in (width, height))
    source_box = (0.0, 0.0, min(width, w / scale), min(height, h / scale))
    resized = photos.to_tensor(image.resize((w, h), Image.Resampling.BILINEAR, box=source_box))
    left, top = (size_px - w) // 2, (size_px - h) // 2
    square = torch.full((3, size_px, size_px), GRAY)
    square[:, top : top + h, left : left + w] = resized
    return square, scale, left, top


def unletterbox(boxes_xyxy: Tensor, scale: float, left: int, top: int) -> Tensor:
    """Return boxes (n, 4) of a letterboxed photo in pixels of the photo."""
    return (boxes_xyxy - boxes_xyxy.new_tensor([left, top, left, top])) / scale
