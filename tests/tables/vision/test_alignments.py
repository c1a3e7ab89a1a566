"""CKA against its definition by tables of products, and its laws."""

# pandas declares what it gives as wide unions.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

import numpy as np
import pytest
import torch

import llama4lab as lab
from llama4lab.tables.vision import cka, features

SHOWN = np.r_[0:8, 16:64]  # without the filling of the first picture


def value(table, first: str, second: str) -> float:
    return table.set_index(["first", "second"]).loc[(first, second), "cka"]


def plain(one: np.ndarray, other: np.ndarray) -> float:
    """Kornblith et al. 2019, equations 3 and 4: centred tables of products."""
    centre = np.eye(len(one)) - 1 / len(one)

    def hsic(a, b):
        return np.trace(a @ a.T @ centre @ b @ b.T @ centre)

    return hsic(one, other) / np.sqrt(hsic(one, one) * hsic(other, other))


def unbiased(one: np.ndarray, other: np.ndarray) -> float:
    """Song et al. 2012, equation 5, as it stands there."""
    n, ones = len(one), np.ones(len(one))

    def hsic(a, b):
        k, m = a @ a.T, b @ b.T
        np.fill_diagonal(k, 0)
        np.fill_diagonal(m, 0)
        middle = (ones @ k @ ones) * (ones @ m @ ones) / ((n - 1) * (n - 2))
        return (np.trace(k @ m) + middle - 2 / (n - 2) * (ones @ k @ m @ ones)) / (n * (n - 3))

    return hsic(one, other) / np.sqrt(hsic(one, one) * hsic(other, other))


@pytest.mark.parametrize(("debiased", "definition"), [(True, unbiased), (False, plain)])
def test_alignment_follows_its_definition(make_features, debiased, definition):
    one = torch.randn(64, 12) + 2
    other = torch.cat([one[:, :5] ** 2, torch.randn(64, 30)], 1)
    table = cka({"a": make_features(one), "b": make_features(other)}, debiased=debiased)
    expected = definition(one[SHOWN].double().numpy(), other[SHOWN].double().numpy())
    assert value(table, "a", "b") == value(table, "b", "a") == pytest.approx(expected, abs=1e-8)
    assert value(table, "a", "a") == value(table, "b", "b") == pytest.approx(1)
    assert (table["places"] == 56).all()


def test_turning_moving_and_scaling_change_nothing(make_features):
    one, other = torch.randn(64, 12, dtype=torch.float64), torch.randn(64, 7, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64))[0]
    mixed = one @ turn * 30 + 5
    table = cka({"a": make_features(one), "turned": make_features(mixed), "b": make_features(other)})
    assert value(table, "a", "turned") == pytest.approx(1)
    assert value(table, "a", "b") == pytest.approx(value(table, "turned", "b"))


def test_features_that_have_nothing_to_do_with_each_other_are_unaligned_only_without_bias(make_features):
    draws = []
    for _ in range(20):
        named = {name: make_features(torch.randn(64, 400)) for name in "ab"}
        draws.append([value(cka(named, debiased=debiased), "a", "b") for debiased in (True, False)])
    assert abs(np.mean(draws, axis=0)[0]) < 0.02
    assert np.mean(draws, axis=0)[1] > 0.7


def test_where_grains_meet_the_patches_of_an_image_token_are_averaged(make_features):
    patches, tokens = make_features(torch.randn(64, 9)), make_features(torch.randn(16, 5), at="image_features")
    mixed = cka([patches, tokens])
    assert (mixed["places"] == 14).all()
    averaged = cka([patches.by_token(), tokens])
    assert mixed.equals(averaged)
    assert mixed["first"].unique().tolist() == ["vision_model.layers.0.resid_post", "image_features"]


def test_a_hook_point_where_all_places_are_alike_has_no_alignment(make_features):
    table = cka({"a": make_features(torch.randn(64, 4)), "same": make_features(torch.full((64, 4), 0.1))})
    assert np.isnan(value(table, "a", "same"))
    assert value(table, "a", "a") == pytest.approx(1)


def test_of_a_run_every_hook_point_with_a_vector_for_each_place_is_taken(tiny_run):
    table = cka(tiny_run)
    assert "layers.1.feed_forward.router.logits" in set(table["first"])
    assert "layers.1.feed_forward.router.indices" not in set(table["first"])
    assert value(table, "image_features", "embed_merged") == pytest.approx(1)


def test_what_cannot_be_compared_is_refused(make_features, tiny_run):
    one = make_features(torch.randn(64, 4))
    with pytest.raises(ValueError, match="are of one hook point"):
        cka([one, one])
    with pytest.raises(ValueError, match="different places"):
        cka([one, features(tiny_run, "image_features")])
    with pytest.raises(ValueError, match="no features to compare"):
        cka(lab.record(lab.load(), "words", at="layers.0.self_attn.pattern"))
