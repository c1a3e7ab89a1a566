import numpy as np
import pytest
import traitlets

import llama4lab as lab
from llama4lab.widgets.routing import Specialization


@pytest.fixture(scope="module")
def stats(tiny) -> lab.RoutingStats:
    prompts = {"facts": ["The capital of France is Paris."] * 2, "stories": ["When Mary and John went to the store"]}
    return lab.routing_stats(tiny, prompts, progress=False)


@pytest.mark.parametrize("measure", ["share", "lift"])
def test_the_map_shows_the_measure_of_each_group(stats, measure, control):
    view = Specialization(stats)
    control(view, "measure").value = measure
    control(view, "layer").value = 3
    own = lab.tables.routing.specialization(stats).query("layer == 3")
    assert view.table.equals(own.reset_index(drop=True))
    shown = np.frombuffer(view.grid.numbers, "<f4").reshape(2, 8)
    values = own[measure].to_numpy(dtype=float).reshape(2, 8)
    known = values > 0
    assert np.allclose(shown[known], (np.log2(values) if measure == "lift" else values)[known], atol=1e-5)
    assert view.grid.rows == ["facts", "stories"]
    assert not view.grid.upward


def test_a_click_shows_all_groups_of_the_expert(stats):
    view = Specialization(stats)
    assert view.bars.layout.display == "none"
    view.grid.selected = [1, 2]
    assert view.selection == {"layer": 1, "group": "stories", "expert": 2}
    own = view.table.query("expert == 2")
    assert np.allclose(view.bars.heights[0], own["share"])
    assert (view.bars.names, view.bars.selected) == (["facts", "stories"], 1)
    view.bars.selected = 0
    assert view.grid.selected == [0, 2]
    view.layer = 7
    assert view.selection == {"layer": 7, "group": "facts", "expert": 2}
    view.selection = {"layer": 3, "group": "stories", "expert": 0}
    assert (view.layer, view.grid.selected) == (3, [1, 0])


def test_a_run_is_compared_by_its_rows(run):
    view = Specialization(run)
    view.by = "row"
    view.selection = {"layer": 1, "row": 1, "expert": 0}
    assert view.grid.selected == [1, 0]
    assert view._repr_mimebundle_()[0]["text/html"].count("<img") == 1


def test_what_is_not_there_cannot_be_chosen(stats, wide_run):
    view = Specialization(stats)
    for name, wrong in (("layer", 2), ("by", "row"), ("measure", "rate"), ("selection", {"layer": 1, "group": "x"})):
        with pytest.raises(traitlets.TraitError):
            setattr(view, name, wrong)
    one_row = lab.tables.routing.decisions(wide_run).query("modality == 'text'")
    with pytest.raises(ValueError, match="one group"):
        Specialization(one_row)
