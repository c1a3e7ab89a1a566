"""Tables of an attribution: sums, means and order."""

import numpy as np
import pytest
import torch

from llama4lab.run.attribution import attribute
from llama4lab.run.attribution_result import Attribution
from llama4lab.run.metrics import logit_diff
from llama4lab.run.recording import record

AT = ["layers.[13].resid_mid", "layers.[13].self_attn.head_out", "layers.[13].feed_forward.experts.out"]
CLEAN = ["The capital of France is", "When Mary and John went to the store, John gave a drink to"]
CORRUPTED = ["The capital of Spain is", "When Mary and John went to the store, Mary gave a drink to"]


@pytest.fixture(scope="module")
def attribution(tiny) -> Attribution:
    return attribute(tiny, CLEAN, CORRUPTED, at=AT, metric=logit_diff([" Paris", " Mary"], [" Madrid", " John"]))


def test_a_line_holds_the_mean_of_its_cell_over_the_rows(attribution):
    table = attribution.only(["layers.3.self_attn.head_out"]).table(["layer", "head", "position"])
    for line in table.sample(12, random_state=0).itertuples():
        cell = attribution["layers.3.self_attn.head_out"][:, line.position, line.head].double()
        assert line.estimate == pytest.approx(cell.mean().item(), abs=1e-6)
        assert line.estimate_std == pytest.approx(cell.std().item(), abs=1e-6)
        assert (line.pairs, line.layer) == (2, 3)
    assert np.allclose(table["estimate"], table["first_order"] + table["jump"])


def test_axes_that_are_not_asked_for_are_summed(attribution):
    fine = attribution.table(["component", "layer", "position"])
    coarse = attribution.table(["component"])
    sums = fine.groupby("component")["estimate"].sum()
    assert list(coarse["component"]) == ["self_attn.head_out", "resid_mid", "feed_forward.experts.out"]
    assert np.allclose(coarse["estimate"], sums[coarse["component"]])
    assert attribution.table().equals(fine)


def test_lines_come_in_the_order_of_the_axes(attribution):
    own = attribution.only(["layers.1.self_attn.head_out", "layers.3.self_attn.head_out"])
    table = own.table(["head", "layer"])
    assert table[["head", "layer"]].to_numpy().tolist() == [[h, i] for h in range(4) for i in (1, 3)]


def test_rows_average_to_the_table(attribution):
    over = ["component", "layer", "position"]
    rows = attribution.by_row(over)
    means = rows.groupby(over, sort=False)["estimate"].sum() / 2
    assert np.allclose(attribution.table(over)["estimate"], means)
    assert set(rows["row"]) == {0, 1}


def test_tokens_are_shown_where_the_rows_agree(attribution):
    rows = attribution.by_row(["component", "position"])
    last = attribution.prompt.input_ids.shape[1] - 1
    at_end = rows[rows["position"] == last]
    assert set(at_end[at_end["row"] == 0]["token"]) == {" is"}
    assert set(at_end[at_end["row"] == 1]["token"]) == {" to"}
    table = attribution.table(["component", "position"])
    assert set(table[table["position"] == last]["token"]) == {""}


def test_experts_share_what_their_slots_write(attribution):
    own = attribution.only(["layers.3.feed_forward.experts.out"])
    by_expert, by_slot = own.table(["layer", "expert"]), own.table(["layer", "slot"])
    assert len(by_expert) == 8
    assert by_expert["estimate"].sum() == pytest.approx(by_slot["estimate"].sum(), abs=1e-4)


def test_an_axis_that_is_not_there_is_refused(attribution):
    with pytest.raises(ValueError, match=r"no axis 'neuron'; they have layer"):
        attribution.table(["layer", "neuron"])
    with pytest.raises(ValueError, match="over is empty"):
        attribution.table([])
    with pytest.raises(KeyError, match="was not attributed"):
        attribution["layers.0.resid_pre"]
    with pytest.raises(KeyError, match="was not attributed"):
        attribution.only(["layers.0.resid_pre"])


def test_tiles_are_counted_in_their_row(tiny, picture):
    prompts = []
    for color in ("red", "blue"):
        image = picture.copy()
        image.paste(color, (0, 0, 24, 24))
        rows = ["<|image|> One.", "<|image|> Two."]
        prompts.append(tiny.prompt(rows, images=[[image], [image.resize((96, 48))]]))
    own = attribute(tiny, *prompts, at="vision_model.layers.1.resid_mid", metric=logit_diff(" red", " blue"))
    table = own.by_row(["layer", "tile", "patch"])
    tiles = [image.num_tiles for image in prompts[1].images]
    assert table.groupby("row")["tile"].nunique().tolist() == tiles
    values = own["vision_model.layers.1.resid_mid"]
    second = table.set_index(["row", "tile"]).loc[(1, 1), "estimate"]  # patch by patch
    assert torch.allclose(torch.tensor(np.asarray(second)).float(), values[tiles[0] + 1])


def test_an_attribution_shows_its_largest_estimates(attribution):
    html = attribution._repr_html_()
    assert "largest estimates" in html
    assert html.count("<tr>") == 8
    assert f"{attribution.table()['estimate'].abs().max():.3g}" in html


def test_an_attribution_is_saved_and_read(attribution, tiny, tmp_path):
    attribution.save(tmp_path / "a.safetensors")
    read = Attribution.load(tmp_path / "a.safetensors")
    assert read.names == attribution.names
    assert all(torch.equal(read[name], attribution[name]) for name in attribution.names)
    assert read.table(["component", "layer"]).equals(attribution.table(["component", "layer"]))
    assert "6 hook points, 2 pairs" in repr(read)
    record(tiny, CLEAN).save(tmp_path / "run.safetensors")
    with pytest.raises(ValueError, match="attribution"):
        Attribution.load(tmp_path / "run.safetensors")
