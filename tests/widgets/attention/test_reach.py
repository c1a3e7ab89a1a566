"""The views whose layers can be barred: `Horizon` and `Needle`."""

import itertools

import numpy as np
import pytest
import traitlets

import llama4lab as lab
from llama4lab.widgets.attention import Horizon, Needle


def classes(view: Horizon) -> np.ndarray:
    return np.frombuffer(view.grid.cells, np.uint8).reshape(view.grid.shape)


def steps(table, length: int) -> np.ndarray:
    """The class of each layer and position, one by one."""
    found = np.full((table["layer"].max() + 1, length), 4)
    for line in table.dropna(subset=["hops"]).itertuples():
        found[line.layer, line.start : line.stop] = min(line.hops, 3)
    return found


def test_the_horizon_shows_the_table(tiny):
    view = Horizon(tiny, 120)
    assert np.array_equal(classes(view), steps(lab.tables.attention.horizon(tiny, 120), 120))
    view.source, view.barred = 50, (3,)
    table = lab.tables.attention.horizon(tiny, 120, source=50, barred=[3])
    assert view.table.equals(table)
    assert np.array_equal(classes(view), steps(table, 120))
    assert view.grid.rows[2:4] == ["2", "NoPE 3"]


def test_columns_of_a_long_text_have_the_fewest_steps_in_them(tiny):
    view = Horizon(tiny, 1000)
    view.source = 300
    one_by_one = steps(view.table, 1000)
    pooled = np.stack([one_by_one[:, first : first + 8].min(1) for first in range(0, 1000, 8)], axis=1)
    assert np.array_equal(classes(view), pooled)
    assert [0, 64 / 8, 1, 0, False] in view.grid.trait_values()["frames"]
    view.length = 10_000_000
    assert view.grid.shape[1] <= 128
    assert view.grid.trait_values()["frames"] == []


def test_a_click_says_what_reaches_a_place(tiny, control):
    view = Horizon(tiny, 256)
    view.grid.selected = [0, 60]
    assert view.selection == {"layer": 0, "position": 120}
    assert "not reached" in view.children[3].value
    view.grid.selected = [3, 60]
    assert "reached in 2 steps, first by layer 3" in view.children[3].value or "1 step" in view.children[3].value
    view.barred = (3, 7)
    assert "not reached" in view.children[3].value
    assert [button.value for button in control(view, "barred").children[1:]] == [True, True]
    control(view, "barred").children[1].value = False
    assert view.barred == (7,)


def test_a_shorter_text_keeps_its_source_inside(tiny, control):
    view = Horizon(tiny, 200)
    control(view, "source").value = 150
    assert view.source == 150
    control(view, "length").value = 100
    assert (view.length, view.source, control(view, "source").max) == (100, 99, 99)
    for name, wrong in (("length", 0), ("source", 100), ("barred", (2,)), ("selection", {"layer": 9, "position": 0})):
        with pytest.raises(traitlets.TraitError):
            setattr(view, name, wrong)
    assert view._repr_mimebundle_()[0]["text/html"].count("<img") == 1


def test_a_model_without_chunks_has_nothing_to_bar(new_text_model):
    view = Horizon(new_text_model(no_rope_layers=[0] * 5), 20)
    assert all("l4-barred" not in child._dom_classes for child in view.children[0].children)
    assert (classes(view)[:, 1:] == 1).all()


@pytest.fixture(scope="module")
def needle(tiny) -> Needle:
    return Needle(tiny, distances=[5, 20], borders=[-1, 0], n=2)


def test_needles_ask_the_same_texts_with_layers_barred(tiny, needle):
    needle.barred = (3, 7)
    expected = lab.tables.attention.needle(tiny, distances=[5, 20], borders=[-1, 0], ablate=[(3, 7)], n=2)
    order = ["ablated", "distance", "border"]
    own, wanted = (table.sort_values(order).reset_index(drop=True) for table in (needle.table, expected))
    assert own[order].equals(wanted[order])
    for column in ("accuracy", "log_prob"):
        assert np.allclose(own[column].astype(float), wanted[column].astype(float), atol=1e-5)
    assert needle.curves.names == ["all layers", "3, 7 barred"]
    assert needle.curves.selected == 1
    at_border = needle.table.query("border == -1")
    assert np.allclose(needle.curves.heights.ravel(), at_border["accuracy"])


def test_choices_that_were_asked_before_are_not_asked_again(needle, control, monkeypatch):
    needle.barred = (3, 7)
    monkeypatch.setattr(needle, "_asked", lambda barred: pytest.fail(f"asked {barred}"))
    needle.curves.selected = 0
    assert needle.barred == ()
    control(needle, "border").value = 0
    assert needle.curves.title.endswith("fact 1 behind a border")
    control(needle, "value").value = "log_prob"
    own = needle.table.query("border == 0")
    assert np.allclose(needle.curves.heights.ravel(), own["log_prob"], atol=1e-6)
    for name, wrong in (("barred", (2,)), ("border", 1), ("value", "loss")):
        with pytest.raises(traitlets.TraitError):
            setattr(needle, name, wrong)
    assert needle._repr_mimebundle_()[0]["text/html"].count("<img") == 1


def test_texts_drawn_at_random_are_drawn_once(tiny):
    draws = itertools.count()

    def make(distance: int):
        return [0, *(5 + (next(draws) + place) % 50 for place in range(distance + 3))], 7

    view = Needle(tiny, distances=[6], borders=[None], make=make, n=2)
    before, drawn = view.table["log_prob"].tolist(), next(draws)
    view.barred = (3,)  # the text is shorter than a chunk, so nothing changes
    assert next(draws) == drawn + 1
    assert view.table["log_prob"].tolist() == pytest.approx(before * 2)


def test_nothing_is_left_on_the_model_when_asking_fails(tiny, needle, monkeypatch):
    def fails(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("llama4lab.widgets.attention.needles.needle_of", fails)
    with pytest.raises(KeyboardInterrupt):
        needle.barred = (7,)
    assert not any(layer.self_attn.chunk_size for layer in (tiny.text.layers[3], tiny.text.layers[7]))
    assert (7,) not in needle._tables
