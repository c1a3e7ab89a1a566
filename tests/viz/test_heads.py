# matplotlib and pandas declare what they give as wide unions.
# pyright: reportOptionalMemberAccess=false

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from llama4lab.viz.heads import scores


@pytest.fixture
def table():
    layer, head = (axis.ravel() for axis in np.indices((3, 4)))
    values = np.linspace(0, 1, 12)
    return pd.DataFrame({"layer": layer + 1, "kind": np.where(layer == 2, "nope", "rope"), "head": head}).assign(
        previous_token=values[::-1], induction=values, previous_token_queries=3, induction_queries=2
    )


def test_heads_are_cells_with_layers_upwards(table, written):
    ax = scores(table)
    assert np.allclose(np.asarray(ax.images[0].get_array()), np.linspace(0, 1, 12).reshape(3, 4))
    assert ax.images[0].get_clim() == (0, 1)
    assert not ax.yaxis_inverted()
    assert [label.get_text() for label in ax.get_yticklabels()] == ["1", "2", "NoPE 3"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "1", "2", "3"]
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title()) == ("head", "layer", "induction score")
    assert written(ax)[-1] == "1.00"


def test_another_score_is_drawn_on_request(table):
    ax = scores(table, "previous_token")
    assert np.asarray(ax.images[0].get_array())[0, 0] == 1
    assert ax.get_title() == "previous token score"


def test_a_head_without_a_score_is_marked(table, written):
    table.loc[0, "induction"] = np.nan
    assert written(scores(table)).count("×") == 1


def test_a_score_that_is_not_there_is_refused(table):
    with pytest.raises(ValueError, match=r"score='induktion' .* the table has previous_token, induction"):
        scores(table, "induktion")


def test_cells_without_room_have_no_numbers(written):
    layer, head = (axis.ravel() for axis in np.indices((48, 40)))
    table = pd.DataFrame({"layer": layer, "kind": "rope", "head": head, "induction": 0.5, "induction_queries": 1})
    ax = scores(table, ax=plt.subplots(figsize=(5, 4))[1])
    assert written(ax) == []
    assert len(ax.get_yticklabels()) < 48
