# matplotlib and pandas declare what they give as wide unions.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportOptionalMemberAccess=false
# pyright: reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import numpy as np
import pandas as pd
import pytest

from llama4lab.viz.expert_colors import expert_color
from llama4lab.viz.routing.periods import load_over_time


def loads(shares: list[list[float]]) -> pd.DataFrame:
    lines = [
        {"layer": 3, "first": 4 * place, "last": 4 * place + 3, "expert": expert, "tokens": round(100 * share)}
        | {"expert_load": share}
        for place, row in enumerate(shares)
        for expert, share in enumerate(row)
    ]
    return pd.DataFrame(lines)


def test_shares_are_stacked_in_each_stretch(read):
    ax = load_over_time(loads([[0.5, 0.25, 0.25], [0, 0.5, 0.5]]), 3)
    heights = np.array([[bar.get_height() for bar in bars] for bars in ax.containers])
    bottoms = np.array([[bar.get_y() for bar in bars] for bars in ax.containers])
    assert heights.T.tolist() == [[0.5, 0.25, 0.25], [0, 0.5, 0.5]]
    assert bottoms.T.tolist() == [[0, 0.5, 0.75], [0, 0, 0.5]]
    assert ax.containers[1].patches[0].get_facecolor()[:3] == pytest.approx(expert_color(1))
    assert read.labels(ax.xaxis) == ["0–3", "4–7"]
    assert read.legend(ax) == ["2", "1", "0"]  # as they lie above each other


def test_small_experts_share_a_band_that_fills_the_column(read):
    ax = load_over_time(loads([[0.5, 0.3, 0.15, 0.05]]), 3, most=2)
    assert read.legend(ax) == ["2 others", "1", "0"]
    assert ax.containers[-1].patches[0].get_height() == pytest.approx(0.2)


def test_a_layer_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="the table has layer 3"):
        load_over_time(loads([[1.0]]), 1)
