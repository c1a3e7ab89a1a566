import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import traitlets

import llama4lab as lab
from llama4lab.run.residual_stream import RESIDUAL
from llama4lab.run.tuned_lens import TunedLens
from llama4lab.tables import logit_lens as tables
from llama4lab.viz import logit_lens
from llama4lab.widgets.logits import HINT, LogitLens
from llama4lab.widgets.token_text import visible

HOSTILE = "<img src=x onerror=alert(1)>"
POST = "layers.*.resid_post"


@pytest.fixture(scope="module")
def model() -> lab.HookedLlama4:
    loaded = lab.load()
    assert isinstance(loaded, lab.HookedLlama4)
    return loaded


@pytest.fixture(scope="module")
def run(model) -> lab.Run:
    """Two rows, the second behind padding."""
    return lab.record(model, ["When Mary and John went to the store", "The capital of Indonesia is"], at=RESIDUAL)


@pytest.fixture(scope="module")
def lens() -> TunedLens:
    """A lens at two places, whose shift is so large that it always says the same."""
    places = ["layers.2.resid_post", "layers.3.resid_mid"]
    shift = 100 * torch.randn(128, generator=torch.Generator().manual_seed(0))
    return TunedLens(dict.fromkeys(places, torch.zeros(128, 128)), dict.fromkeys(places, shift), {"num_layers": 8})


def numbers(view: LogitLens) -> np.ndarray:
    """The numbers that the grid shows."""
    return np.frombuffer(view.grid.numbers, "<f4").reshape(view.grid.shape)


def below(view: LogitLens) -> str:
    return view.children[2].value


def control(view: LogitLens, name: str):
    return next(child for child in view.children[0].children if f"l4-{name}" in child._dom_classes)


def test_the_grid_shows_the_best_token_of_each_place(model, run):
    view = LogitLens(model, run)
    table = tables.top_tokens(model, run.cut(rows=0), at=POST)
    assert view.kind == "resid_post"
    assert view.table.equals(table)
    assert np.allclose(numbers(view), table["prob"].to_numpy().reshape(8, -1), atol=1e-6)
    assert view.grid.rows == [str(layer) for layer in range(8)]
    assert view.grid.columns[:3] == ["<|begin_of_… 0", "When 1", "·Mary 2"]
    assert view.grid.texts == [visible(token, 12) for token in table["token"]]
    assert view.grid.titles[2] == "probability of the best token\nlogit lens"


@pytest.mark.parametrize("column", ["entropy", "kl", "prob"])
def test_every_measure_can_be_chosen(model, run, column):
    view = LogitLens(model, run)
    control(view, "column").value = column
    assert view.column == column
    assert np.allclose(numbers(view).ravel(), view.table[column], atol=1e-5)
    picture = view.ax.images[0]
    assert np.allclose(np.asarray(picture.get_array()), numbers(view), atol=1e-5)
    assert picture.get_clim() == pytest.approx(view.grid.limits)


def test_every_kind_of_place_can_be_chosen(model, run):
    view = LogitLens(model, run)
    assert view.kinds == ["resid_pre", "resid_mid", "resid_post", "all"]
    for kind in view.kinds:
        control(view, "kind").value = kind
        assert view.kind == kind
        assert view.grid.shape[0] == (27 if kind == "all" else 8)
        assert set(view.table["kind"]) == {kind} or kind == "all"
    assert view.grid.rows[:4] == ["embed", "embed", "0 pre", "0 mid"]


def test_a_row_can_be_chosen_and_its_padding_is_not_shown(model, run):
    view = LogitLens(model, run)
    control(view, "row").value = 1
    assert view.grid.columns == ["<|begin_of_… 3", "The 4", "·capital 5", "·of 6", "·Indonesia 7", "·is 8"]
    assert view.grid.texts[-1] == "·Jakarta"
    assert "row 1" in view.caption


def test_a_run_of_one_kind_and_row_has_no_control_for_them(model):
    view = LogitLens(model, lab.record(model, "Mary and John", at=POST))
    assert view.kinds == ["resid_post"]
    assert len(view.children[0].children) == 1


def test_a_run_without_layers_is_shown_whole(model):
    view = LogitLens(model, lab.record(model, "Mary and John", at=["embed_merged", "final_norm"]))
    assert view.grid.rows == ["embed", "norm"]


