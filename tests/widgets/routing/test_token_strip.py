import numpy as np
import pytest
import traitlets

from llama4lab.widgets.routing import TokenStrip


def experts(view: TokenStrip) -> list[int]:
    return np.frombuffer(view.tokens.cells, np.uint8).tolist()


def test_the_text_is_coloured_by_the_expert_in_the_layer(run, control):
    view = TokenStrip(run)
    assert view.layer == 1
    for layer in (1, 3, 5, 7):
        control(view, "layer").value = layer
        assert view.layer == layer
        indices = run[f"layers.{layer}.feed_forward.router.indices"][0, :, 0].tolist()
        assert experts(view) == indices == view.table["expert"].tolist()
    assert "".join(view.tokens.tokens[1:10]) == "The capital of France is Paris.↵\nWhen"


def test_another_layer_leaves_the_text(run):
    view = TokenStrip(run)
    before = view.tokens.text_version
    view.layer = 7
    assert view.tokens.text_version == before
    assert view.tokens.title == "expert\nlayer 7"


def test_a_click_shows_the_experts_of_all_layers(run):
    view = TokenStrip(run)
    view.tokens.selected = 4
    assert view.selection == {"row": 0, "layer": 1, "position": 4}
    below = view.children[2].value
    assert "token ·France" in below
    assert below.count("<tr>") == 5
    view.layer = 5
    assert view.selection == {"row": 0, "layer": 5, "position": 4}
    view.tokens.selected = None
    assert view.selection == {}


def test_a_row_is_shown_without_its_padding(run, control):
    view = TokenStrip(run)
    first = len(run.positions) - 6
    control(view, "row").value = 1
    assert view.tokens.positions[0] == first
    assert len(view.tokens.tokens) == 6
    view.selection = {"row": 0, "layer": 3, "position": 2}
    assert (view.row, view.layer, view.tokens.selected) == (0, 3, 2)
    view.row = 1
    assert view.selection == {}


def test_what_is_not_there_cannot_be_chosen(run):
    view = TokenStrip(run)
    for name, wrong in (("layer", 2), ("row", 5), ("slot", 1), ("selection", {"row": 1, "layer": 3, "position": 0})):
        with pytest.raises(traitlets.TraitError):
            setattr(view, name, wrong)


def test_a_saved_notebook_has_a_picture(run, wide_run):
    for each in (run, wide_run):
        html = TokenStrip(each)._repr_mimebundle_()[0]["text/html"]
        assert html.count("<img") == 1
        assert "expert of each token in layer" in html
