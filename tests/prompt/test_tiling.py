"""The canvas of an image and what its tokens show."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama4lab.prompt.tiling import Tiling, canvases

SIDES = st.integers(1, 3000)


def test_every_canvas_of_at_most_four_tiles_is_known():
    shapes = [(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1)]
    assert canvases(10, 4).tolist() == [[10 * rows, 10 * cols] for rows, cols in shapes]


def test_a_small_image_gets_one_tile_and_no_global_tile():
    tiling = Tiling.of((30, 20), tile=48, max_tiles=16)
    assert (tiling.rows, tiling.cols, tiling.num_tiles) == (1, 1, 1)
    assert tiling.resized == (48, 32)


def test_a_wide_image_gets_a_wide_canvas_and_a_global_tile():
    tiling = Tiling.of((60, 130), tile=48, max_tiles=4)
    assert (tiling.rows, tiling.cols, tiling.num_tiles, tiling.canvas) == (1, 3, 4, (48, 144))


def test_an_image_between_the_tile_and_the_canvas_is_not_enlarged():
    assert Tiling.of((60, 130), tile=48, max_tiles=16).resized == (60, 130)


def test_the_largest_canvas_is_found_in_float32_arithmetic():
    """In float64 this image would be one pixel higher, which is not what transformers makes of it."""
    assert Tiling.of((100, 200), tile=336, max_tiles=16, to_max_canvas=True).resized == (839, 1680)


@given(size=st.tuples(SIDES, SIDES), max_tiles=st.integers(1, 16), enlarge=st.booleans())
def test_the_image_lies_inside_its_canvas_undistorted(size, max_tiles, enlarge):
    tiling = Tiling.of(size, 48, max_tiles, enlarge)
    assert 1 <= tiling.rows * tiling.cols <= max_tiles
    (height, width), (new_height, new_width) = size, tiling.resized
    assert 1 <= new_height <= tiling.canvas[0]
    assert 1 <= new_width <= tiling.canvas[1]

    def in_proportion(scale: float) -> bool:
        """One side fills its bound; the other is cut off to whole pixels, and has one at least."""
        sides = ((new_height, height), (new_width, width))
        return all(abs(new - max(scale * old, 1)) < 1.01 for new, old in sides)

    assert in_proportion(new_height / height) or in_proportion(new_width / width)


@given(size=st.tuples(SIDES, SIDES), max_tiles=st.integers(1, 9))
def test_boxes_lie_in_the_image_and_cover_it(size, max_tiles):
    tiling = Tiling.of(size, 48, max_tiles)
    boxes, places = tiling.boxes(4), tiling.places(4)
    assert boxes.shape == (tiling.num_tiles * 16, 4)
    left, top, right, bottom = boxes.double().unbind(1)
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (left <= right).all()
    assert (top <= bottom).all()
    assert (right <= size[1]).all()
    assert (bottom <= size[0]).all()
    area = (right - left) * (bottom - top)
    for tiles in (places[:, 0] < tiling.rows * tiling.cols, places[:, 0] == tiling.num_tiles - 1):
        torch.testing.assert_close(
            area[tiles].sum(), torch.tensor(float(size[0] * size[1])).double(), rtol=1e-4, atol=0
        )


def test_boxes_undo_the_resize():
    """96 x 192 pixels on a canvas of 1 x 2 tiles of 48: every pixel of the canvas is two of the image."""
    tiling = Tiling.of((96, 192), tile=48, max_tiles=2)
    assert tiling.resized == (48, 96)
    boxes, places = tiling.boxes(4), tiling.places(4)
    token = (places == torch.tensor([1, 2, 3])).all(dim=1)
    assert boxes[token].tolist() == [[96 + 3 * 24, 2 * 24, 96 + 4 * 24, 3 * 24]]
    token = (places == torch.tensor([2, 0, 1])).all(dim=1)
    assert boxes[token].tolist() == [[48, 0, 96, 24]], "the global tile shows the whole image, squeezed"


def test_a_token_that_shows_only_filling_has_no_area():
    tiling = Tiling.of((48, 12), tile=48, max_tiles=1)
    left, top, right, bottom = tiling.boxes(4).unbind(1)
    has_area = (right > left) & (bottom > top)
    assert has_area.view(4, 4).tolist() == [[True, False, False, False]] * 4


@pytest.mark.parametrize("grid", [1, 4, 12])
def test_places_run_row_by_row_and_tile_by_tile(grid):
    places = Tiling.of((60, 130), tile=48, max_tiles=4).places(grid)
    order = (places[:, 0] * grid + places[:, 1]) * grid + places[:, 2]
    assert order.tolist() == list(range(4 * grid * grid))
