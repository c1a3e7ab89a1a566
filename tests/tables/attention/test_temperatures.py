"""The temperature of NoPE layers, against the formula and against queries of the model."""

# pandas declares what it gives as wide unions.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportOptionalMemberAccess=false

import math

import numpy as np
import pytest

from llama4lab.model.loading import load
from llama4lab.run.recording import record
from llama4lab.tables.attention import temperature


def test_temperature_is_the_formula_at_every_position_of_nope_layers(new_text_model):
    table = temperature(new_text_model(), 40)
    assert set(table["layer"]) == {3}
    assert set(table["kind"]) == {"nope"}
    assert table["position"].tolist() == list(range(40))
    expected = [1 + 0.5 * math.log(1 + (position + 1) // 8) for position in range(40)]
    np.testing.assert_allclose(table["temperature"], expected, rtol=1e-6)


def test_queries_of_a_padded_row_are_multiplied_by_it(new_text_model):
    model = new_text_model()
    run = record(model, [list(range(1, 31)), list(range(5, 25))], at="layers.3.self_attn.q*")
    ratio = (run["layers.3.self_attn.q_rot"] / run["layers.3.self_attn.q"])[:, :, 0, 0].double().numpy()
    factor = temperature(model, 30)["temperature"].to_numpy()
    np.testing.assert_allclose(ratio[0], factor, rtol=1e-4)
    np.testing.assert_allclose(ratio[1, 10:], factor[:20], rtol=1e-4)


@pytest.mark.parametrize("floor_scale", [8, 7])
def test_by_default_there_is_each_position_at_which_it_changes(new_text_model, floor_scale):
    model = new_text_model(floor_scale=floor_scale, max_position_embeddings=100)
    found = temperature(model)
    every = temperature(model, 100)["temperature"].to_numpy()
    changes = [0, *(np.flatnonzero(np.diff(every)) + 1).tolist()]
    assert sorted({*changes, 99}) == found["position"].tolist()
    np.testing.assert_array_equal(found["temperature"], every[found["position"]])


def test_without_tuning_it_is_1_and_without_nope_layers_there_is_no_line(new_text_model):
    assert temperature(new_text_model(attn_temperature_tuning=False), [0, 100])["temperature"].tolist() == [1, 1]
    assert temperature(new_text_model(no_rope_layers=[1] * 5)).empty


def test_the_tiny_checkpoint_has_a_rising_curve_in_each_nope_layer():
    for _, own in temperature(load()).groupby("layer"):
        assert own["temperature"].is_monotonic_increasing
        assert own["temperature"].iloc[0] == 1


def test_negative_positions_are_refused(new_text_model):
    for positions in (-1, [3, -2]):
        with pytest.raises(ValueError, match="count from 0"):
            temperature(new_text_model(), positions)
