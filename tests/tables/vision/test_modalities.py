"""Experts by modality against planted routes and an independent count of information."""

# pandas declares what it gives as wide unions.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import mutual_info_score

import llama4lab as lab
from llama4lab.tables.vision import modality_information, modality_shares

ROUTER = "layers.*.feed_forward.router.*"


def choices(image: list[int], text: list[int], num_experts: int = 4) -> pd.DataFrame:
    """Decisions of one layer in which so many image and text tokens went to each expert."""
    experts = [expert for counts in (image, text) for expert, count in enumerate(counts) for _ in range(count)]
    kinds = ["image"] * sum(image) + ["text"] * sum(text)
    table = pd.DataFrame({"row": 0, "layer": 1, "position": range(len(kinds)), "slot": 0, "modality": kinds})
    table["expert"] = experts
    table.attrs["num_experts"] = num_experts
    return table


@pytest.fixture(scope="module")
def run(tiny, two_rows):
    return lab.record(tiny, two_rows, at=ROUTER)


def test_experts_of_their_own_tell_all_about_the_modality():
    (line,) = modality_information(choices([5, 7, 0, 0], [0, 0, 9, 3])).to_dict("records")
    assert line["share_of_entropy"] == pytest.approx(1)
    assert line["entropy"] == pytest.approx(np.log(2))
    assert line["tokens"] == 24


def test_experts_that_both_use_alike_tell_nothing():
    (line,) = modality_information(choices([10, 20, 30, 0], [20, 40, 60, 0])).to_dict("records")
    assert line["information"] == pytest.approx(0, abs=1e-12)
    assert line["chance"] > line["information"]


def test_chance_is_what_independent_tokens_show_by_the_asymptotic_law():
    """2 N times the information is chi-squared with (experts - 1) (modalities - 1) degrees of freedom."""
    (line,) = modality_information(choices([300] * 4, [200] * 4)).to_dict("records")
    assert line["chance"] == pytest.approx(3 / (2 * 2000), rel=0.4)


def test_information_is_that_of_an_independent_count(run):
    decisions = lab.tables.routing.decisions(run).query("modality != 'special'")
    table = modality_information(run).set_index("layer")
    for layer, own in decisions.groupby("layer"):
        assert table.loc[layer, "information"] == pytest.approx(
            mutual_info_score(own["modality"].astype(str), own["expert"]), abs=1e-9
        )


def test_shares_are_those_of_image_and_text_tokens_alone(run):
    table = modality_shares(run)
    assert set(table["modality"]) == {"image", "text"}
    counts = lab.tables.routing.decisions(run).query("layer == 3")["modality"].value_counts()
    sizes = table.query("layer == 3").groupby("modality")["group_tokens"].first()
    assert sizes["image"] == counts["image"]
    assert sizes["text"] == counts["text"]
    assert counts["special"] > 0
    assert table.groupby(["layer", "modality"])["share"].sum().to_numpy() == pytest.approx(1)


def test_with_two_experts_a_token_shares_sum_to_two_behind_padding(new_model, small_prompt):
    run = lab.record(new_model(num_experts_per_tok=2), small_prompt, at=ROUTER)
    table = modality_shares(run)
    assert table["layer"].unique().tolist() == run.meta["moe_layers"]
    assert table.groupby(["layer", "modality"])["share"].sum().to_numpy() == pytest.approx(2)
    assert (table.query("modality == 'image'")["group_tokens"] == 20).all()
    assert (modality_information(run)["tokens"] == int(small_prompt.attention_mask.sum())).all()


def test_statistics_of_a_corpus_give_the_same(tiny, two_rows, run):
    stats = lab.routing_stats(tiny, {"seen": [two_rows]}, progress=False)
    ours, theirs = modality_information(run), modality_information(stats)
    assert ours[["layer", "tokens"]].equals(theirs[["layer", "tokens"]])
    assert ours["information"].to_numpy() == pytest.approx(theirs["information"].to_numpy())
    one, other = modality_shares(run), modality_shares(stats)
    assert one["tokens"].tolist() == other["tokens"].tolist()


def test_one_modality_alone_is_refused(tiny):
    run = lab.record(tiny, "The capital of France is", at=ROUTER)
    assert set(modality_shares(run)["modality"]) == {"text"}
    with pytest.raises(ValueError, match="only text tokens"):
        modality_information(run)
    with pytest.raises(ValueError, match="neither"):
        modality_shares(lab.tables.routing.decisions(run).query("modality == 'special'"))
    with pytest.raises(KeyError, match="modality"):
        modality_shares(lab.tables.routing.decisions(run).drop(columns="modality"))
