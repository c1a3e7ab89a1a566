from dataclasses import replace

import pandas as pd
import pytest

from llama4lab.model.loading import load
from llama4lab.run.attribution import attribute
from llama4lab.run.metrics import logit_diff
from llama4lab.run.sweeping import sweep
from llama4lab.tables.attribution import agreement, compare

CLEAN = "When Mary and John went to the store, John gave a drink to"
CORRUPTED = "When Mary and John went to the store, Mary gave a drink to"
METRIC = logit_diff(" Mary", " John")


@pytest.fixture(scope="module")
def tiny():
    return load()


def both(model, at, over, **options):
    own = attribute(model, CLEAN, CORRUPTED, at=at, metric=METRIC, **options)
    return own, sweep(model, CLEAN, CORRUPTED, at=at, over=over, metric=METRIC, progress=False)


@pytest.mark.parametrize(
    ("at", "over"),
    [
        ("layers.[26].self_attn.z", ["layer", "head", "position"]),
        ("layers.3.feed_forward.experts.out", ["layer", "expert", "position"]),
        (["layers.3.resid_mid", "layers.4.resid_pre"], {"component": None, "position": [3, 11]}),
        (["layers.3.resid_mid", "layers.3.resid_post"], ["hook_point", "position"]),
    ],
)
def test_each_cell_of_a_sweep_has_its_estimate_and_its_effect(tiny, at, over):
    own, true = both(tiny, at, over)
    axes = list(over)
    table, estimates = compare(own, true), own.table(axes).set_index(axes)["estimate"]
    assert len(table) == len(true)
    for line, cell in zip(table.to_dict("records"), true.table.to_dict("records"), strict=True):
        place = tuple(line[axis] for axis in axes)
        assert place == tuple(cell[axis] for axis in axes)
        assert line["effect"] == cell["effect"]
        assert line["estimate"] == estimates[place]
        assert line["token"] == cell["token"]
    assert {"component", "first_order", "jump"} <= set(table.columns)


def test_the_residual_stream_of_the_last_token_is_estimated_well(tiny):
    own, true = both(tiny, "layers.[0246].resid_pre", ["layer", "position"], steps=10)
    found = agreement(compare(own, true)).iloc[0]
    assert found["component"] == "resid_pre"
    assert found["cells"] == len(true)
    assert found["pearson"] > 0.95
    assert found["same_sign"] == 1.0


def test_agreement_measures_what_was_planted():
    effect = [0.0, 1.0, 2.0, 4.0, -1.0]
    table = pd.DataFrame(
        {
            "component": ["a"] * 5 + ["b"] * 5 + ["c"] * 5,
            "estimate": [3 * e + 1 for e in effect] + [-e for e in effect] + [0.0] * 5,
            "first_order": [e**3 for e in effect] + effect + effect,
            "effect": effect * 3,
        }
    )
    found = agreement(table).set_index("component")
    assert found.loc["a", "pearson"] == pytest.approx(1.0)
    assert 0.5 < found.loc["a", "pearson_first_order"] < 1.0
    assert found.loc["b", ["pearson", "spearman", "same_sign"]].tolist() == pytest.approx([-1.0, -1.0, 0.0])
    assert found.loc["b", "pearson_first_order"] == pytest.approx(1.0)
    assert pd.isna(found.loc["c", "pearson"])


def test_what_cannot_be_compared_is_refused(tiny):
    own, true = both(tiny, "layers.3.resid_mid", ["layer", "position"])
    other = attribute(tiny, CLEAN, CORRUPTED, at="layers.3.resid_mid", metric=METRIC, into="clean")
    with pytest.raises(ValueError, match="patches into clean, the sweep corrupted"):
        compare(other, true)
    with pytest.raises(ValueError, match=r"has the metric"):
        compare(replace(own, metric="loss"), true)
    with pytest.raises(ValueError, match="has the prompts"):
        compare(attribute(tiny, CORRUPTED, CLEAN, at="layers.3.resid_mid", metric=METRIC), true)
    elsewhere = attribute(tiny, CLEAN, CORRUPTED, at="layers.2.resid_mid", metric=METRIC)
    with pytest.raises(ValueError, match=r"'layers.3.resid_mid', which was not attributed"):
        compare(elsewhere, true)
    joined = sweep(
        tiny, CLEAN, CORRUPTED, at="layers.3.resid_mid", over={"position": [(2, 3)]}, metric=METRIC, progress=False
    )
    with pytest.raises(ValueError, match="single places"):
        compare(own, joined)
    zeros = sweep(
        *(tiny, CLEAN, CORRUPTED), at="layers.3.resid_mid", over=["position"], metric=METRIC, values=0, progress=False
    )
    with pytest.raises(ValueError, match='values="other"'):
        compare(own, zeros)
