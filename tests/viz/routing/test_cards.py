# matplotlib and pandas declare what they give as wide unions.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportOptionalMemberAccess=false
# pyright: reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import numpy as np
import pandas as pd
import pytest

from llama4lab.tables.routing.cards import ExpertCard
from llama4lab.viz.expert_colors import expert_color
from llama4lab.viz.routing.cards import expert_card


def card(**changes) -> ExpertCard:
    tables = {
        "inputs": pd.DataFrame({"token": [" a$", "\n"], "tokens": [5, 2], "npmi": [0.5, 0.25]}),
        "promoted": pd.DataFrame({"token": [" x", " y"], "score": [3.0, 2.0]}),
        "neurons": pd.DataFrame(
            {"neuron": [90, 4], "activation": [2.0, 1.0], "norm": [1.0, 3.0], "promoted": [[" p", " q"], [" r"]]}
        ),
        "direction": pd.DataFrame(
            {"side": ["embedding", "embedding", "unembedding"], "token": [" e", " f", " u"], "score": [4.0, 3.0, 2.0]}
        ),
    }
    return ExpertCard(7, 3, 1234, **(tables | changes))


def widths(ax) -> list[float]:
    return [bar.get_width() for bar in ax.patches]


def test_the_four_tables_are_panels_in_the_colour_of_the_expert(read, written):
    ax = expert_card(card())
    panels = read.panels(ax)
    inputs, promoted, neurons, direction = panels.values()
    assert written(inputs) == ["layer 7, expert 3: 1,234 tokens"]
    assert widths(inputs) == [0.5, 0.25]
    assert read.labels(inputs.yaxis) == [r"·a\$", "↵"]
    assert inputs.patches[0].get_facecolor()[:3] == pytest.approx(expert_color(3))
    assert widths(promoted) == [3, 2]
    assert widths(neurons) == [2, 1]
    assert read.labels(neurons.yaxis) == ["90", "4"]
    assert written(neurons) == ["·p  ·q", "·r"]
    assert widths(direction) == [4, 3, 2]
    assert all(panel.yaxis_inverted() for panel in panels.values())


def test_the_two_sides_of_the_direction_are_apart_and_named(read, written):
    direction = read.panels(expert_card(card()))["direction of the router"]
    assert direction.get_yticks().tolist() == [0, 1, 3]
    assert written(direction) == ["embeddings", "output rows"]
    assert direction.patches[2].get_facecolor()[:3] == pytest.approx(expert_color(3, 0.25))


def test_neurons_of_statistics_are_drawn_by_what_they_write(read):
    neurons = card().neurons.assign(activation=np.nan)
    panel = read.panels(expert_card(card(neurons=neurons)))["strongest neurons"]
    assert widths(panel) == [1, 3]
    assert panel.get_xlabel() == "norm of what it writes"


def test_an_empty_panel_says_why(read, written):
    empty = card()
    ax = expert_card(card(inputs=empty.inputs.iloc[:0], promoted=empty.promoted.iloc[:0]))
    panels = read.panels(ax)
    assert written(panels["tokens that it gets"])[0] == "no tokens counted"
    assert written(panels["tokens that it promotes"]) == ["no token went to it"]


def test_titles_do_not_lie_on_each_other(read):
    ax = expert_card(card())
    ax.figure.draw_without_rendering()
    panels = read.panels(ax)
    title = panels["tokens that it gets"].texts[-1].get_window_extent()
    assert title.y1 <= ax.figure.bbox.y1
    assert not any(panel.title.get_window_extent().overlaps(title) for panel in panels.values())
