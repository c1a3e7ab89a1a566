from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import traitlets

import llama4lab as lab
from llama4lab.widgets.levels import MISSING
from llama4lab.widgets.patching import HINT, Effects

HOSTILE = "<img src=x onerror=alert(1)>"


def numbers(view: Effects) -> np.ndarray:
    """The numbers that the grid shows."""
    return np.frombuffer(view.grid.numbers, "<f4").reshape(view.grid.shape)


def below(view: Effects) -> str:
    return view.children[2].value


def control(view: Effects, name: str):
    return next(child for child in view.children[0].children if f"l4-{name}" in child._dom_classes)


def test_the_grid_shows_the_table(by_position):
    view = Effects(by_position)
    assert np.allclose(numbers(view), by_position.tensor("normalised"), atol=1e-6)
    assert view.table.equals(by_position.table)
    assert view.grid.rows == [str(layer) for layer in range(8)]
    assert view.grid.columns[:2] == ["<|begin_of_… 0", "When 1"]
    assert view.grid.columns[2] == "·Mary|·Paul 2"  # the pairs differ
    assert view.grid.titles[2] == "normalised effect on logit difference\n(0: corrupted, 1: clean)"


@pytest.mark.parametrize("column", ["effect", "patched", "normalised"])
def test_every_measure_can_be_chosen(by_position, column):
    view = Effects(by_position)
    control(view, "column").value = column
    assert view.column == column
    assert np.allclose(numbers(view), by_position.tensor(column), atol=1e-5)
    low, high = view.grid.limits
    middle = float(by_position.base.mean()) if column == "patched" else 0.0
    assert (low + high) / 2 == pytest.approx(middle, abs=1e-6)


def test_one_pair_can_be_chosen(by_position):
    view = Effects(by_position)
    control(view, "row").value = 1
    assert view.row == 1
    own = by_position.by_row.query("row == 1")
    assert np.allclose(numbers(view).ravel(), own["normalised"], atol=1e-6)
    assert view.grid.columns[2] == "·Paul 2"
    view.row = "mean"
    assert control(view, "row").value == "mean"
    assert view.table.equals(by_position.table)


def test_a_third_axis_has_a_control_and_begins_with_the_largest_effect(by_head):
    view = Effects(by_head)
    largest = by_head.labels[int(by_head.table["effect"].abs().to_numpy().argmax())]
    assert view.part == {"head": largest["head"]}
    for head in range(4):
        control(view, "part-head").value = head
        assert view.part == {"head": head}
        assert np.allclose(numbers(view), by_head.tensor("normalised")[:, head], atol=1e-6)
        assert set(view.table["head"]) == {head}


def test_all_parts_have_one_scale(by_head):
    view = Effects(by_head)
    limits = set()
    for head in range(4):
        view.part = {"head": head}
        limits.add((*view.grid.limits, *view.ax.images[0].get_clim()))
    assert len(limits) == 1


def test_a_click_shows_what_the_model_expects_there(by_position):
    view = Effects(by_position)
    assert below(view) == HINT
    view.grid.selected = [7, 14]
    assert view.selection == {"layer": 7, "position": 14}
    tops = by_position.top_tokens(view.selection)
    for token in tops.loc[tops["rank"] == 0, "token"]:
        assert f"·{token.strip()}<" in below(view)
    for text in (">clean<", ">corrupted<", ">patched<", "layer 7, position 14, token ·to", "of pair 0"):
        assert text in below(view)
    view.row = 1
    assert "of pair 1" in below(view)
    view.grid.selected = []
    assert (view.selection, below(view)) == ({}, HINT)


def test_a_cell_can_be_selected_from_code(by_head):
    view = Effects(by_head)
    seen = []
    view.observe(lambda change: seen.append(change["new"]), "selection")
    view.selection = {"layer": 2, "head": 3, "position": 5}
    assert view.part == {"head": 3}
    assert view.grid.selected == [2, 5]
    assert seen == [{"layer": 2, "head": 3, "position": 5}]
    assert "layer 2, head 3, position 5" in below(view)


def test_the_selection_moves_with_the_part(by_head):
    view = Effects(by_head)
    view.selection = {"layer": 2, "head": 3, "position": 5}
    view.part = {"head": 1}
    assert view.selection == {"layer": 2, "head": 1, "position": 5}
    assert "head 1" in below(view)


