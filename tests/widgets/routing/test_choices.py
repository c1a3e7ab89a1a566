from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import traitlets

import llama4lab as lab
from llama4lab.viz.expert_colors import expert_colors
from llama4lab.widgets.routing import Decisions

ROUTER = "layers.*.feed_forward.router.*"
HOSTILE = "<img src=x onerror=alert(1)>"


def cells(view: Decisions) -> np.ndarray:
    return np.frombuffer(view.grid.cells, np.uint8).reshape(view.grid.shape)


def test_the_map_shows_the_expert_and_gate_of_each_token(run):
    view = Decisions(run)
    table = lab.tables.routing.decisions(run).query("row == 0")
    assert view.table.equals(table.reset_index(drop=True))
    assert (cells(view) == table["expert"].to_numpy().reshape(4, -1)).all()
    strengths = np.frombuffer(view.grid.strengths, np.uint8) / 255
    assert np.allclose(strengths, table["gate"], atol=0.5 / 255)
    assert (view.grid.rows, view.grid.columns[1]) == (["1", "3", "5", "7"], "The 1")
    assert view.grid.notes[0].splitlines()[0] == f"gate: {table['gate'].iloc[0]:.3g}"


def test_a_click_shows_the_logits_of_the_router(run):
    view = Decisions(run)
    assert view.bars.layout.display == "none"
    view.grid.selected = [1, 2]
    assert view.selection == {"row": 0, "layer": 3, "position": 2}
    assert view.bars.layout.display is None
    assert np.allclose(view.bars.heights[0], run["layers.3.feed_forward.router.logits"][0, 2], atol=1e-5)
    line = view.table.query("layer == 3 and position == 2").iloc[0]
    assert view.bars.marks.index("●") == line["expert"]
    assert view.bars.marks.index("○") == line["runner_up"]
    assert "token ·capital" in view.children[3].value


def test_a_row_can_be_chosen_and_a_place_stays_selected(run, control):
    view = Decisions(run)
    seen = []
    view.observe(lambda change: seen.append(change["new"]), "selection")
    first = len(run.positions) - 6
    view.selection = {"row": 1, "layer": 5, "position": first}
    assert (view.row, control(view, "row").value) == (1, 1)
    assert view.grid.selected == [2, 0]
    assert view.grid.columns[1] == f"The {first + 1}"  # padding is not shown
    control(view, "row").value = 0
    assert view.selection == {"row": 0, "layer": 5, "position": first}
    view.selection = {}
    assert view.grid.selected == []
    assert len(seen) == 3


def test_every_slot_can_be_shown(wide_run, control):
    view = Decisions(wide_run)
    table = lab.tables.routing.decisions(wide_run)
    control(view, "slot").value = 1
    assert (cells(view) == table.query("slot == 1")["expert"].to_numpy().reshape(view.grid.shape)).all()
    view.grid.selected = [0, 0]
    assert view.bars.marks.count("●") == 2
    view._repr_mimebundle_()


def test_what_is_not_there_cannot_be_chosen(run):
    view = Decisions(run)
    for name, wrong in (("row", 2), ("slot", 1), ("selection", {"row": 0, "layer": 2, "position": 3})):
        with pytest.raises(traitlets.TraitError):
            setattr(view, name, wrong)
    with pytest.raises(traitlets.TraitError):
        view.selection = {"row": 1, "layer": 3, "position": 0}  # padding


def test_messages_stay_small(new_text_model, random_ids):
    run = lab.record(new_text_model(interleave_moe_layer_step=1), random_ids(1, 4000), at=ROUTER)
    view = Decisions(run)
    state = view.grid.get_state()
    assert sum(len(str(value)) for value in state.values()) < 1_000_000
    assert view.grid.notes == []


def test_tokens_never_become_html(run):
    prompt = replace(run.prompt, tokens=[[HOSTILE] * len(run.positions)] * 2)
    view = Decisions(replace(run, prompt=prompt))
    view.grid.selected = [0, 3]
    assert "<img" not in view.children[3].value


def test_the_twin_is_the_plot_and_no_figure_stays_open(run):
    view = Decisions(run)
    html = view._repr_mimebundle_()[0]["text/html"]
    assert html.count("<img") == 1
    assert "<script" not in html
    assert plt.get_fignums() == []
    line = view.table.iloc[0]
    corner = np.asarray(view.ax.images[0].get_array())[0, 0]
    assert np.allclose(corner, expert_colors(np.array([line["expert"]]), np.array([line["gate"]]))[0])
