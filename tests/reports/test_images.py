"""Heat maps, overlays, panels and sheets."""

import numpy as np
import pytest
import torch
from PIL import Image

from cvlab.reports import fonts, images

RED, BLUE, GREEN = (255, 0, 0), (0, 0, 255), (0, 160, 0)


def solid_image(size, color):
    return Image.new("RGB", size, color)


def bounding_box(sheet, color):
    """Return the bounding box (left, top, right, bottom) of the pixels of a color."""
    rows, columns = np.nonzero((np.asarray(sheet) == color).all(-1))
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def test_heat_map_and_scaling():
    values = torch.zeros(10, 10)
    values[2, 3], values[5, 5] = 4.0, 1.0
    scaled = images.scaled(values, 1.0)
    assert scaled[2, 3] == 1
    assert scaled[5, 5] == 0.25
    assert images.scaled(torch.zeros(4, 4)).max() == 0
    image = np.asarray(images.heat(torch.tensor([[0.0, 1.0]])))
    assert tuple(image[0, 0]) == images.HEAT[0]
    assert tuple(image[0, 1]) == images.HEAT[-1]


class TestOverlay:
    def test_the_photo_remains_visible_where_the_map_is_low(self):
        values = torch.zeros(20, 20)
        values[:4, :4] = 1
        overlay = np.asarray(images.overlay(solid_image((100, 100), (120, 90, 30)), values, (0, 0, 100, 100)))
        low = overlay[60:, 60:].reshape(-1, 3)
        assert (low.max(0) == low.min(0)).all()
        assert len(set(low[0].tolist())) == 1, "gray"
        assert low[0, 0] > 100
        high = overlay[2, 2].astype(int)
        assert high.max() - high.min() > 60, "a color of the heat map"

    def test_single_bright_pixels_are_spread(self):
        values = torch.zeros(200, 200)
        values[100, 100] = 1
        overlay = np.asarray(images.overlay(solid_image((200, 200), "gray"), values, (0, 0, 200, 200))).astype(int)
        colored = overlay.max(-1) - overlay.min(-1) > 20
        assert colored.sum() > 9

    def test_a_crop_is_outlined_and_the_rest_is_only_the_photo(self):
        overlay = images.overlay(solid_image((100, 60), "black"), torch.ones(5, 5), (20, 0, 80, 60))
        assert overlay.getpixel((20, 30)) == (255, 255, 255)
        assert overlay.getpixel((10, 30)) == (images.LIGHTEST_SHADOW,) * 3
        photo = solid_image((10, 10), "red")
        assert images.outline(photo, (0, 0, 10, 10)) is photo


class TestPanel:
    def test_all_tiles_have_one_height(self):
        sizes = {RED: (500, 400), BLUE: (100, 200), GREEN: (9, 9)}
        sheet = images.panel(
            [(name, solid_image(sizes[color], color)) for name, color in zip("abc", sizes, strict=True)]
        )
        heights = {bounding_box(sheet, color)[3] - bounding_box(sheet, color)[1] for color in (RED, BLUE, GREEN)}
        tops = {bounding_box(sheet, color)[1] for color in (RED, BLUE, GREEN)}
        assert len(heights) == len(tops) == 1
        left, top, right, bottom = bounding_box(sheet, BLUE)
        assert abs((right - left) / (bottom - top) - 0.5) < 0.01

    @pytest.mark.parametrize("size", [(4000, 3000), (3000, 4000), (8000, 100), (1, 1)])
    def test_tiles_are_reduced(self, size):
        left, top, right, bottom = bounding_box(images.panel([("a", solid_image(size, RED))]), RED)
        assert max(right - left, bottom - top) <= images.MAX_TILE_PX

    def test_many_tiles_are_in_rows_of_one_height(self):
        colors = [(10 * k, 0, 0) for k in range(1, 9)]
        sheet = images.panel([("a", solid_image((300, 300), color)) for color in colors])
        tile_boxes = [bounding_box(sheet, color) for color in colors]
        assert len({top for _, top, _, _ in tile_boxes}) == 2
        assert len({bottom - top for _, top, _, bottom in tile_boxes}) == 1
        assert [tile_box[0] for tile_box in tile_boxes[:4]] == [tile_box[0] for tile_box in tile_boxes[4:]]

    def test_captions_are_not_cut_off(self, monkeypatch):
        lines = []
        monkeypatch.setattr(fonts, "draw", lambda _pen, xy, text, px, *_: lines.append((xy[0], text, px)))
        caption = "a very long caption with a_very_long_word_" + "x" * 60
        sheet = images.panel([(caption, solid_image((100, 100), RED))], "the title of a narrow panel in several lines")
        assert "".join(text for _, text, px in lines if px == images.TEXT_PX).replace(" ", "") == caption.replace(
            " ", ""
        )
        assert all(x + fonts.width(text, px) <= sheet.width for x, text, px in lines)

    def test_the_color_bar_has_all_colors(self):
        sheet = images.panel([("a", solid_image((300, 300), GREEN))], has_color_bar=True)
        bar = np.asarray(sheet.crop((bounding_box(sheet, GREEN)[2] + images.MARGIN, 0, sheet.width, sheet.height)))
        for color in (images.HEAT[0], images.HEAT[4], images.HEAT[-1]):
            assert (np.abs(bar.astype(int) - color).sum(-1) < 12).any()
        rows = [bounding_box(sheet, images.HEAT[k])[1] for k in (0, -1)]
        assert rows[1] < rows[0], "1 is at the top"

    def test_saliency_tiles_have_the_size_of_the_map(self):
        photo, values = solid_image((640, 480), RED), torch.rand(50, 50)
        tiles = images.saliency_tiles("map", photo, values, (80.0, -0.5, 560.0, 480.5))
        assert [image.size for _, image in tiles] == [(50, 50), (50, 50)]


class TestFramesSheet:
    @staticmethod
    def sheet(monkeypatch, count):
        captions = []
        monkeypatch.setattr(fonts, "draw", lambda _pen, xy, text, px, *_: captions.append(text))
        frames = [(10 * k, solid_image((100, 100), (0, 0, 100 + k))) for k in range(count)]
        return images.frames_sheet("title", frames), captions

    def test_the_last_frame_is_the_first_and_the_largest(self, monkeypatch):
        sheet, captions = self.sheet(monkeypatch, 13)
        assert "step 120 (final)" in captions
        assert [f"step {10 * k}" for k in range(12)] == [text for text in captions if text.endswith("0")]
        left, _, right, _ = bounding_box(sheet, (0, 0, 112))
        assert left < 20
        assert right - left > 180
        first, last = bounding_box(sheet, (0, 0, 100)), bounding_box(sheet, (0, 0, 111))
        assert first[0] >= right
        assert last[2] >= sheet.width - 2 * images.MARGIN, "the last row is full"
        assert last[3] >= sheet.height - 2 * images.MARGIN

    @pytest.mark.parametrize("count", [1, 2, 3, 4, 12, 201])
    def test_any_number_of_frames(self, monkeypatch, count):
        sheet, captions = self.sheet(monkeypatch, count)
        assert (np.asarray(sheet) == (0, 0, (99 + count) % 256)).all(-1).any() or count > 156
        assert len([text for text in captions if text.startswith("step")]) == min(count, images.MAX_SHEET_FRAMES + 1)


def test_rows_are_filled_evenly():
    assert images.strip([solid_image((10, 10), RED)] * 13).size == (50, 30)
    assert images.strip([solid_image((10, 10), RED)] * 7).size == (40, 20)
    assert images.strip([solid_image((10, 10), RED)] * 6).size == (60, 10)