def test_what_is_not_there_cannot_be_chosen(by_head):
    view = Effects(by_head)
    for name, wrong in (
        ("selection", {"layer": 99, "head": 0, "position": 0}),
        ("selection", {"layer": 1}),
        ("part", {"head": 4}),
        ("part", {"layer": 1}),
        ("row", 2),
        ("row", "both"),
        ("column", "estimate"),
    ):
        with pytest.raises(traitlets.TraitError):
            setattr(view, name, wrong)
    assert np.allclose(numbers(view), by_head.tensor("normalised")[:, view.part["head"]], atol=1e-6)


def test_the_twin_shows_the_same_numbers(by_head):
    view = Effects(by_head)
    view.column = "effect"
    picture = view.ax.images[0]
    assert np.allclose(np.asarray(picture.get_array()), numbers(view), atol=1e-5)
    assert picture.get_clim() == pytest.approx(view.grid.limits)


@pytest.mark.parametrize(
    ("at", "over", "shape", "part"),
    [
        ("layers.*.resid_pre", ["layer"], [1, 8], {}),
        ("layers.*.self_attn.z", ["head", "layer"], [8, 4], {}),
        (["layers.*.self_attn.out", "layers.*.feed_forward.out"], ["component", "layer"], [2, 8], {}),
        (
            ["layers.*.self_attn.out", "layers.*.feed_forward.out"],
            ["component", "layer", "position"],
            [8, 15],
            {"component"},
        ),
        ("layers.2.self_attn.pattern", ["layer", "head", "position", "key"], [1, 15], {"head", "key"}),
        ("layers.*.resid_pre", {"layer": [1, 5], "position": [(2, 3), 7]}, [2, 2], {}),
    ],
)
def test_sweeps_over_any_axes_are_shown_and_every_cell_can_be_selected(new_sweep, at, over, shape, part):
    sweep = new_sweep(at, over)
    view = Effects(sweep)
    assert view.grid.shape == shape
    assert view.part.keys() == set(part)
    for label in (sweep.labels[0], sweep.labels[-1]):
        view.selection = label
        line, column = view.grid.selected
        assert numbers(view)[line, column] == pytest.approx(
            sweep.table["normalised"][sweep.labels.index(label)], abs=1e-5
        )
    view._repr_mimebundle_()


def test_an_ablation_has_no_normalised_effects(new_sweep, by_position):
    alone = lab.sweep(
        lab.load(), "Mary and John", at="layers.*.resid_pre", over=["layer", "position"], values=0.0, into="clean",
        metric=lab.metrics.log_prob(" went"), progress=False,
    )  # fmt: skip
    view = Effects(alone)
    assert view.column == "effect"
    assert list(control(view, "column").options) == ["effect", "patched"]
    view.grid.selected = [0, 0]
    assert ">corrupted<" not in below(view)


def test_a_cell_that_has_not_run_says_so(by_position):
    patched = by_position.patched.clone()
    patched[5] = torch.nan
    view = Effects(replace(by_position, patched=patched))
    assert np.frombuffer(view.grid.cells, np.uint8)[5] == MISSING
    view.selection = by_position.labels[5]
    assert "this cell has not run" in below(view)


def test_hostile_text_never_becomes_html(by_position):
    prompt = replace(by_position.prompt, tokens=[[HOSTILE] * 15] * 2, tokenizer=None)
    sweep = replace(by_position, prompt=prompt, metric=HOSTILE, vocabulary=dict.fromkeys(range(2000), HOSTILE))
    view = Effects(sweep)
    view.grid.selected = [3, 10]
    assert "<img" not in below(view)
    assert "&lt;img" in below(view)
    html = view._repr_mimebundle_()[0]["text/html"]
    assert html.count("<img") == 1  # the picture
    assert "<script" not in html


def test_a_view_leaves_no_figure_open(by_position):
    Effects(by_position)._repr_mimebundle_()
    assert plt.get_fignums() == []


def test_a_sweep_read_from_a_file_is_shown_the_same(by_position, tmp_path):
    by_position.save(tmp_path / "sweep.safetensors")
    view = Effects(lab.Sweep.load(tmp_path / "sweep.safetensors"))
    view.grid.selected = [7, 14]
    assert np.allclose(numbers(view), by_position.tensor("normalised"), atol=1e-6)
    assert "·Mary<" in below(view)
