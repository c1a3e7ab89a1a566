# matplotlib declares what it gives as wide unions.
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt

from llama4lab.viz import vision
from llama4lab.viz.vision.picture_panels import best_columns

HEADS = {"weight": np.arange(12.0) / 66}


def test_words_are_written_into_the_cells_of_their_tokens(by_layer, picture, written, values):
    table = by_layer([-1, 3], lambda layer: {"rank": 0, "token": f" w{layer}", "prob": np.arange(12) / 12})
    ax = vision.lens(pd.concat([table, table.assign(rank=1, token="no")]), picture)
    assert written(ax) == ["w3"] * 8
    assert values(ax) == pytest.approx(np.arange(8) / 12)
    assert vision.lens(table, picture, -1, global_tile=True).get_title() == "input"
    with pytest.raises(ValueError, match="layer"):
        vision.lens(table, picture, 2)


def test_nearest_words_have_no_layer(image_tokens, picture, written):
    table = image_tokens(rank=0, token="·$x", cosine=0.5)
    assert written(vision.lens(table, picture, value="cosine")) == [r"·\$x"] * 8


def test_a_word_has_a_panel_for_each_layer_on_one_scale(by_layer, picture, panels, values):
    table = by_layer([0, 2, 5], lambda layer: {"prob": layer / 5 * np.ones(12)})
    table.attrs["token"] = " red"
    ax = vision.word_map(table, picture, [5, 0])
    shown = panels(ax)
    assert [panel.get_title() for panel in shown] == ["layer 5", "layer 0"]
    assert [values(panel)[0] for panel in shown] == [1.0, 0.0]
    assert {panel.collections[0].norm.vmax for panel in shown} == {1.0}
    assert any(other.get_ylabel() == "prob of ·red" for other in ax.figure.axes)


def test_experts_of_a_slot_are_drawn_by_layer(by_layer, picture, panels, written):
    table = by_layer([1, 3], lambda layer: {"slot": 0, "expert": layer})
    table = pd.concat([table, table.assign(slot=1, expert=7)])
    assert [set(written(panel)) for panel in panels(vision.experts(table, picture))] == [{"1"}, {"3"}]
    assert {text for panel in panels(vision.experts(table, picture, slot=1)) for text in written(panel)} == {"7"}


def test_each_head_says_what_it_spends_on_the_image(by_layer, picture, panels):
    table = by_layer([3], lambda _: HEADS)
    two = pd.concat([table.assign(head=0, visible=True), table.assign(head=1, weight=0.0, visible=False)])
    titles = [panel.get_title() for panel in panels(vision.attention(two, picture))]
    assert titles == ["layer 3, head 0: 100%", "layer 3, head 1: not seen"]


def test_layers_are_lines_of_panels_and_heads_stand_below_each_other(by_layer, picture, panels):
    table = by_layer([1, 3], lambda _: HEADS)
    table = pd.concat([table.assign(head=head) for head in range(3)])
    ax = vision.attention(table, picture)
    ax.figure.draw_without_rendering()
    places = np.array([panel.get_position().p0 for panel in panels(ax)]).reshape(2, 3, 2)
    assert np.ptp(places[..., 0], axis=0).max() < 1e-6
    assert (np.diff(places[0, :, 0]) > 0).all()


def test_the_patch_that_looks_has_a_frame(image_tokens, picture, panels):
    table = image_tokens(layer=2, head=0, weight=0.1)
    tile = table[table["tile"] == 1].assign(patch=range(4))
    tile.attrs["patch"] = 2
    (panel,) = panels(vision.vision_attention(tile, picture))
    assert panel.get_title() == "layer 2, head 0: 40%"
    assert panel.patches[-1].get_xy() == (10, 5)
    tile.attrs["patch"] = "class"
    assert len(panels(vision.vision_attention(tile, picture))[0].patches) == 1


def test_too_many_heads_are_refused(image_tokens, picture):
    table = pd.concat([image_tokens(layer=0, head=head, weight=0.1) for head in range(65)])
    with pytest.raises(ValueError, match="64"):
        vision.attention(table, picture)


def test_hidden_boxes_become_cells_of_a_step_that_fill_the_picture(picture, values):
    lines = [(x, y, x + 4.0, y + 4.0, float(x)) for y in (0.0, 3.0, 6.0) for x in (0.0, 8.0, 16.0)]
    table = pd.DataFrame(lines, columns=["left", "top", "right", "bottom", "effect"]).assign(image=0)
    ax = vision.occlusion(table, picture)
    cells = [path.vertices for path in ax.collections[0].get_paths()]
    assert [cell.min(axis=0).tolist() for cell in cells[:3]] == [[0, 0], [6, 0], [14, 0]]
    assert sum(np.prod(np.ptp(cell, axis=0)) for cell in cells) == 200
    assert values(ax)[:3] == [0, 8, 16]


def test_a_sweep_has_a_panel_for_each_layer(by_layer, picture, panels):
    table = by_layer([0, 1], lambda layer: {"effect": layer * 2.0, "normalised": np.linspace(-1, 1, 12) * layer})
    shown = panels(vision.sweep_places(table, picture, global_tile=True))
    assert len(shown) == 2
    assert {panel.collections[0].norm.vmin for panel in shown} == {-1.0}


def test_maps_side_by_side_have_their_own_scales_and_one_box(image_tokens, picture, panels):
    maps = {"rollout": image_tokens(weight=0.5), "occlusion": image_tokens(effect=-2.0).drop(columns=["tile"])}
    shown = panels(vision.side_by_side(maps, picture, box=(1, 2, 5, 6)))
    assert [panel.get_title() for panel in shown] == ["rollout", "occlusion"]
    assert [panel.collections[0].norm.vmax for panel in shown] == [0.5, 2.0]
    assert all(panel.patches[-1].get_xy() == (1, 2) for panel in shown)
    with pytest.raises(ValueError, match="'words'"):
        vision.side_by_side({"words": image_tokens(token="a")}, picture)


def test_panels_fit_into_axes_that_are_given(by_layer, picture):
    figure, (left, right) = plt.subplots(1, 2)
    table = by_layer([0, 1], lambda layer: {"prob": 0.5})
    assert vision.word_map(table, picture, ax=left) is left
    figure.draw_without_rendering()
    middle = right.get_position().x0
    assert all(panel.get_position().x1 <= middle for panel in figure.axes if panel.images)


def test_rows_of_panels_are_full_where_that_costs_little(picture):
    square = picture.resize((10, 10))
    assert best_columns(4, square) in (2, 4)
    assert best_columns(8, square) in (4, 8)
    assert best_columns(1, picture) == 1
