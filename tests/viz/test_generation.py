"""Plots of a generation: what is drawn is what the table says."""

from typing import Any

import numpy as np
import pandas as pd
import pytest

from llama4lab.viz import generation


@pytest.fixture
def choices():
    columns = {"row": 0, "position": [4, 5, 6], "token": [" a", "\n", " c"], "rank": [0, 2, 0]}
    return pd.DataFrame(columns | {"log_prob": [-0.1, -3.0, -0.5], "entropy": [0.2, 1.0, 0.7]})


@pytest.fixture
def looks():
    lines = [(0, "rope", 4, 0.0), (0, "rope", 5, 0.0), (1, "nope", 4, 0.2), (1, "nope", 5, 0.6)]
    parts = [
        pd.DataFrame(lines, columns=["layer", "kind", "position", "earlier"]).assign(head=head, distance=head + 1.0)
        for head in (0, 1)
    ]
    table = pd.concat(parts, ignore_index=True).assign(row=0, token="x")
    table.loc[table["head"] == 1, "earlier"] /= 2
    return table


def test_bars_are_surprisals_and_dots_are_entropies(choices):
    ax: Any = generation.tokens(choices)
    heights = {round(bar.get_x() + bar.get_width() / 2): bar.get_height() for bar in ax.patches}
    assert [heights[place] for place in range(3)] == pytest.approx([0.1, 3.0, 0.5])
    assert ax.lines[0].get_ydata().tolist() == [0.2, 1.0, 0.7]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["·a", "↵", "·c"]


def test_tokens_that_were_not_the_best_have_another_color(choices):
    ax: Any = generation.tokens(choices)
    colors = {round(bar.get_x() + bar.get_width() / 2): bar.get_facecolor() for bar in ax.patches}
    assert colors[0] == colors[2] != colors[1]


def test_attention_is_the_mean_over_heads_and_names_layers_without_positions(looks):
    ax: Any = generation.attention(looks)
    np.testing.assert_allclose(ax.images[0].get_array(), [[0, 0], [0.15, 0.45]])
    assert ax.images[0].get_clim() == (0, 1)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["0", "1 NoPE"]


def test_a_distance_has_a_scale_up_to_the_largest(looks):
    assert generation.attention(looks, "distance").images[0].get_clim() == (0, 1.5)


def test_an_unknown_value_or_row_is_refused(looks, choices):
    with pytest.raises(ValueError, match="choose from own_chunk"):
        generation.attention(looks, "far")
    with pytest.raises(ValueError, match="row=3"):
        generation.tokens(choices, row=3)
