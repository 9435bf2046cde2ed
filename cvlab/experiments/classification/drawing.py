"""Pictures of what a classifier gets wrong: confusion matrix, reliability diagram, galleries of images.

They are drawn with Pillow: a plotting library would take longer than many training runs.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw

from cvlab.experiments.classification.data.images import to_image
from cvlab.reports import colors, fonts, images

if TYPE_CHECKING:
    from torch import Tensor

    from cvlab.experiments.classification.data.images import Images
    from cvlab.experiments.classification.evaluation import Predictions

TEXT_PX, SMALL_PX = 15, 12
MAX_LABELED = 30  # classes with names and counts; of more only the colors are drawn
MAX_NAME_PX = 150
TILE_PX = 128
MIN_WIDTH = 480  # of a picture, for its title
MAX_MISTAKES = 24
NUM_PAIRS, IMAGES_OF_PAIR = 4, 6
BLUE = (8, 48, 107)
PLOT_PX, MARGIN = 360, 56


def _shade(fraction: float) -> tuple[int, int, int]:
    """Return a color from white at 0 to dark blue at 1."""
    red, green, blue = (round(255 + (end - 255) * min(1.0, fraction) ** 0.7) for end in BLUE)
    return red, green, blue


def _fit(text: str, width_px: float) -> str:
    """Return a text cut to a width."""
    text = fonts.printable(text)
    while len(text) > 1 and fonts.width(text, TEXT_PX) > width_px:
        text = f"{text[:-2].rstrip()}…"
    return text


def _rotated(text: str) -> Image.Image:
    tile = Image.new("RGB", (round(fonts.width(text, TEXT_PX)) + 2, fonts.line_px(TEXT_PX)), "white")
    fonts.draw(ImageDraw.Draw(tile), (0, 0), text, TEXT_PX)
    return tile.rotate(90, expand=True)


def confusion_matrix(counts: "Tensor", classes: Sequence[str], title: str) -> Image.Image:
    """Draw a confusion matrix: a row for each true class, a column for each predicted one.

    Args:
        counts: int64 (C, C).
        classes: Names of the C classes.
        title: Text above it.

    Returns:
        The picture: the color of a cell is its fraction of the row, its text the count and that fraction.
    """
    is_labeled = len(classes) <= MAX_LABELED
    cell = 46 if is_labeled else max(4, 1200 // len(classes))
    names = [_fit(name, MAX_NAME_PX) if is_labeled else "" for name in classes]
    head = max(round(fonts.width(name, TEXT_PX)) for name in names) + 2 * fonts.line_px(TEXT_PX)
    side = cell * len(classes)
    picture = Image.new("RGB", (head + side + 12, head + side + 12), "white")
    pen = ImageDraw.Draw(picture)
    fonts.draw(pen, (head, 2), "predicted class", TEXT_PX, (90, 90, 90))
    picture.paste(_rotated("true class"), (2, head))
    totals = counts.sum(1).tolist()
    for row, values in enumerate(counts.tolist()):
        top = head + row * cell
        fonts.draw(pen, (head - 8 - fonts.width(names[row], TEXT_PX), top + cell / 2 - 10), names[row], TEXT_PX)
        if names[row]:
            label = _rotated(names[row])
            picture.paste(label, (head + row * cell + (cell - label.width) // 2, head - 6 - label.height))
        for column, count in enumerate(values):
            left, fraction = head + column * cell, count / max(totals[row], 1)
            pen.rectangle((left, top, left + cell - 1, top + cell - 1), _shade(fraction), (225, 225, 225))
            if count and is_labeled:
                color = "white" if fraction > 0.45 else "black"
                for line, text in enumerate((str(count), f"{fraction:.2f}")):
                    x = left + (cell - fonts.width(text, SMALL_PX)) / 2
                    fonts.draw(pen, (x, top + 6 + line * 16), text, SMALL_PX, color)
    what = "count, and fraction of the true class" if is_labeled else "fraction of the true class"
    return images.titled(_at_least(picture, MIN_WIDTH), title, f"{what}; darker is more")


def _at_least(picture: Image.Image, width: int) -> Image.Image:
    if picture.width >= width:
        return picture
    wide = Image.new("RGB", (width, picture.height), "white")
    wide.paste(picture, (0, 0))
    return wide


def reliability_diagram(
    confidence: "Tensor", accuracy: "Tensor", counts: "Tensor", lines: Sequence[str]
) -> Image.Image:
    """Draw accuracy over confidence in bins, beside the diagonal of a calibrated classifier.

    Args:
        confidence: Mean of the highest probability in each of B bins, (B,).
        accuracy: Fraction of correct predictions in each bin, (B,).
        counts: Number of images in each bin, (B,).
        lines: Text above it.
    """
    picture = Image.new("RGB", (PLOT_PX + 2 * MARGIN, PLOT_PX + 2 * MARGIN), "white")
    pen = ImageDraw.Draw(picture)

    def at(x: float, y: float) -> tuple[float, float]:
        return MARGIN + x * PLOT_PX, MARGIN / 2 + (1 - y) * PLOT_PX

    for tick in range(6):
        value = tick / 5
        pen.line((*at(value, 0), *at(value, 1)), (230, 230, 230))
        pen.line((*at(0, value), *at(1, value)), (230, 230, 230))
        x, y = at(value, 0)
        fonts.draw(pen, (x - 10, y + 4), f"{value:g}", SMALL_PX)
        x, y = at(0, value)
        fonts.draw(pen, (x - 30, y - 8), f"{value:g}", SMALL_PX)
    num_bins = len(counts)
    total = max(1, int(counts.sum()))
    for k, (right, count) in enumerate(zip(accuracy.tolist(), counts.tolist(), strict=True)):
        if count:
            (left, top), (end, bottom) = at(k / num_bins, right), at((k + 1) / num_bins, 0)
            pen.rectangle((left + 1, min(top, bottom - 1), end - 1, bottom), colors.LIGHT[0])
            share = at(0, count / total)[1]
            pen.rectangle((left + 1, share, end - 1, bottom), (150, 150, 150))
    pen.line((*at(0, 0), *at(1, 1)), "black", 2)
    for mean, right, count in zip(confidence.tolist(), accuracy.tolist(), counts.tolist(), strict=True):
        if count:
            x, y = at(mean, right)
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), "black")
    pen.rectangle((*at(0, 1), *at(1, 0)), outline=(120, 120, 120))
    fonts.draw(pen, (MARGIN + PLOT_PX / 2 - 40, MARGIN / 2 + PLOT_PX + 24), "confidence", TEXT_PX)
    picture.paste(_rotated("accuracy"), (2, MARGIN + PLOT_PX // 2 - 40))
    return images.titled(picture, *lines, "gray: share of the images in the bin")


def _tile(predictions: "Predictions", pixels: "Images", index: int) -> tuple[str, Image.Image]:
    """Return an image with what it is, what it is taken for, and its name."""
    names = predictions.classes
    predicted = int(predictions.predicted[index])
    name = names[predicted] if predicted < len(names) else f"class {predicted}"
    probability = float(predictions.probabilities[index].max())
    caption = (
        f"is {names[int(predictions.labels[index])]}, predicted {name} {probability:.2f}: {predictions.files[index]}"
    )
    return caption, to_image(pixels, index)


def gallery(predictions: "Predictions", pixels: "Images", indices: Sequence[int], title: str) -> Image.Image:
    """Draw images with their label, prediction, probability and name; `pixels` are uint8 (N, H, W, C)."""
    return sheet([_tile(predictions, pixels, index) for index in indices], title)


def sheet(tiles: Sequence[tuple[str, Image.Image]], title: str) -> Image.Image:
    """Draw captions and square images below a title."""
    scaled = [
        (
            caption,
            image.resize(
                (TILE_PX, TILE_PX), images.BICUBIC if image.width >= TILE_PX // 2 else Image.Resampling.NEAREST
            ),
        )
        for caption, image in tiles
    ]
    return images.titled(_at_least(images.panel(scaled, max_tile_px=TILE_PX), MIN_WIDTH), title)


def largest_losses(predictions: "Predictions") -> list[int]:
    """Return the wrongly classified images with the largest loss, the largest first."""
    wrong = (predictions.predicted != predictions.labels).nonzero()[:, 0]
    order = predictions.losses[wrong].argsort(descending=True, stable=True)
    return wrong[order][:MAX_MISTAKES].tolist()


def most_confused(predictions: "Predictions") -> list[int]:
    """Return images of the pairs of classes that are confused most often, pair by pair."""
    from collections import Counter

    wrong = (predictions.predicted != predictions.labels).nonzero()[:, 0].tolist()
    pair_of = {k: (int(predictions.labels[k]), int(predictions.predicted[k])) for k in wrong}
    chosen: list[int] = []
    for pair, _ in Counter(pair_of.values()).most_common(NUM_PAIRS):
        chosen += [k for k in wrong if pair_of[k] == pair][:IMAGES_OF_PAIR]
    return chosen
