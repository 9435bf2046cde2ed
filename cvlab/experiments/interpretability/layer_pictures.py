"""Pictures of a network's layers: first filters, histograms of weights and gradients, grids of channels."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor, nn

from cvlab.models import activations
from cvlab.models.pretrained import PretrainedClassifier
from cvlab.reports import colors, fonts, images

MAX_FILTERS = 256
MAX_GRAY_FILTERS, MAX_GRAY_CHANNELS = 16, 16  # of filters that are no pictures of pixels
MAX_MATRIX = 512  # rows and columns
GRID_PX = 640  # about the width of a grid
MAX_HISTOGRAMS = 24
HISTOGRAM_COLUMNS, HISTOGRAM_PX, BINS, BAR_PX, SMALL_PX = 4, 90, 60, 4, 13
MAX_SAMPLED = 200_000  # values of a histogram
RANGE_QUANTILE = 0.999  # of the absolute values


def inner_network(model: PretrainedClassifier) -> nn.Module:
    """Return the network as its run trains it: without the conversion of photos to the gray that it takes."""
    network = model.module.model
    inner = getattr(network, "model", None)
    return inner if isinstance(inner, nn.Module) and model.module.scale.shape[1] == 1 else network


@dataclass(frozen=True)
class FirstLayer:
    """The first layer with weights that a network computes.

    Attributes:
        name: Name of its module, or of the parameter.
        weight: Its weight.
        takes_pixels: Whether its inputs are all values of the image in their order.
        image_shape: Shape (C, S, S) of an image as the network takes it.
    """

    name: str
    weight: Tensor
    takes_pixels: bool
    image_shape: tuple[int, ...]


@torch.inference_mode()
def find_first_layer(network: nn.Module, forward: nn.Module, inputs: Tensor) -> FirstLayer | None:
    """Return the first layer with weights of a network, which `forward` calls; None if it has no weights.

    Args:
        network: The network.
        forward: What takes `inputs`.
        inputs: (1, C, S, S).
    """
    calls: list[tuple[str, Tensor, Tensor]] = []
    image: list[Tensor] = []

    def record(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[object, ...]) -> None:
            weight = getattr(module, "weight", None)
            first = args[0] if args else None
            if not isinstance(first, Tensor):
                return
            if module is network and not image:
                image.append(first.clone())  # what follows may work in place
            if not calls and isinstance(weight, Tensor) and weight.ndim > 1:
                calls.append((name, weight, first.clone()))

        return hook

    handles = [module.register_forward_pre_hook(record(name)) for name, module in network.named_modules()]
    try:
        forward(inputs)
    finally:
        for handle in handles:
            handle.remove()
    shape = tuple(image[0].shape[1:]) if image else tuple(inputs.shape[1:])
    if calls:
        name, weight, layer_input = calls[0]
        same = bool(image) and layer_input.numel() == image[0].numel()
        takes_pixels = same and layer_input.flatten().equal(image[0].flatten())
        return FirstLayer(name or type(network).__name__, weight.detach(), takes_pixels, shape)
    for name, parameter in network.named_parameters():  # weights that are used by functions, not by modules
        if parameter.ndim > 1:
            return FirstLayer(name, parameter.detach(), False, shape)
    return None


def draw_filters(layer: FirstLayer) -> tuple[Image.Image | None, str]:
    """Return a picture of the first layer's weights and what it shows; None with the reason if there is none."""
    weight, count = layer.weight.float().cpu(), layer.weight.shape[0]
    shown = f"{min(count, MAX_FILTERS)} of {count}" if count > MAX_FILTERS else str(count)
    is_template = weight.ndim == 2 and layer.takes_pixels and weight.shape[1] == math.prod(layer.image_shape)
    if is_template:
        weight = weight.view(count, *layer.image_shape)
    if weight.ndim == 4 and weight.shape[1] in (1, 3):
        size = " x ".join(map(str, weight.shape[2:]))
        kind = "templates" if is_template else "filters"
        return _grid([_filter_picture(w) for w in weight[:MAX_FILTERS]]), (
            f"{layer.name}: {shown} {kind} of {size} pixels, each scaled by its largest weight; gray is 0"
        )
    if weight.ndim == 4:
        rows = weight[:MAX_GRAY_FILTERS, :MAX_GRAY_CHANNELS]
        scale = rows.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-30)
        tiles = [images.signed(w) for w in (rows / scale).flatten(0, 1)]
        return _grid(tiles, rows.shape[1]), (
            f"{layer.name} takes {weight.shape[1]} channels, which are no colors: a row for each of "
            f"{len(rows)} of {count} filters, a column for each of {rows.shape[1]} channels; red is positive"
        )
    if weight.ndim == 2:
        part = weight[:MAX_MATRIX, :MAX_MATRIX]
        picture = images.signed(part / part.abs().max().clamp(min=1e-30))
        factor = max(1, GRID_PX // max(picture.size))
        scaled = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
        return scaled, (
            f"{layer.name} does not take the pixels as they are: its matrix, {part.shape[0]} of {count} outputs by "
            f"{part.shape[1]} of {weight.shape[1]} inputs; red is positive"
        )
    return None, f"no picture of the first weights, {layer.name}, of shape {tuple(weight.shape)}"


def _filter_picture(weight: Tensor) -> Image.Image:
    """Return a filter (C, H, W) of one or three channels in gray or color; gray is 0."""
    values = 0.5 + 0.5 * weight / weight.abs().max().clamp(min=1e-30)
    pixels = (values * 255).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).convert("RGB")


