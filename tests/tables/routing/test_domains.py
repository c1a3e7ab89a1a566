import numpy as np
import pandas as pd
import pytest
import torch

import llama4lab as lab
from llama4lab.tables.routing.choices import decisions
from llama4lab.tables.routing.domains import risk_difference, specialization
from llama4lab.tiny.domains.catalogue import examples

ROUTER = "layers.*.feed_forward.router.*"


@pytest.fixture(scope="module")
def model(new_text_model):
    return new_text_model(num_experts_per_tok=2)


@pytest.fixture(scope="module")
def run(model, random_ids) -> lab.Run:
    """Two rows, the second padded on the left."""
    ids = random_ids(2, 12)
    prompt = model.prompt(ids)
    prompt.attention_mask[1, :5] = 0
    prompt.modality[1][:5] = ["pad"] * 5
    return lab.record(model, prompt, ROUTER)


@pytest.fixture(scope="module")
def stats(model, random_ids) -> lab.RoutingStats:
    items = {name: [random_ids(5 + n, seed=n + 10 * len(name)).tolist() for n in range(6)] for name in ("a", "bc")}
    return lab.routing_stats(model, items, progress=False)


def test_shares_are_counted_tokens_of_a_group_that_visit_an_expert(run):
    table = specialization(run, by="row")
    indices = run.layers("feed_forward.router.indices")
    for line in table.to_dict("records"):
        first = 5 if line["row"] == 1 else 0
        own = indices[line["layer"]][line["row"], first:]
        every = torch.cat([indices[line["layer"]][0], indices[line["layer"]][1, 5:]])
        share = (own == line["expert"]).any(-1).double().mean().item()
        overall = (every == line["expert"]).any(-1).double().mean().item()
        assert line["share"] == pytest.approx(share)
        assert line["tokens"] == int((own == line["expert"]).sum())
        assert line["group_tokens"] == len(own)
        assert line["lift"] == pytest.approx(share / overall if overall else np.nan, nan_ok=True)
    assert len(table) == 2 * len(indices) * 4


def test_shares_sum_to_the_experts_of_a_token(stats, run):
    for table, by in ((specialization(stats), "group"), (specialization(run, by="modality"), "modality")):
        for _, own in table.groupby(["layer", by]):
            assert sum(own["share"]) == pytest.approx(2)
        assert set(table["uniform"]) == {0.5}
        assert table.attrs == {"num_experts": 4, "by": by}


def test_the_lift_averages_to_one_over_the_groups(stats):
    table = specialization(stats)
    for _, own in table.groupby(["layer", "expert"]):
        if sum(own["tokens"]):
            assert np.average(own["lift"], weights=own["group_tokens"]) == pytest.approx(1)
        else:
            assert np.isnan(np.asarray(own["lift"])).all()


def test_statistics_their_choices_and_decisions_agree(model, random_ids):
    rows = [random_ids(7, seed=seed).tolist() for seed in range(3)]
    stats = lab.routing_stats(model, rows, progress=False)
    choices = decisions(lab.record(model, rows, ROUTER))
    tables = [specialization(source, by="modality") for source in (stats, stats.choices(), choices)]
    for table in tables[1:]:
        pd.testing.assert_frame_equal(table, tables[0])


def test_an_own_column_of_decisions_can_be_the_group(run):
    table = decisions(run)
    table["late"] = table["position"] >= 8
    late = specialization(table, by="late")
    assert set(late["late"]) == {False, True}
    assert sum(late["tokens"]) == len(table)


def test_image_tokens_are_a_group(tiny_stats):
    table = specialization(tiny_stats, by="modality")
    assert set(table["modality"]) == {"image", "special", "text"}
    counts = tiny_stats.token_counts().groupby("modality")["tokens"].sum()
    for line in table.to_dict("records"):
        assert line["group_tokens"] == counts[line["modality"]]


@pytest.fixture(scope="module")
def tiny_stats() -> lab.RoutingStats:
    return lab.routing_stats(lab.load(), examples("shapes", 4) + examples("code", 4), by="domain", progress=False)


def test_risk_difference_is_the_difference_of_rates(stats):
    table = stats.choices()
    a, b = (table.loc[np.asarray(table["group"] == name)] for name in ("a", "bc"))
    found, shares = risk_difference(a, b), specialization(stats)
    for line in found.to_dict("records"):
        rates = {
            own["group"]: own
            for own in shares.to_dict("records")
            if (own["layer"], own["expert"]) == (line["layer"], line["expert"])
        }
        one, other = rates["a"]["share"], rates["bc"]["share"]
        n, m = rates["a"]["group_tokens"], rates["bc"]["group_tokens"]
        assert line["risk_difference"] == pytest.approx(one - other)
        assert (line["tokens_a"], line["tokens_b"]) == (n, m)
        assert line["standard_error"] == pytest.approx(np.sqrt(one * (1 - one) / n + other * (1 - other) / m))
    back = risk_difference(b, a)
    np.testing.assert_allclose(back["risk_difference"], -found["risk_difference"])
    assert not np.any(risk_difference(stats, stats)["risk_difference"])


def test_risk_difference_takes_runs_and_tables(run):
    np.testing.assert_allclose(risk_difference(run, decisions(run))["risk_difference"], 0)


def test_the_standard_error_is_that_of_independent_draws():
    rng = np.random.default_rng(0)

    def drawn(rate: float, count: int) -> pd.DataFrame:
        table = pd.DataFrame({"layer": 1, "slot": 0, "expert": (rng.random(count) < rate).astype(int)})
        table.attrs["num_experts"] = 2
        return table

    found = [risk_difference(drawn(0.3, 200), drawn(0.6, 100)) for _ in range(100)]
    spread = np.std([table["risk_difference"][1] for table in found])
    claimed = np.mean([table["standard_error"][1] for table in found])
    assert spread == pytest.approx(claimed, rel=0.25)


def test_what_cannot_be_compared_is_refused(stats, run, new_text_model, random_ids):
    with pytest.raises(KeyError, match="There are group, modality"):
        specialization(stats, by="domain")
    with pytest.raises(KeyError, match="There are row, position, token, modality"):
        specialization(run)
    with pytest.raises(ValueError, match="how many experts"):
        specialization(pd.DataFrame(stats.choices().to_dict("list")))
    other = new_text_model(num_experts_per_tok=2, interleave_moe_layer_step=1)
    others = lab.routing_stats(other, [random_ids(5).tolist()], progress=False)
    with pytest.raises(ValueError, match="cannot be compared: one has routers of 4 experts in layers 1, 3, the other"):
        risk_difference(stats, others)
    with pytest.raises(ValueError, match="no tokens"):
        risk_difference(stats, stats.choices().query("group == 'c'"))
