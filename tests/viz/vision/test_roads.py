# matplotlib declares what it gives as wide unions.
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

import numpy as np
import pytest
from PIL import Image

from llama4lab.viz import vision

SIDES = ("left", "top", "right", "bottom")


@pytest.fixture
def road(image_tokens):
    """The picture of 20 x 10 pixels on a canvas of 40 x 20: two tiles of 2 x 2 patches, one image token a tile."""
    table = image_tokens()
    table = table.assign(patch=table["tile_row"] * 2 + table["tile_column"], position=table["tile"] + 7)
    for side in SIDES:
        table[f"canvas_{side}"] = np.where(table["is_global"], np.nan, 2 * table[side])
    return table


def test_the_road_of_a_pixel_is_marked_in_every_panel(road, picture, panels):
    shown = panels(vision.layout(road, picture, at=(12, 6)))
    assert [panel.get_title() for panel in shown] == [
        "picture, 20 × 10",
        "canvas, 40 × 20",
        "tile 1: 2 × 2 patches",
        "global tile: 2 × 2 patches",
    ]
    assert [panel.get_xlabel() for panel in shown[2:]] == ["patch 2 → position 8", "patch 3 → position 9"]
    assert shown[0].lines[-1].get_xydata().tolist() == [[12, 6]]
    assert shown[1].lines[-1].get_xydata().tolist() == [[24, 12]]
    group, patch = (each.get_xy() for each in shown[2].patches[-2:])
    assert (group, patch) == ((0, 0), (0, 1))


def test_each_tile_shows_its_part_of_the_picture(road, picture, panels):
    _, canvas, part, whole = panels(vision.layout(road, picture, at=(12, 6)))
    assert canvas.images[0].get_extent() == [0, 40, 20, 0]
    assert part.images[0].get_extent() == [-2, 2, 2, 0]
    assert whole.images[0].get_extent() == [0, 2, 2, 0]


def test_an_image_of_one_tile_has_no_second_one(road, picture, panels):
    one = road[road["tile"] == 0].assign(is_global=True)
    assert len(panels(vision.layout(one, picture.resize((10, 10))))) == 3


def test_a_pixel_outside_and_several_images_are_refused(road, picture):
    with pytest.raises(ValueError, match="20 x 10"):
        vision.layout(road, picture, at=(20, 3))
    with pytest.raises(ValueError, match="One image"):
        vision.layout(road.assign(image=np.arange(12) % 2), picture)
    with pytest.raises(ValueError, match="canvas_left"):
        vision.layout(road.drop(columns="canvas_left"), Image.new("L", (20, 10)))
