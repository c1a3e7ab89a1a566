import numpy as np
import pytest
import traitlets

import llama4lab as lab
from llama4lab.widgets.routing import ExpertCard
from llama4lab.widgets.routing.cards import _table_html

HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def stats(tiny) -> lab.RoutingStats:
    prompts = ["The capital of France is Paris.", "When Mary and John went to the store"]
    return lab.routing_stats(tiny, prompts, vocabulary=True, progress=False)


def test_the_busiest_expert_comes_first(tiny, stats):
    view = ExpertCard(tiny, stats)
    loads = lab.tables.routing.expert_load(stats)
    busiest = loads.iloc[int(np.argmax(loads["expert_load"]))]
    assert view.selection == {"layer": busiest["layer"], "expert": busiest["expert"]}
    assert view.grid.selected == view.cell_of(view.selection)


def test_a_click_shows_the_card_of_another_expert(tiny, stats, control):
    view = ExpertCard(tiny, stats)
    view.grid.selected = [1, 1]
    assert (view.layer, view.expert, control(view, "expert").value) == (3, 1, 1)
    card = lab.tables.routing.expert_card(tiny, stats, layer=3, expert=1)
    assert view.table.equals(card.inputs)
    for text in ("layer 3, expert 1", "tokens that it gets", "its strongest neurons"):
        assert text in view.children[-1].value
    control(view, "layer").value = 5
    assert (view.selection, view.grid.selected) == ({"layer": 5, "expert": 1}, [2, 1])
    view.selection = {"layer": 7, "expert": 0}
    assert (view.layer, view.expert) == (7, 0)
    for name, wrong in (("layer", 2), ("expert", 8), ("selection", {"layer": 2, "expert": 0})):
        with pytest.raises(traitlets.TraitError):
            setattr(view, name, wrong)


def test_tokens_never_become_html(tiny, stats):
    table = ExpertCard(tiny, stats).table
    html = _table_html("inputs", table.assign(token=HOSTILE))
    assert "<img" not in html
    assert "&lt;img" in html


def test_a_saved_notebook_has_a_picture(tiny, stats):
    assert ExpertCard(tiny, stats)._repr_mimebundle_()[0]["text/html"].count("<img") == 1
