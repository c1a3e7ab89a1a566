import numpy as np
import pandas as pd
import pytest

from llama4lab.viz.cell_grid import cell_grid, joined, shown_axes, value_label


def table(**axes) -> pd.DataFrame:
    """Every combination of the values; the effect of the n-th line is n."""
    lines = pd.MultiIndex.from_product(list(axes.values()), names=list(axes)).to_frame(index=False)
    return lines.assign(effect=np.arange(float(len(lines))))


def test_positions_go_to_the_right_and_layers_upwards():
    cells = table(position=[4, 5, 6], layer=[0, 1]).assign(token=[" a", " a", "", "", " c", " c"])
    grid = cell_grid(cells, "effect")
    assert (grid.row_name, grid.column_name) == ("layer", "token")
    assert grid.values.tolist() == [[0, 2, 4], [1, 3, 5]]
    assert grid.row_labels == ["0", "1"]
    assert grid.column_labels == [" a", "[5]", " c"]


@pytest.mark.parametrize(
    ("axes", "rows", "columns"),
    [
        ({"layer": range(9), "head": range(3)}, ["layer"], "head"),
        ({"layer": range(3), "component": ["z", "out"]}, ["component"], "layer"),
        ({"head": range(2), "expert": range(5)}, ["head"], "expert"),
        ({"layer": range(2), "head": range(2), "position": range(2)}, ["layer", "head"], "position"),
        ({"layer": [3], "head": range(2), "position": range(2)}, ["head"], "position"),
        ({"layer": [3], "position": range(2)}, ["layer"], "position"),
        ({"component": ["z", "out"], "hook_point": ["a", "b"]}, ["component"], "hook_point"),
        ({"expert": range(4)}, [], "expert"),
    ],
)
def test_each_axis_has_its_place(axes, rows, columns):
    grid = cell_grid(table(**axes), "effect")
    assert (grid.row_axes, grid.column_axis) == (rows, columns)
    assert np.sort(grid.values, axis=None).tolist() == list(range(grid.values.size))


def test_two_axes_share_the_rows_and_name_them():
    assert cell_grid(table(layer=[2, 3], head=[0, 1], position=[0]), "effect").row_labels == [
        "2.0",
        "2.1",
        "3.0",
        "3.1",
    ]
    named = cell_grid(table(component=["self_attn.z", "mlp"], layer=[0, 1], position=[0]), "effect")
    assert named.row_labels == ["self_attn.z 0", "self_attn.z 1", "mlp 0", "mlp 1"]
    assert named.row_name == "component, layer"


def test_axes_with_one_value_leave_room_for_the_others():
    grid = cell_grid(table(layer=[3], head=[1], position=range(3)), "effect")
    assert grid.fixed == {"layer": 3}
    assert grid.values.shape == (1, 3)


def test_a_map_of_a_part_shows_positions_and_layers():
    assert shown_axes(table(head=range(9), layer=range(2), position=range(2))) == ["position", "layer"]
    assert shown_axes(table(head=range(9), layer=range(2), slot=range(3))) == ["head", "layer"]
    assert shown_axes(table(layer=range(2), head=range(9))) == ["layer", "head"]


def test_cells_that_do_not_exist_have_no_number():
    grid = cell_grid(table(layer=[0, 1], head=[0, 1]).iloc[:3], "effect")
    assert np.isnan(grid.values).tolist() == [[False, False], [False, True]]


def test_values_that_were_patched_together_have_one_name():
    assert [value_label(value) for value in (3, "z", (2, 3, 4), (2, 7), (5,))] == ["3", "z", "2-4", "2,7", "5"]
    assert joined((3, (0, 1))) == "3.0-1"
    grid = cell_grid(table(layer=[0, 1], position=[(2, 3), 7]), "effect")
    assert grid.column_labels == ["2-3", "7"]


def test_what_cannot_be_laid_out_is_refused():
    cells = table(layer=[0, 1], head=[0, 1])
    with pytest.raises(ValueError, match=r"column='normalized' was to be drawn; the table has effect"):
        cell_grid(cells, "normalized")
    with pytest.raises(ValueError, match="no cells to draw"):
        cell_grid(cells.iloc[:0], "effect")
    with pytest.raises(ValueError, match="several lines for one cell of layer, head"):
        cell_grid(pd.concat([cells, cells]), "effect")
    with pytest.raises(ValueError, match="One row can be drawn at a time; the table has 0, 1"):
        cell_grid(pd.concat([cells.assign(row=0), cells.assign(row=1)]), "effect")
