# matplotlib and pandas declare what they give as wide unions.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportOptionalMemberAccess=false
# pyright: reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import numpy as np
import pandas as pd
import pytest

from llama4lab.viz.routing.expert_pairs import coactivation, similarity


def test_similarities_are_a_matrix_without_experts_with_themselves(read):
    expert, other = (axis.ravel() for axis in np.indices((3, 3)))
    cosine = np.array([[1, 0.25, -0.5], [0.25, 1, 0], [-0.5, 0, 1]])
    table = pd.DataFrame({"layer": 1, "expert": expert, "other": other, "cosine": cosine.ravel()})
    ax = similarity(table, 1)
    expected = np.where(np.eye(3, dtype=bool), np.nan, cosine)
    assert np.array_equal(read.picture(ax), expected, equal_nan=True)
    assert ax.images[0].get_clim() == (-0.5, 0.5)
    assert ax.yaxis_inverted()
    with pytest.raises(ValueError, match="layer 1"):
        similarity(table, 2)


def test_pairs_that_never_meet_are_zero(read):
    table = pd.DataFrame({"layer": 1, "expert": [0, 1], "other": [1, 0], "tokens": 4, "share": [0.5, 0.25]})
    table.attrs = {"num_experts": 3}
    ax = coactivation(table, 1)
    expected = [[np.nan, 0.5, 0], [0.25, np.nan, 0], [0, 0, np.nan]]
    assert np.array_equal(read.picture(ax), expected, equal_nan=True)
    assert ax.images[0].get_clim() == (0, 0.5)
