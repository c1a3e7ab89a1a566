"""Router tables against planted choices, and against models whose routing is edited."""

# pandas declares what it gives as wide unions.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

import math

import pandas as pd
import pytest
import torch

from llama4lab.run.patching import patched
from llama4lab.run.recording import record
from llama4lab.tables.routing import decisions, expert_load

LOGITS, INDICES, GATES = (f"layers.1.feed_forward.router.{name}" for name in ("logits", "indices", "gates"))
ROUTERS = "layers.*.feed_forward.router.*"


@pytest.fixture
def planted(make_prompt, make_run):
    """Two rows: "a b c" and "x <i>" behind one place of padding; one layer, one slot."""
    logits = torch.tensor([[[0, 2, -1], [1, 1, 1], [5, -3, 4]], [[9, 9, 9], [-2, -1, 0], [0, 0.5, -1]]]).float()
    indices = torch.tensor([[[1], [0], [0]], [[0], [2], [1]]])
    return make_run(make_prompt("a b c", "x <i>"), {LOGITS: logits, INDICES: indices})


def test_each_line_is_a_choice_of_a_token_and_padding_has_none(planted):
    table = decisions(planted)
    assert table[["row", "layer", "position", "slot"]].values.tolist() == [
        [0, 1, 0, 0],
        [0, 1, 1, 0],
        [0, 1, 2, 0],
        [1, 1, 1, 0],
        [1, 1, 2, 0],
    ]
    assert table["token"].tolist() == ["a", "b", "c", "x", "<i>"]
    assert table["modality"].tolist() == ["text", "text", "text", "text", "image"]


def test_expert_logit_gate_margin_and_runner_up_are_those_of_the_router(planted):
    table = decisions(planted)
    assert table["expert"].tolist() == [1, 0, 0, 2, 1]
    assert table["logit"].tolist() == [2, 1, 5, 0, 0.5]
    assert table["gate"].tolist() == pytest.approx([1 / (1 + math.exp(-x)) for x in (2, 1, 5, 0, 0.5)])
    assert table["margin"].tolist() == [2, 0, 1, 1, 0.5]
    assert table["runner_up"].tolist() == [0, 1, 2, 1, 0]


def test_entropy_is_in_nats_over_all_experts(planted):
    table = decisions(planted)
    assert table["entropy"][1] == pytest.approx(math.log(3))
    weights = [math.exp(x) for x in (0, 2, -1)]
    shares = [weight / sum(weights) for weight in weights]
    assert table["entropy"][0] == pytest.approx(-sum(share * math.log(share) for share in shares))


def test_margin_of_two_slots_counts_from_the_weaker_chosen_expert(make_prompt, make_run):
    logits = torch.tensor([[[0.0, 4.0, 1.0]]])
    table = decisions(make_run(make_prompt("a"), {LOGITS: logits, INDICES: torch.tensor([[[1, 2]]])}))
    assert table[["slot", "expert", "logit", "margin", "runner_up"]].values.tolist() == [
        [0, 1, 4, 1, 0],
        [1, 2, 1, 1, 0],
    ]


def test_there_is_no_margin_where_all_experts_are_chosen(make_prompt, make_run):
    logits = torch.tensor([[[0.0, 4.0, 1.0]]])
    table = decisions(make_run(make_prompt("a"), {LOGITS: logits, INDICES: torch.tensor([[[1, 2, 0]]])}))
    assert table["margin"].isna().all()
    assert table["runner_up"].isna().all()


def test_a_forced_expert_has_a_negative_margin_to_the_best_not_chosen(planted):
    planted.tensors[INDICES][0, 2, 0] = 1
    line = decisions(planted).loc[2]
    assert (line["expert"], line["logit"], line["margin"], line["runner_up"]) == (1, -3, -8, 0)


def test_a_barred_expert_is_no_runner_up_and_leaves_the_entropy_finite(planted):
    planted.tensors[LOGITS][0, 2] = torch.tensor([5.0, -torch.inf, -torch.inf])
    line = decisions(planted).loc[2]
    assert pd.isna(line["runner_up"])
    assert line["margin"] == math.inf
    assert line["entropy"] == 0


def test_recorded_gates_win_over_derived_ones(planted):
    planted.tensors[GATES] = torch.full((2, 3, 1), 0.125)
    assert decisions(planted)["gate"].tolist() == [0.125] * 5


