"""What a sweep shows of its cells."""

import numpy as np
import pandas as pd
import pytest
import torch

import llama4lab as lab

CLEAN = [
    "When Mary and John went to the store, John gave a drink to",
    "When Paul and Lily went to the park, Lily gave a ball to",
]
CORRUPTED = [CLEAN[0].replace(", John", ", Mary"), CLEAN[1].replace(", Lily", ", Paul")]
METRIC = lab.metrics.logit_diff([" Mary", " Paul"], [" John", " Lily"])


@pytest.fixture(scope="module")
def sweep(tiny) -> lab.Sweep:
    return lab.sweep(
        tiny, CLEAN, CORRUPTED, at="layers.*.resid_post", over=["layer", "position"], metric=METRIC, progress=False
    )


def test_the_table_averages_rows_and_says_how_they_spread(sweep):
    table, rows = sweep.table, sweep.by_row
    assert list(table) == [
        "layer",
        "position",
        "token",
        "patched",
        "clean",
        "corrupted",
        "effect",
        "normalised",
        "effect_std",
        "pairs",
    ]
    means = rows.groupby(["layer", "position"], sort=False)["effect"].agg(["mean", "std"])
    assert np.allclose(means["mean"], table["effect"], atol=1e-4)
    assert np.allclose(means["std"], table["effect_std"], atol=1e-3)
    assert set(table["pairs"]) == {2}
    assert np.allclose(table["effect"], table["patched"] - table["corrupted"])
    assert np.allclose(table["normalised"], table["effect"] / (table["clean"] - table["corrupted"]))
    assert rows["row"].tolist() == [0] * len(sweep) + [1] * len(sweep)


def test_tokens_stand_beside_their_positions(sweep):
    first = sweep.table[sweep.table["layer"] == 0]
    texts = dict(zip(first["position"], first["token"], strict=True))
    assert texts[4] == " and" or texts[3] == " and"
    assert texts[2] == ""  # the two rows have different names there
    one = sweep.by_row.query("row == 1 and layer == 0")
    assert " Paul" in one["token"].tolist()


def test_a_tensor_has_the_axes_in_their_order(sweep):
    grid = sweep.tensor("patched")
    assert grid.shape == (8, 15)
    line = sweep.table.query("layer == 5 and position == 14").iloc[0]
    assert float(grid[5, 14]) == pytest.approx(line["patched"])
    assert float(sweep.tensor()[7, 14]) == pytest.approx(1, abs=1e-4)
    with pytest.raises(ValueError, match="no measure"):
        sweep.tensor("token")


def test_noising_is_normalised_the_other_way_round(tiny, sweep):
    noised = lab.sweep(
        tiny, CLEAN, CORRUPTED, at="layers.*.resid_post", over=["layer", "position"], metric=METRIC, into="clean",
        progress=False,
    )  # fmt: skip
    assert torch.allclose(noised.clean, sweep.clean, atol=1e-4)
    assert float(noised.tensor()[7, 14]) == pytest.approx(1, abs=1e-4)
    assert float(noised.tensor("patched")[7, 14]) == pytest.approx(float(sweep.corrupted.mean()), abs=1e-3)


def test_the_top_tokens_of_a_cell_are_those_of_its_run(tiny, sweep):
    shown = sweep.top_tokens({"layer": 7, "position": 14}, row=1)
    patched, clean = (shown[shown["run"] == run].reset_index(drop=True) for run in ("patched", "clean"))
    assert patched["token"].tolist() == clean["token"].tolist()
    expected = lab.tables.logits.top_tokens(lab.record(tiny, CLEAN[1])).head(5)
    assert patched["token"].tolist() == expected["token"].tolist()
    assert np.allclose(patched["prob"], expected["prob"], atol=1e-4)
    with pytest.raises(KeyError, match=r"layer \(0 to 7\)"):
        sweep.top_tokens({"layer": 9, "position": 0})


def test_a_sweep_survives_its_file(sweep, tmp_path):
    sweep.save(tmp_path / "sweep.safetensors")
    loaded = lab.Sweep.load(tmp_path / "sweep.safetensors")
    pd.testing.assert_frame_equal(loaded.table, sweep.table)
    pd.testing.assert_frame_equal(
        loaded.top_tokens({"layer": 3, "position": 4}), sweep.top_tokens({"layer": 3, "position": 4})
    )
    assert (loaded.metric, loaded.into, loaded.at, loaded.axes) == (sweep.metric, sweep.into, sweep.at, sweep.axes)
    with pytest.raises(ValueError, match="is not a run"):
        lab.Run.load(tmp_path / "sweep.safetensors")


def test_a_sweep_shows_itself_in_a_few_lines(sweep):
    assert repr(sweep).startswith("Sweep: 120 cells, layer (0 to 7), position (0 to 14); 2 pairs")
    assert "<table" in sweep._repr_html_()