def test_a_click_shows_the_most_probable_tokens_there(model, run):
    view = LogitLens(model, run)
    view.row = 1
    assert below(view) == HINT
    view.grid.selected = [4, 5]
    assert view.selection == {"hook_point": "layers.4.resid_post", "position": 8}
    own = run.cut(rows=1, positions=-1)
    for token in tables.top_tokens(model, own, 10, at="layers.4.resid_post")["token"]:
        assert f"·{token.strip()}<" in below(view)
    for text in (
        "layers.4.resid_post, position 8, token ·is",
        ">logit lens<",
        ">model<",
        "entropy 3.4",
        "divergence 1.4",
    ):
        assert text in below(view)
    view.grid.selected = []
    assert (view.selection, below(view)) == ({}, HINT)


def test_a_selected_place_stays_selected_where_it_is_shown(model, run):
    view = LogitLens(model, run)
    seen = []
    view.observe(lambda change: seen.append(change["new"]), "selection")
    cell = {"hook_point": "layers.3.resid_post", "position": 4}
    view.selection = cell
    assert view.grid.selected == [3, 4]
    view.kind = "all"
    assert view.grid.selected == [2 + 3 * 3 + 2, 4]
    view.column, view.row = "kl", 1
    assert view.selection == cell
    assert view.grid.selected == [2 + 3 * 3 + 2, 1]
    assert "token The" in below(view)
    assert seen == [cell]
    view.kind = "resid_mid"
    assert (view.selection, view.grid.selected, below(view)) == ({}, [], HINT)


def test_a_tuned_lens_stands_beside_the_logit_lens(model, run, lens):
    view = LogitLens(model, run, lens)
    assert view.names == [
        "layers.2.resid_post",
        "layers.3.resid_pre",
        "layers.3.resid_mid",
        "layers.7.resid_post",
        "final_norm",
    ]
    before = numbers(view)
    control(view, "lens").value = "tuned"
    assert view.lens == "tuned"
    assert "tuned lens" in view.grid.titles[2]
    assert not np.allclose(before[0], numbers(view)[0])
    assert np.allclose(before[1], numbers(view)[1], atol=1e-6)  # the end of the model
    view.selection = {"hook_point": "layers.2.resid_post", "position": 3}
    assert all(text in below(view) for text in (">logit lens<", ">tuned lens<", ">model<", "(tuned lens)"))


def test_what_is_not_there_cannot_be_chosen(model, run):
    view = LogitLens(model, run)
    for name, wrong in (
        ("kind", "resid_end"),
        ("column", "rank"),
        ("row", 2),
        ("lens", "tuned"),
        ("selection", {"hook_point": "layers.3.resid_mid", "position": 4}),
        ("selection", {"hook_point": "layers.3.resid_post", "position": 99}),
    ):
        with pytest.raises(traitlets.TraitError):
            setattr(view, name, wrong)
    assert view.grid.shape[0] == 8


def test_a_lens_for_other_places_is_refused(model, lens):
    with pytest.raises(ValueError, match="fitted at no hook point"):
        LogitLens(model, lab.record(model, "Mary", at="layers.5.resid_mid"), lens)


def test_a_generated_run_has_no_divergence_where_it_has_no_logits(model):
    run = lab.generate(model, "The capital of France is", max_new_tokens=2, at=POST)
    view = LogitLens(model, run)
    view.column = "kl"
    assert np.isnan(numbers(view)[:, 0]).all()
    view.grid.selected = [0, 0]
    assert ">model<" not in below(view)
    assert "nan" not in below(view)


def test_hostile_text_never_becomes_html(model, run, monkeypatch):
    monkeypatch.setattr(tables, "token_strings", lambda _, ids: [HOSTILE] * len(ids))
    view = LogitLens(model, run)
    view.grid.selected = [3, 4]
    assert "<img" not in below(view)
    assert "&lt;img" in below(view)
    html = view._repr_mimebundle_()[0]["text/html"]
    assert html.count("<img") == 1  # the picture
    assert "<script" not in html


def test_the_twin_is_the_plot_and_no_figure_stays_open(model, run):
    view = LogitLens(model, run)
    view._repr_mimebundle_()
    assert plt.get_fignums() == []
    twin = logit_lens.top_tokens(view.table)
    assert [text.get_text() for text in view.ax.texts] == [text.get_text() for text in twin.texts]
