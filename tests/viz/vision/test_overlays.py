# matplotlib and pandas declare what they give as wide unions.
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from PIL import Image

from llama4lab.viz.expert_colors import expert_color
from llama4lab.viz.vision.overlays import overlay, tokens

PICTURE = Image.new("RGB", (20, 10), (0, 0, 255))


def cells(ax) -> list[list[float]]:
    """Left, top, right and bottom of every cell."""
    outlines = [path.vertices for path in ax.collections[0].get_paths()]
    return [[*outline.min(axis=0), *outline.max(axis=0)] for outline in outlines]


def test_every_image_token_of_the_tiles_has_a_cell_over_its_box(image_tokens):
    table = image_tokens(norm=np.arange(12.0))
    ax = tokens(table, PICTURE)
    local = table[~table["is_global"]]
    assert cells(ax) == local[["left", "top", "right", "bottom"]].values.tolist()
    assert ax.collections[0].get_array().tolist() == list(range(8))
    assert ax.images[0].get_extent() == [0, 20, 10, 0]


def test_the_global_tile_is_drawn_alone(image_tokens):
    ax = tokens(image_tokens(norm=np.arange(12.0)), PICTURE, global_tile=True)
    assert len(cells(ax)) == 4
    assert cells(ax)[0] == [0, 0, 10, 5]


def test_borders_of_tiles_are_drawn(image_tokens):
    ax = tokens(image_tokens(norm=1.0), PICTURE)
    assert [(*tile.get_xy(), tile.get_width(), tile.get_height()) for tile in ax.patches] == [
        (0, 0, 10, 10),
        (10, 0, 10, 10),
    ]


def test_experts_are_drawn_in_their_colours_with_numbers_and_a_legend(image_tokens, written):
    ax = tokens(image_tokens(expert_3=np.arange(12) % 5), PICTURE, value="expert_3", alpha=1.0)
    assert ax.collections[0].get_facecolors()[4, :3] == pytest.approx(expert_color(4))
    assert written(ax) == ["0", "1", "2", "3", "4", "0", "1", "2"]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["0", "1", "2", "3", "4"]
    assert ax.get_legend().get_title().get_text() == "expert, layer 3"


def test_cells_too_small_for_a_number_have_none(image_tokens, written):
    small = plt.figure().add_axes((0.0, 0.0, 0.05, 0.05))
    ax = tokens(image_tokens(expert_3=0), PICTURE, value="expert_3", ax=small)
    assert written(ax) == []


def test_the_cells_of_a_rendered_figure_end_at_the_pixel_where_their_box_ends():
    table = pd.DataFrame({"row": 0, "image": 0, "tile": 0, "is_global": True, "position": [0, 1], "norm": [0.0, 1.0]})
    table = table.assign(left=[0, 10], top=0, right=[10, 20], bottom=10)
    figure = plt.figure(figsize=(2, 1), dpi=100)
    ax = tokens(table, PICTURE, ax=figure.add_axes((0, 0, 1, 1)), alpha=1.0)
    ax.set_axis_off()
    figure.axes[1].set_visible(False)
    ax.set_position((0, 0, 1, 1))
    figure.canvas.draw()
    seen = np.asarray(figure.canvas.buffer_rgba())[50, :, :3].astype(int)  # pyright: ignore[reportAttributeAccessIssue]
    edge = ax.transData.transform((10, 5))[0]
    steps = np.flatnonzero(np.abs(np.diff(seen[4:-4], axis=0)).sum(axis=1) > 60) + 5
    assert steps.tolist() == [round(edge)]


def test_filling_beside_the_picture_is_not_drawn(image_tokens):
    table = image_tokens(norm=1.0)
    table.loc[0, "right"] = table.loc[0, "left"]
    assert len(cells(tokens(table, PICTURE))) == 7


def test_a_picture_of_another_size_is_refused(image_tokens):
    with pytest.raises(ValueError, match=r"20 x 10.*10 x 5"):
        tokens(image_tokens(norm=1.0), PICTURE.resize((10, 5)))
    with pytest.raises(ValueError, match=r"\[3, 10, 20\]"):
        tokens(image_tokens(norm=1.0), np.zeros((3, 10, 20)))


def test_an_unknown_column_and_several_images_are_refused(image_tokens):
    table = image_tokens(expert_3=0)
    with pytest.raises(KeyError, match="expert_3"):
        tokens(table, PICTURE, value="expert_4")
    with pytest.raises(ValueError, match="One image"):
        tokens(pd.concat([table, table.assign(image=1)]), PICTURE, value="expert_3")


def test_several_lines_for_a_place_are_refused_with_their_reason(image_tokens):
    table = pd.concat([image_tokens(layer=layer, weight=0.1) for layer in (1, 3)])
    with pytest.raises(ValueError, match=r"several values of layer.\nChoose one: table\[table\[\"layer\"\]"):
        overlay(table, PICTURE, "weight")
    with pytest.raises(ValueError, match="left"):
        overlay(table.drop(columns="left"), PICTURE, "weight")


def test_places_without_a_number_stay_uncovered(image_tokens):
    table = image_tokens(weight=np.where(np.arange(12) == 3, np.nan, 0.5))
    assert len(cells(overlay(table, PICTURE, "weight"))) == 7


def test_the_kind_of_colours_can_be_chosen(image_tokens):
    ax = overlay(image_tokens(found=np.arange(12) % 2), PICTURE, "found", kind="classes", alpha=1)
    assert ax.collections[0].get_facecolors()[1, :3] == pytest.approx(expert_color(1))
