# matplotlib and pandas declare what they give as wide unions.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportOptionalMemberAccess=false
# pyright: reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import numpy as np
import pandas as pd
import pytest

from llama4lab.viz.expert_colors import expert_color
from llama4lab.viz.routing.importances import importance, rank_correlation


@pytest.fixture
def table() -> pd.DataFrame:
    layer, expert = (axis.ravel() for axis in np.indices((2, 3)))
    found = pd.DataFrame({"layer": 2 * layer + 1, "expert": expert, "tokens": [1, 2, 0, 4, 5, 6]})
    found = found.assign(frequency=found["tokens"] / 10, reap=[1, 2, np.nan, 4, 5, 6], zero=[0.5, 0.1, 0, -0.2, 0, 1])
    found.attrs = {"metric": "loss"}
    return found


def test_experts_with_tokens_are_dots_in_their_colours(table, written, read):
    ax = importance(table)
    assert ax.collections[0].get_offsets().tolist() == [[1, 0.5], [2, 0.1], [4, -0.2], [5, 0], [6, 1]]
    assert ax.collections[0].get_facecolor()[1, :3] == pytest.approx(expert_color(1))
    assert set(written(ax)) == {"1.0", "1.1", "3.0", "3.1", "3.2"}
    assert ax.get_xlabel() == "REAP: mean |f(gate x)|"
    assert ax.get_ylabel() == "effect on loss\n(writes nothing)"
    assert read.legend(ax) == ["0", "1", "2"]


def test_dots_are_larger_with_more_tokens(table):
    sizes = importance(table, layer=3).collections[0].get_sizes()
    assert sizes[0] < sizes[1] < sizes[2]


def test_one_layer_and_other_measures_can_be_drawn(table, written):
    ax = importance(table, x="frequency", y="reap", layer=3)
    assert ax.collections[0].get_offsets()[:, 0].tolist() == [0.4, 0.5, 0.6]
    assert set(written(ax)) == {"0", "1", "2"}
    with pytest.raises(ValueError, match="needs the column 'mean'"):
        importance(table, y="mean")
    with pytest.raises(ValueError, match="no expert of the table serves"):
        importance(table.assign(tokens=0))


def test_labels_do_not_lie_on_each_other(table, written):
    many = pd.concat([table.assign(layer=layer, zero=0.5, reap=1.0, tokens=1) for layer in range(3)])
    assert len(written(importance(many))) == 1


def test_rank_correlations_are_a_matrix_from_minus_one_to_one(read, written):
    names = ["zero", "reap"]
    ax = rank_correlation(pd.DataFrame([[1, -0.5], [-0.5, 1]], names, names))
    assert read.picture(ax).tolist() == [[1, -0.5], [-0.5, 1]]
    assert ax.images[0].get_clim() == (-1, 1)
    assert read.labels(ax.xaxis) == ["zero", "REAP"]
    assert written(ax) == ["1.00", "-0.50", "-0.50", "1.00"]
