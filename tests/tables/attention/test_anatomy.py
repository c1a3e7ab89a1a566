"""Angles, content, position and bands, against the scores of models and complex numbers turned by hand."""

# pandas declares what it gives as wide unions.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportOptionalMemberAccess=false

import math

import numpy as np
import pytest
import torch

from llama4lab.model.loading import load
from llama4lab.run.generation import generate
from llama4lab.run.recording import record
from llama4lab.tables.attention import angles, score_bands, score_bound, score_split

ROWS = [list(range(1, 20)), list(range(5, 16))]  # the second has 8 places of padding
AT = ["layers.*.self_attn.[qk]*", "layers.*.self_attn.scores"]
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.fixture(scope="module")
def recorded(new_text_model):
    """A model with chosen settings and its run of rows of unequal length."""
    made = {}

    def make(**changes):
        key = repr(sorted(changes.items()))
        if key not in made:
            model = new_text_model(**changes)
            made[key] = model, record(model, ROWS, at=AT)
        return made[key]

    return make


def seen_scores(run, layer: int, head: int) -> torch.Tensor:
    """The scores of the model that no mask hides, of all rows in one."""
    scores = run[f"layers.{layer}.self_attn.scores"][:, head]
    valid = run.prompt.attention_mask.bool()
    return scores[(scores > -1e30) & valid[:, :, None] & valid[:, None, :]]


def complex_vectors(run, layer: int, name: str) -> torch.Tensor:
    return torch.view_as_complex(run[f"layers.{layer}.self_attn.{name}"].double().unflatten(-1, (-1, 2)).contiguous())


def test_a_score_is_bound_only_in_rope_layers_with_norm(new_text_model):
    table = score_bound(new_text_model())
    assert len(table) == 5 * 4
    assert np.isinf(table["bound"]).tolist() == (table["kind"] == "nope").tolist()
    rope = table[table["kind"] == "rope"]
    assert set(rope["bound"]) == {4.0}
    assert rope["ratio"].tolist() == pytest.approx([math.exp(8)] * 16)
    assert np.isinf(score_bound(new_text_model(use_qk_norm=False))["bound"]).all()


def test_a_temperature_that_a_layer_was_given_multiplies_its_bound(new_text_model):
    model = new_text_model(num_hidden_layers=2)
    model.text.layers[0].self_attn.tuning = 3.0
    assert score_bound(model).groupby("layer")["bound"].first().tolist() == [12, 4]


@pytest.mark.parametrize("changes", [{}, {"use_qk_norm": False}, {"attention_chunk_size": None}])
def test_scores_and_angles_are_those_of_the_keys_that_the_model_sees(recorded, changes):
    model, run = recorded(**changes)
    table = angles(run)
    bounds = score_bound(model).set_index(["layer", "head"])["bound"]
    for (layer, head), own in table.groupby(["layer", "head"]):
        scores = seen_scores(run, layer, head).double().numpy()
        assert set(own["pairs"]) == {len(scores)}
        np.testing.assert_allclose(own["score"], np.quantile(scores, own["quantile"]), atol=1e-5)
        np.testing.assert_allclose(np.cos(np.radians(own["angle"])), own["cosine"], atol=1e-9)
        if math.isfinite(bounds[layer, head]):
            np.testing.assert_allclose(own["cosine"] * bounds[layer, head], own["score"], atol=1e-3)
            assert own["score"].abs().max() <= bounds[layer, head]


def test_cosines_of_a_layer_without_norm_are_scores_by_lengths(recorded):
    _, run = recorded(use_qk_norm=False)
    q, k = (run[f"layers.1.self_attn.{name}"][:, :, place].double() for name, place in (("q_rot", 3), ("k_rot", 1)))
    cosines = torch.nn.functional.cosine_similarity(q[:, :, None], k[:, None], dim=-1)
    scores, valid = run["layers.1.self_attn.scores"][:, 3], run.prompt.attention_mask.bool()
    kept = cosines[(scores > -1e30) & valid[:, :, None] & valid[:, None, :]].numpy()
    own = angles(run, 1, quantiles=[0.0, 0.5, 1.0]).query("head == 3")
    np.testing.assert_allclose(own["cosine"], np.quantile(kept, [0, 0.5, 1]), atol=1e-6)


