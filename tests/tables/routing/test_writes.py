"""What experts write, against experts whose write is a known function of the gated input."""

# pandas declares what it gives as wide unions.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportCallIssue=false, reportOperatorIssue=false, reportIndexIssue=false

import numpy as np
import pytest
import torch

from llama4lab.run.recording import record
from llama4lab.tables import logit_attribution
from llama4lab.tables.routing.choices import decisions
from llama4lab.tables.routing.writes import contributions, expert_attribution

AT = [
    "layers.*.feed_forward.router.*",
    "layers.*.feed_forward.experts.out",
    "layers.*.feed_forward.shared_expert.out",
    "layers.*.self_attn.out",
]


def written(z, gate):
    """The one neuron of a planted expert: gate and up both read gate * z."""
    x = torch.as_tensor(gate * z)
    return (x * torch.nn.functional.silu(x)).numpy()


@pytest.mark.parametrize("slots", [1, 2])
def test_the_gate_is_inside_of_what_was_written_not_a_factor_on_it(planted_run, slots):
    _, run = planted_run(num_experts_per_tok=slots)
    table = decisions(run)
    z, gate = table["logit"].to_numpy(), table["gate"].to_numpy()
    assert len(table) == 7 * 2 * slots
    np.testing.assert_allclose(table["routed_norm"], written(z, gate), rtol=1e-5)
    as_output_weight = gate * written(z, 1.0)
    assert (np.abs(table["routed_norm"] - as_output_weight) > 0.01 * as_output_weight).all()


def test_silent_parts_have_no_norm_and_no_cosine(planted_run):
    table = decisions(planted_run()[1])
    assert (table[["shared_norm", "attention_norm"]] == 0).all().all()
    assert table["cosine"].isna().all()


def test_slots_add_up_as_vectors(planted_run):
    _, run = planted_run(num_experts_per_tok=2)
    table = contributions(run)
    each = decisions(run).pivot(index=["row", "layer", "position"], columns="slot", values="routed_norm")
    # Planted experts write along directions at right angles.
    np.testing.assert_allclose(table["routed_norm"], np.hypot(each[0], each[1]), rtol=1e-6)
    assert (table["routed_share"] == 1).all()


def test_norms_and_cosines_are_those_of_the_recorded_vectors(new_text_model):
    run = record(new_text_model(num_experts_per_tok=2), [[5, 6, 7, 8], [9, 10]], at=AT)
    table, slots = contributions(run), decisions(run)
    for line in table.itertuples():
        place = (line.row, line.position)
        name = f"layers.{line.layer}"
        routed = run[f"{name}.feed_forward.experts.out"][place].double().numpy()
        shared = run[f"{name}.feed_forward.shared_expert.out"][place].double().numpy()
        both = routed.sum(0)
        assert line.routed_norm == pytest.approx(np.linalg.norm(both))
        assert line.shared_norm == pytest.approx(np.linalg.norm(shared))
        assert line.attention_norm == pytest.approx(run[f"{name}.self_attn.out"][place].norm().item(), rel=1e-5)
        assert line.cosine == pytest.approx(both @ shared / np.linalg.norm(both) / np.linalg.norm(shared))
        own = slots.query("row == @line.row and position == @line.position and layer == @line.layer")
        assert own["routed_norm"].tolist() == pytest.approx(np.linalg.norm(routed, axis=1).tolist())
        cosine = routed @ shared / np.linalg.norm(routed, axis=1) / np.linalg.norm(shared)
        assert own["cosine"].tolist() == pytest.approx(cosine.tolist())
    assert len(table) == (4 + 2) * table["layer"].nunique()


def test_decisions_have_only_the_columns_that_were_recorded(new_text_model):
    model = new_text_model()
    plain = decisions(record(model, [[5, 6]], at=AT[:1]))
    assert not {"routed_norm", "shared_norm", "attention_norm", "cosine"} & set(plain)
    some = decisions(record(model, [[5, 6]], at=[AT[0], AT[3]]))
    assert "attention_norm" in some
    assert "routed_norm" not in some


def test_contributions_ask_for_what_was_not_recorded(new_text_model):
    model = new_text_model()
    with pytest.raises(KeyError, match=r"shared_expert\.out"):
        contributions(record(model, [[5, 6]], at=AT[:2]))
    assert contributions(record(model, [[5, 6]], at=AT[:3]))["attention_norm"].isna().all()


def test_attribution_of_experts_is_that_part_of_the_attribution_of_the_logit(new_text_model):
    model = new_text_model(num_experts_per_tok=2)
    run = record(model, [[5, 6, 7], [8, 9]], at=logit_attribution.needs(model))
    whole = logit_attribution.contributions(model, run, 11, 12, position=None)
    table = expert_attribution(model, run, 11, 12, position=None)
    own = whole[whole["part"].isin(["expert", "shared_expert"])]
    assert table["contribution"].tolist() == own["contribution"].tolist()
    assert table["kind"].tolist() == own["part"].map({"expert": "routed", "shared_expert": "shared"}).tolist()
    assert table.loc[table["kind"] == "shared", "expert"].isna().all()
    assert table.attrs == whole.attrs


def test_planted_experts_raise_the_logit_of_their_own_token(planted_model, planted_prompt):
    model = planted_model()
    run = record(model, planted_prompt, at=logit_attribution.needs(model))
    table = expert_attribution(model, run, 40, position=-1)
    own = table[(table["row"] == 0) & (table["kind"] == "routed")]
    assert own["expert"].tolist() == [3, 3]
    assert own["contribution"].sum() == pytest.approx(run.logits[0, -1, 40].item(), rel=1e-5)
    other = table[(table["row"] == 1) & (table["kind"] == "routed")]
    assert other["contribution"].tolist() == [0, 0]