def test_a_cut_run_keeps_rows_and_positions_of_the_prompt(planted):
    table = decisions(planted.cut(rows=1, positions=[2]))
    assert table[["row", "position", "token", "expert"]].values.tolist() == [[1, 2, "<i>", 1]]


@pytest.mark.parametrize("lost", [LOGITS, INDICES])
def test_what_was_not_recorded_is_asked_for_by_name(planted, lost):
    del planted.tensors[lost]
    with pytest.raises(KeyError, match=rf"{lost.split('.')[-1]}.*layers\.\*\.feed_forward\.router\.\*"):
        decisions(planted)


def test_layers_of_which_half_is_missing_are_refused(planted):
    planted.tensors["layers.3.feed_forward.router.logits"] = planted[LOGITS]
    with pytest.raises(KeyError, match="layers 3"):
        decisions(planted)


def test_a_dense_model_has_no_router_to_record(make_prompt, make_run):
    with pytest.raises(KeyError, match="all its layers are dense"):
        decisions(make_run(make_prompt("a"), {}, moe_layers=[]))


def test_load_counts_every_choice_and_lists_idle_experts(planted):
    table = expert_load(planted)
    assert table[["layer", "expert", "tokens"]].values.tolist() == [[1, 0, 2], [1, 1, 2], [1, 2, 1]]
    assert table["expert_load"].tolist() == [0.4, 0.4, 0.2]
    assert table["uniform"].tolist() == [1 / 3] * 3
    planted.tensors[INDICES][:] = 2
    assert expert_load(planted)["tokens"].tolist() == [0, 0, 5]


def test_load_needs_only_the_indices(planted):
    whole = expert_load(decisions(planted))
    del planted.tensors[LOGITS]
    pd.testing.assert_frame_equal(expert_load(planted), whole)


def test_load_by_modality_sums_to_one_in_each(planted):
    table = expert_load(planted, by="modality").set_index(["modality", "expert"])
    assert table["tokens"].to_dict() == {
        ("image", 0): 0,
        ("image", 1): 1,
        ("image", 2): 0,
        ("text", 0): 2,
        ("text", 1): 1,
        ("text", 2): 1,
    }
    assert table.groupby("modality")["expert_load"].sum().tolist() == [1, 1]


def test_load_of_a_filtered_table_still_knows_all_experts(planted):
    table = decisions(planted)
    assert expert_load(table[table["token"] == "a"])["tokens"].tolist() == [0, 1, 0]


def test_load_of_a_table_that_forgot_the_number_of_experts_is_refused(planted):
    table = decisions(planted)
    table.attrs.clear()
    with pytest.raises(ValueError, match="num_experts"):
        expert_load(table)
    table.attrs["num_experts"] = 2
    with pytest.raises(ValueError, match="expert 2"):
        expert_load(table)


def test_load_by_an_unknown_column_names_the_columns(planted):
    with pytest.raises(KeyError, match="modality"):
        expert_load(planted, by="domain")


def test_decisions_are_those_of_the_model_in_padded_batches(new_text_model):
    model = new_text_model(num_experts_per_tok=2)
    long, short = [5, 6, 7, 8, 9, 10], [11, 12, 13]
    alone = decisions(record(model, [short], at=ROUTERS))
    batch = decisions(record(model, [long, short], at=ROUTERS))
    second = batch[batch["row"] == 1]
    assert len(batch) == (6 + 3) * 2 * len(alone["layer"].unique())
    assert second["expert"].tolist() == alone["expert"].tolist()
    assert second["margin"].tolist() == pytest.approx(alone["margin"].tolist(), abs=1e-5)
    assert (batch["margin"] >= 0).all()
    assert (batch.groupby(["row", "layer", "position"])["logit"].is_monotonic_decreasing).all()


def test_a_forced_expert_shows_in_the_table_of_the_patched_model(new_text_model):
    model = new_text_model()
    with patched(model, {INDICES: torch.full((1, 4, 1), 3)}):
        table = decisions(record(model, [[5, 6, 7, 8]], at=ROUTERS))
    forced = table[table["layer"] == 1]
    assert forced["expert"].tolist() == [3] * 4
    assert (forced["gate"] - torch.sigmoid(torch.tensor(forced["logit"].to_numpy())).numpy()).abs().max() < 1e-6