@pytest.mark.parametrize("changes", [{}, {"use_qk_norm": False}, {"rope_parameters": YARN}])
@pytest.mark.parametrize("layer", [1, 3])
def test_content_and_position_are_the_score_with_and_without_distance(recorded, changes, layer):
    model, run = recorded(**changes)
    for row, head in ((0, 0), (1, 3)):
        table = score_split(run, layer, head, row)
        scores = run[f"layers.{layer}.self_attn.scores"][row, head].double().numpy()
        query, key = np.array(table["query"]), np.array(table["key"])
        np.testing.assert_allclose(table["score"], scores[query, key], atol=1e-5)
        np.testing.assert_allclose(table["content"] + table["positional"], table["score"], atol=1e-9)
        # Turned back by its own position, each vector is as at distance 0, norms and factors included.
        speeds = model.text.rotary_emb(torch.tensor([[1]]))[0, 0].double()
        speeds = torch.atan2(speeds[:, 1], speeds[:, 0]) * (layer != 3)
        start = 8 * row
        back = torch.polar(torch.ones(1, dtype=torch.double), -(torch.arange(19)[:, None] - start) * speeds)
        q = complex_vectors(run, layer, "q_rot")[row, :, head] * back
        k = complex_vectors(run, layer, "k_rot")[row, :, head // 2] * back
        content = (q[query] * k[key].conj()).real.sum(-1) / 4
        np.testing.assert_allclose(table["content"], content, atol=1e-4)
        assert (table["distance"] == query - key).all()
        assert table["key"].min() == start
        at_once = table.query("distance == 0")["positional"]
        np.testing.assert_allclose(at_once, 0, atol=1e-5)
        assert (table["positional"].abs().max() < 1e-9) == (layer == 3)


@pytest.mark.parametrize("changes", [{}, {"use_qk_norm": False}, {"rope_parameters": YARN}])
def test_bands_add_up_to_the_score_and_turn_at_the_speeds_of_rope(recorded, changes):
    model, run = recorded(**changes)
    bands, split = score_bands(model, run, 2, 1, 1), score_split(run, 2, 1, 1)
    sums = bands.groupby(["query", "key"])[["contribution", "content", "positional"]].sum().to_numpy()
    np.testing.assert_allclose(sums, split[["score", "content", "positional"]], atol=1e-5)
    # Each band alone: |a| |b| cos(angle at distance 0 + speed * distance).
    q, k = complex_vectors(run, 2, "q")[1, :, 1], complex_vectors(run, 2, "k")[1, :, 0]
    q, k = q[bands["query"], bands["band"]], k[bands["key"], bands["band"]]
    phase = (q * k.conj()).angle().numpy()
    size = np.where(np.abs(np.cos(phase)) > 1e-3, bands["content"] / np.cos(phase), np.nan)
    expected = size * np.cos(phase + bands["frequency"] * bands["distance"])
    known = np.isfinite(size)
    np.testing.assert_allclose(bands["contribution"][known], expected[known], atol=1e-4)
    np.testing.assert_allclose(bands["wavelength"] * bands["frequency"], 2 * np.pi)
    assert bands.groupby("band")["frequency"].first().is_monotonic_decreasing


def test_default_speeds_are_powers_of_theta(recorded):
    model, run = recorded()
    speeds = score_bands(model, run, 1, 0, query=4).groupby("band")["frequency"].first()
    np.testing.assert_allclose(speeds, 500000.0 ** (-np.arange(8) / 8), rtol=1e-5)


def test_bands_of_a_nope_layer_do_not_turn(recorded):
    model, run = recorded()
    table = score_bands(model, run, 3, 2, query=-1)
    assert set(table["query"]) == {18}
    assert set(table["frequency"]) == {0}
    assert set(table["wavelength"]) == {math.inf}
    assert set(table["positional"]) == {0}


def test_the_tiny_checkpoint_and_generated_text_can_be_taken_apart():
    model = load()
    run = generate(model, "The capital of France is", max_new_tokens=3, at=AT)
    for layer in (1, 3):
        table = score_split(run, layer, 2)
        scores = run[f"layers.{layer}.self_attn.scores"][0, 2].double().numpy()
        np.testing.assert_allclose(table["score"], scores[table["query"], table["key"]], atol=1e-5)
        sums = score_bands(model, run, layer, 2).groupby(["query", "key"])["contribution"].sum()
        np.testing.assert_allclose(sums, table["score"], atol=1e-5)


def test_a_model_in_bfloat16_passes_for_the_one_that_was_run(new_text_model):
    model = new_text_model(dtype=torch.bfloat16)
    run = record(model, ROWS, at=AT)
    sums = score_bands(model, run, 1, 3, 1).groupby(["query", "key"])["contribution"].sum()
    np.testing.assert_allclose(sums, score_split(run, 1, 3, 1)["score"], atol=1e-5)


def test_another_rotation_than_that_of_the_run_is_refused(recorded, new_text_model):
    _, run = recorded()
    with pytest.raises(ValueError, match="not turned as this model"):
        score_bands(new_text_model(rope_parameters={"rope_type": "default", "rope_theta": 100.0}), run, 1, 0)


def test_what_is_not_there_is_named(recorded):
    model, run = recorded()
    with pytest.raises(IndexError, match="heads 0 to 3"):
        score_split(run, 1, 4)
    with pytest.raises(IndexError, match="rows 0, 1"):
        score_split(run, 1, 0, 2)
    with pytest.raises(IndexError, match="queries 8 to 18"):
        score_bands(model, run, 1, 0, 1, query=7)
    with pytest.raises(KeyError, match="was not recorded"):
        score_split(run, 9, 0)
    for quantiles in ([], [1.5]):
        with pytest.raises(ValueError, match="from 0 to 1"):
            angles(run, quantiles=quantiles)
