import numpy as np
import pytest
import traitlets

import llama4lab as lab
from llama4lab.widgets.attention import Distances
from llama4lab.widgets.attention.curves import Curves


def test_lines_are_sent_as_they_are():
    curves = Curves(("height", "place"))
    values = np.array([[0.0, 2.0, np.nan], [1.0, -1.0, 0.5]])
    colors = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    points = [(1, "one"), (2.5, "more"), (9, "most")]
    curves.show(values, ["a", "b"], colors, points, title="lines", dashes=[False, True])
    assert np.allclose(curves.heights, values, equal_nan=True)
    assert (curves.limits, curves.x, curves.dashes) == ([-1.0, 2.0], [1.0, 2.5, 9.0], [False, True])
    curves.selected = 1
    curves.show(values[:1], ["a"], colors[:1], points, title="one line", limits=(0.0, 4.0))
    assert (curves.selected, curves.limits) == (None, [0.0, 4.0])
    with pytest.raises(traitlets.TraitError):
        curves.selected = 1
    with pytest.raises(ValueError, match="1 lines of 3 points"):
        curves.show(values[:1], ["a", "b"], colors[:1], points, title="wrong")
    assert curves._repr_mimebundle_()[0]["text/html"].count("<img") == 1


def test_distances_show_layers_and_the_heads_of_one(stream, control):
    view = Distances(stream)
    table = lab.tables.attention.mass_at_distance(stream)
    means = table.pivot_table("mass", "layer", "nearest", aggfunc="mean").to_numpy()
    assert view.table.equals(table)
    assert np.allclose(view.by_layer.heights, means, atol=1e-6)
    assert (view.layer, view.by_layer.selected, view.head) == (3, 3, None)
    assert view.by_layer.dashes == [layer in (3, 7) for layer in range(8)]
    assert view.by_layer.x_names[:4] == ["0", "1", "2–3", "4–7"]
    control(view, "layer").value = 5
    own = table.query("layer == 5").pivot(index="head", columns="nearest", values="mass").to_numpy()
    assert np.allclose(view.by_head.heights, own, atol=1e-6)
    assert np.allclose(view.by_head.heights.sum(1), 1, atol=1e-5)


def test_a_click_on_a_line_picks_a_layer_or_a_head(stream, control):
    view = Distances(stream)
    view.by_layer.selected = 7
    assert (view.layer, control(view, "layer").value) == (7, 7)
    view.by_layer.selected = None
    assert view.by_layer.selected == 7  # one layer is always picked
    view.by_head.selected = 2
    assert (view.head, control(view, "head").value) == (2, 2)
    view.by_head.selected = None
    assert view.head is None
    for name, wrong in (("layer", 8), ("head", 4)):
        with pytest.raises(traitlets.TraitError):
            setattr(view, name, wrong)


def test_distances_come_from_runs_and_tables_too(run):
    table = lab.tables.attention.mass_at_distance(run)
    assert Distances(run).by_layer.values == Distances(table).by_layer.values
    with pytest.raises(ValueError, match="no lines"):
        Distances(table.iloc[:0])
    assert Distances(table)._repr_mimebundle_()[0]["text/html"].count("<img") == 1
