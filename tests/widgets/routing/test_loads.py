import numpy as np
import pytest
import traitlets

import llama4lab as lab
from llama4lab.widgets.routing import ExpertLoad


def test_the_map_shows_the_load_of_each_expert(run):
    view = ExpertLoad(run)
    loads = lab.tables.routing.expert_load(run)["expert_load"].to_numpy().reshape(4, 8)
    assert np.allclose(np.frombuffer(view.grid.numbers, "<f4").reshape(4, 8), loads, atol=1e-6)
    assert view.grid.texts.count("×") == (loads == 0).sum()
    assert np.allclose(view.bars.heights[0], loads[0])


def test_a_click_shows_the_bars_of_the_layer(run, control):
    view = ExpertLoad(run)
    view.grid.selected = [2, 3]
    assert view.selection == {"layer": 5, "expert": 3}
    assert (view.layer, control(view, "layer").value, view.bars.selected) == (5, 5, 3)
    view.bars.selected = 1
    assert (view.selection, view.grid.selected) == ({"layer": 5, "expert": 1}, [2, 1])
    control(view, "layer").value = 7
    assert view.selection == {"layer": 7, "expert": 1}
    own = lab.tables.routing.expert_load(run).query("layer == 7")
    assert np.allclose(view.bars.heights[0], own["expert_load"])


def test_groups_can_be_counted_apart(run, control):
    view = ExpertLoad(run)
    control(view, "by").value = "row"
    assert (view.by, view.group, control(view, "group").options) == ("row", 0, (0, 1))
    control(view, "group").value = 1
    table = lab.tables.routing.expert_load(run, by="row")
    own = table.query("row == 1")["expert_load"].to_numpy()
    assert np.allclose(np.frombuffer(view.grid.numbers, "<f4"), own, atol=1e-6)
    assert view.bars.series == ["0", "1"]
    assert view.grid.limits[1] == pytest.approx(table["expert_load"].max())  # one scale for all groups
    view.by = "all"
    assert (view.group, len(view.bars.series)) == ("all", 1)


def test_what_is_not_there_cannot_be_chosen(run):
    view = ExpertLoad(run)
    for name, wrong in (("layer", 2), ("by", "token"), ("group", 1), ("selection", {"layer": 3, "expert": 8})):
        with pytest.raises(traitlets.TraitError):
            setattr(view, name, wrong)


def test_statistics_of_a_corpus_and_many_experts_are_shown(tiny, wide_run):
    stats = lab.routing_stats(
        tiny, {"short": ["The capital of France is"], "long": ["Mary and John"] * 2}, progress=False
    )
    view = ExpertLoad(stats)
    view.by = "group"
    assert view.bars.series == ["long", "short"]
    for each in (stats, wide_run):
        assert ExpertLoad(each)._repr_mimebundle_()[0]["text/html"].count("<img") == 1
