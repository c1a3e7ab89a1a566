import pytest
import traitlets

import llama4lab as lab
from llama4lab.widgets.routing import GateCurve

TEXTS = ["When Mary and John went to the store", "The capital of France"]


def test_the_curve_is_that_of_the_picked_token(tiny, control):
    view = GateCurve(tiny, TEXTS)
    assert view.grid.selected == view.cell_of(view.selection) != []
    before = view.children[-1].value
    view.grid.selected = [1, 4]
    assert view.selection == {"row": 0, "layer": 3, "position": 4}
    table = lab.tables.routing.gate_curve(tiny, TEXTS, layer=3, position=4).query("row == 0")
    assert view.table["value"].tolist() == pytest.approx(table["value"].tolist())
    assert view.children[-1].value != before
    assert 'alt="what expert' in view.children[-1].value
    control(view, "layer").value = 7
    assert view.selection == {"row": 0, "layer": 7, "position": 4}


def test_a_row_that_lacks_the_position_has_its_first_one_picked(tiny, control):
    view = GateCurve(tiny, TEXTS)
    view.selection = {"row": 0, "layer": 1, "position": 0}
    control(view, "row").value = 1
    assert view.selection == {"row": 1, "layer": 1, "position": view._positions[0]}
    assert view.position == view._positions[0] > 0
    view.selection = {"row": 0, "layer": 5, "position": 0}
    assert (view.row, view.layer, view.position, view.grid.selected) == (0, 5, 0, [2, 0])
    with pytest.raises(traitlets.TraitError):
        view.position = 99


def test_a_saved_notebook_has_a_picture(tiny):
    assert GateCurve(tiny, TEXTS[1])._repr_mimebundle_()[0]["text/html"].count("<img") == 1
