import numpy as np
import pytest
import torch
import traitlets

import llama4lab as lab
from llama4lab.widgets.routing import Counterfactual
from llama4lab.widgets.token_text import visible

TEXT = "When Mary and John went to the store"


@pytest.fixture(scope="module")
def view(tiny) -> Counterfactual:
    return Counterfactual(tiny, TEXT)


def test_the_bars_are_the_effects_of_the_experts(view, tiny):
    view.selection = {"row": 0, "layer": 3, "position": 4}
    table = lab.tables.routing.counterfactual(tiny, TEXT, layer=3, position=4)
    assert view.table.equals(table)
    assert np.allclose(view.bars.heights[0], table["effect"], atol=1e-6)
    assert view.bars.marks.index("●") == table.loc[table["chosen"], "expert"].iloc[0]
    view.layer, view.position = 7, 2
    assert view.selection == {"row": 0, "layer": 7, "position": 2}
    assert view.grid.selected == [3, 2]


@pytest.mark.parametrize("gate", ["own", "original"])
def test_the_next_tokens_are_those_of_the_run_with_the_expert(view, tiny, gate):
    view.gate, view.selection = gate, {"row": 0, "layer": 1, "position": 3}
    line = view.table[~view.table["chosen"]].iloc[0]
    expert, strength = int(line["expert"]), float(line["gate"])
    changes = {"indices": expert, "gates": strength}

    def put(value):
        return lambda old: torch.where(torch.arange(old.shape[1])[None, :, None] == 3, torch.tensor(value).to(old), old)

    names = {f"layers.1.feed_forward.router.{name}": put(value) for name, value in changes.items()}
    with lab.patched(tiny, names):
        other = lab.record(tiny, TEXT)
    assert torch.allclose(view._rerouted(expert).logits, other.logits, atol=1e-5)
    view.bars.selected = expert
    assert view.expert == expert
    best = lab.tables.logits.top_tokens(other, 1)["token"].iloc[0]
    assert f">{visible(best)}<" in view.children[-1].value
    view.bars.selected = None
    assert (view.expert, view.children[-1].value) == (None, "")


def test_the_map_can_show_the_regret_of_every_token(view, tiny, control):
    control(view, "gate").value = "own"
    control(view, "regrets").value = True
    assert view.regrets
    table = lab.tables.routing.regret(lab.tables.routing.counterfactual(tiny, TEXT, layer=None, position=None))
    shown = np.frombuffer(view.grid.numbers, "<f4")
    assert np.allclose(shown, table["regret"].abs(), atol=1e-6)
    control(view, "regrets").value = False
    assert view.grid.names == [str(expert) for expert in range(8)]


def test_what_is_not_there_cannot_be_chosen(view):
    for name, wrong in (
        ("layer", 2),
        ("position", 99),
        ("row", 1),
        ("gate", "x"),
        ("expert", 8),
        ("selection", {"row": 0}),
    ):
        with pytest.raises(traitlets.TraitError):
            setattr(view, name, wrong)


def test_a_saved_notebook_has_a_picture(view):
    assert view._repr_mimebundle_()[0]["text/html"].count("<img") == 1