def _grid(tiles: list[Image.Image], columns: int | None = None) -> Image.Image:
    """Arrange small pictures of one size, enlarged by a whole number, in a grid with gaps."""
    columns = columns or math.ceil(math.sqrt(len(tiles)))
    factor = max(1, round(GRID_PX / columns / tiles[0].width))
    size = (tiles[0].width * factor, tiles[0].height * factor)
    scaled = [ImageOps.expand(tile.resize(size, Image.Resampling.NEAREST), 2, "white") for tile in tiles]
    return images.strip(scaled, columns)


def titled(picture: Image.Image, title: str) -> Image.Image:
    """Write a title above a picture, which is placed on a sheet that is wide enough for it."""
    width = max(picture.width, GRID_PX)
    sheet = Image.new("RGB", (width, picture.height), "white")
    sheet.paste(picture, (0, 0))
    return images.titled(sheet, title)


def draw_channels(output: Tensor, count: int) -> tuple[Image.Image, str]:
    """Return the channels of a layer's output for one image, (1, ...), and what is shown.

    Feature maps have a common scale, so that a channel that is silent is dark. Of a vector each square is a unit.
    """
    maps = activations.to_maps(output.float().cpu())
    values = output.float().cpu().flatten() if maps is None else maps[0, :count]
    top = float(np.quantile(values.abs().numpy(), RANGE_QUANTILE)) or float(values.abs().max())
    scaled = (values / max(top, 1e-30)).clamp(-1, 1)
    color = images.signed if float(values.min()) < 0 else images.heat
    legend = f"from {-top:.3g} (blue) to {top:.3g} (red)" if color is images.signed else f"from 0 to {top:.3g}"
    if maps is None:
        side = math.ceil(math.sqrt(len(values)))
        square = torch.nn.functional.pad(scaled, (0, side * side - len(values))).view(side, side)
        factor = max(1, GRID_PX // side)
        picture = color(square).resize((side * factor, side * factor), Image.Resampling.NEAREST)
        return picture, f"{len(values)} units, {legend}"
    height, width = maps.shape[2:]
    shown = f"{len(values)} of {maps.shape[1]}" if len(values) < maps.shape[1] else str(len(values))
    return _grid([color(channel) for channel in scaled]), f"{shown} channels of {height} x {width}, {legend}"


@dataclass(frozen=True)
class WeightStatistics:
    """Statistics of a parameter's values: mean, standard deviation, smallest, largest."""

    mean: float
    std: float
    low: float
    high: float


def weight_statistics(values: Tensor) -> WeightStatistics:
    """Return statistics of a tensor with at least one value."""
    values = values.detach().double()
    return WeightStatistics(
        float(values.mean()), float(values.std(correction=0)), float(values.min()), float(values.max())
    )


def draw_histograms(tensors: Mapping[str, Tensor], title: str) -> Image.Image:
    """Draw a histogram of the values of each tensor; of more than MAX_HISTOGRAMS those at even intervals."""
    names = list(tensors)
    if len(names) > MAX_HISTOGRAMS:
        title = f"{title}: {MAX_HISTOGRAMS} of {len(names)} layers"
        names = [names[k * len(names) // MAX_HISTOGRAMS] for k in range(MAX_HISTOGRAMS)]
    return titled(images.strip([_histogram(name, tensors[name]) for name in names], HISTOGRAM_COLUMNS), title)


def _histogram(name: str, tensor: Tensor) -> Image.Image:
    """Draw the values of a tensor up to a quantile of their absolute values, with the ends and 0 below."""
    flat = tensor.detach().float().flatten()
    values = flat[:: -(-len(flat) // MAX_SAMPLED)].cpu().numpy()
    limit = float(np.quantile(np.abs(values), RANGE_QUANTILE)) or float(np.abs(values).max()) or 1.0
    counts, _ = np.histogram(values, bins=BINS, range=(-limit, limit))
    width, height = BINS * BAR_PX, HISTOGRAM_PX
    line_px, left = fonts.line_px(SMALL_PX), images.MARGIN
    bottom = 2 * line_px + 4 + height
    sheet = Image.new("RGB", (width + 3 * left, bottom + line_px + images.MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    for row, text in enumerate((fonts.printable(name), f"std {float(values.std()):.3g}")):
        fonts.draw(pen, (left, row * line_px), text, SMALL_PX)
    for k, count in enumerate(counts):
        bar_px = round(height * int(count) / max(1, int(counts.max())))
        if bar_px:
            corner = (left + k * BAR_PX, bottom - bar_px)
            pen.rectangle((*corner, corner[0] + BAR_PX - 1, bottom), fill=colors.LIGHT[0])
    pen.line((left, bottom, left + width, bottom), fill="black")
    for share, text in ((0.0, f"{-limit:.2g}"), (0.5, "0"), (1.0, f"{limit:.2g}")):
        shift = fonts.width(text, SMALL_PX) * share
        fonts.draw(pen, (round(left + share * width - shift), bottom + 2), text, SMALL_PX)
    return sheet
