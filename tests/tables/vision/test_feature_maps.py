"""Likeness, segments and lengths of planted features."""

# pandas declares what it gives as wide unions.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false

import numpy as np
import pytest
import torch
from scipy import stats

from llama4lab.tables.vision import norms, segments, similarity

FILLING = 8  # patches of the first picture's lower half


def test_the_cosine_is_that_of_the_two_vectors(make_features):
    grid = make_features(torch.randn(64, 10))
    table = similarity(grid, image=1, tile=2, row=1, column=3)
    line = 3 * 16 + 1 * 4 + 3
    assert table.index[table["chosen"]].tolist() == [line]
    expected = torch.cosine_similarity(grid.rows, grid.rows[line], dim=-1)
    assert table["cosine"].to_numpy() == pytest.approx(expected.numpy(), abs=1e-6)
    assert table["cosine"].max() == table["cosine"][line] == pytest.approx(1)


def test_a_vector_of_zeros_has_no_cosine(make_features):
    values = torch.randn(16, 4)
    values[3] = 0
    table = similarity(make_features(values), image=1, tile=0, row=0, column=0)
    assert table.index[table["cosine"].isna()].tolist() == [3]


def test_a_place_that_is_not_there_or_not_told_is_refused(make_features):
    grid = make_features(torch.randn(16, 4))
    with pytest.raises(ValueError, match="Say which one by image="):
        similarity(grid, tile=0, row=0, column=0)
    with pytest.raises(ValueError, match="row 2, column 0 of tile 0 of image 0"):
        similarity(grid, image=0, tile=0, row=2, column=0)


def test_planted_groups_become_segments_numbered_by_size(make_features):
    kind = torch.tensor([0] * 8 + [2] * FILLING + [1] * 18 + [2] * 6 + [0] * 24)
    values = torch.eye(3)[kind] * 5 + 0.1 * torch.randn(64, 3)
    table = segments(make_features(values), 3)
    assert table["segment"].tolist() == kind.tolist()
    assert segments(make_features(values), 3).equals(table)


def test_direction_alone_counts_unless_length_is_asked_for(make_features):
    direction = torch.arange(64) % 2
    far = torch.zeros(64)
    far[20:30] = 1
    values = torch.eye(2)[direction] * (1 + 9 * far)[:, None] + 0.01 * torch.randn(64, 2)
    one = segments(make_features(values), 2)["segment"].to_numpy()
    assert len(set(zip(one, direction.tolist(), strict=True))) == 2
    by_length = segments(make_features(values), 3, unit=False)["segment"].to_numpy()
    assert {by_length[i] for i in range(64) if not far[i]}.isdisjoint({by_length[20]})


def test_features_of_several_runs_share_segments(make_features):
    values = torch.eye(2)[torch.arange(64) % 2] + 0.01 * torch.randn(64, 2)
    table = segments([make_features(values), make_features(values.flip(1))], 2)
    assert table["source"].tolist() == [0] * 64 + [1] * 64
    assert table["segment"][:64].tolist() == (1 - table["segment"][64:]).tolist()


def test_more_segments_than_different_vectors_are_refused(make_features):
    with pytest.raises(ValueError, match="k=3 segments were asked for, of 2 different"):
        segments(make_features(torch.eye(2)[torch.arange(64) % 2]), 3)


def test_a_long_vector_is_flagged_and_scored_in_median_distances(make_features):
    values = torch.nn.functional.normalize(torch.randn(64, 6), dim=-1) * (1 + 0.1 * torch.randn(64, 1).abs())
    values[[40, 51]] *= 4
    table = norms(make_features(values))
    shown = np.ones(64, dtype=bool)
    shown[8:16] = False
    lengths = values.norm(dim=-1).numpy().astype(float)
    expected = (lengths - np.median(lengths[shown])) / stats.median_abs_deviation(lengths[shown])
    assert table["norm"].to_numpy() == pytest.approx(lengths, rel=1e-6)
    assert table["score"].to_numpy() == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert table.index[table["outlier"]].tolist() == [40, 51]


def test_of_a_normal_distribution_few_lengths_are_flagged(make_features):
    flagged = sum(norms(make_features(50 + torch.randn(64, 1)))["outlier"].sum() for _ in range(30))
    assert flagged <= 5


def test_filling_sets_no_scale_and_is_never_flagged(make_features):
    values = 1 + 0.1 * torch.rand(64, 1)
    values[8:16] = 1000
    assert not norms(make_features(values))["outlier"].any()


def test_equal_lengths_have_no_scale(make_features):
    table = norms(make_features(torch.ones(64, 3)))
    assert table["score"].isna().all()
    assert not table["outlier"].any()
