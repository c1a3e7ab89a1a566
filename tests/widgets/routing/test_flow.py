import numpy as np
import pytest
import traitlets

import llama4lab as lab
from llama4lab.widgets.routing import Transitions


def shown(view: Transitions) -> np.ndarray:
    return np.frombuffer(view.grid.numbers, "<f4").reshape(view.grid.shape)


def counted(run: lab.Run, start: int, end: int, experts: int) -> np.ndarray:
    """The same shares, counted one token after the other."""
    counts = np.zeros((experts, experts))
    indices = {layer: run[f"layers.{layer}.feed_forward.router.indices"] for layer in (start, end)}
    for row, position in run.prompt.attention_mask.nonzero().tolist():
        counts[indices[start][row, position, 0], indices[end][row, position, 0]] += 1
    with np.errstate(invalid="ignore"):
        return counts / counts.sum(axis=1, keepdims=True)


def test_the_map_shows_where_tokens_go(run, control):
    view = Transitions(run)
    assert view.layers == (1, 3, 5, 7)
    assert np.allclose(shown(view), counted(run, 1, 3, 8), equal_nan=True, atol=1e-6)
    view.from_layer = 5
    assert np.allclose(shown(view), counted(run, 5, 7, 8), equal_nan=True, atol=1e-6)
    control(view, "layers").value = (1, 7)
    assert (view.layers, view.from_layer) == ((1, 7), 1)
    assert np.allclose(shown(view), counted(run, 1, 7, 8), equal_nan=True, atol=1e-6)
    assert view.grid.titles[:2] == ["expert of layer 1", "expert of layer 7"]
    assert "through layers 1, 7" in view.children[1].value
    control(view, "layers").value = (7,)  # no chain yet
    assert view.layers == (1, 7)


def test_a_click_says_how_many_tokens_took_that_way(run):
    view = Transitions(run)
    start, end = (int(run[f"layers.{layer}.feed_forward.router.indices"][0, 0, 0]) for layer in (1, 3))
    view.grid.selected = [start, end]
    assert view.selection == {"from_layer": 1, "to_layer": 3, "from_expert": start, "to_expert": end}
    assert f"of expert {start} in layer 1 go on to expert {end} in layer 3" in view.children[-1].value
    view.from_layer = 3
    assert view.selection["to_layer"] == 5
    view.selection = {}
    assert view.children[-1].value == ""


def test_statistics_have_neighbours_only(tiny, run):
    view = Transitions(lab.routing_stats(tiny, ["The capital of France is Paris."], progress=False))
    view.layers = (3, 5)
    for wrong in ((1, 5), (5, 3), (1,), (1, 2)):
        with pytest.raises(traitlets.TraitError):
            view.layers = wrong
    with pytest.raises(traitlets.TraitError):
        view.from_layer = 5
    with pytest.raises(ValueError, match="two layers"):
        Transitions(lab.tables.routing.decisions(run).query("layer == 3"))


def test_a_saved_notebook_has_a_picture(run, wide_run):
    for each in (run, wide_run):
        assert Transitions(each)._repr_mimebundle_()[0]["text/html"].count("<img") == 1
