"""Agreement of two runs, against routes that were changed by hand."""

# pandas declares what it gives as wide unions.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportCallIssue=false, reportOperatorIssue=false, reportIndexIssue=false

import numpy as np
import pytest

from llama4lab.run.recording import record
from llama4lab.run.routes.rerouting import rerouted
from llama4lab.run.routes.routed_experts import RoutedExperts
from llama4lab.tables.routing.stability import drift, saturation

AT = "layers.*.feed_forward.router.*"


def test_agreement_and_chance_are_those_of_the_planted_routes(routed_run):
    a, b = routed_run({1: [[[0], [0], [1], [2]]]}), routed_run({1: [[[0], [1], [1], [3]]]})
    line = saturation(a, b).iloc[0]
    assert (line["layer"], line["tokens"], line["agreement"]) == (1, 4, 0.5)
    assert line["chance"] == pytest.approx((2 * 1 + 1 * 2) / 16)


def test_sets_are_compared_whatever_the_slots(routed_run):
    a, b = routed_run({1: [[[0, 1], [2, 3]]]}), routed_run({1: [[[1, 0], [2, 1]]]})
    assert saturation(a, b)["agreement"].tolist() == [0.75]
    one = routed_run({1: [[[1], [0]]]})
    assert saturation(a, one)["agreement"].tolist() == [0.5]  # as a share of the fewer


def test_padding_is_neither_compared_nor_counted_as_place(new_text_model):
    model = new_text_model()
    long, short = [5, 6, 7, 8, 9], [11, 12, 13]
    batch, alone = record(model, [long, short], at=AT), record(model, [short], at=AT)
    own = batch.cut(rows=1)
    own.rows[0] = 0
    own.prompt = batch.prompt.row(1)
    table = saturation(own, alone)
    assert table["agreement"].tolist() == [1] * len(table)
    assert table["tokens"].tolist() == [3] * len(table)


def test_drift_of_a_banned_expert_is_what_it_served(new_text_model, random_ids):
    model = new_text_model()
    ids = random_ids(2, 12).tolist()
    run = record(model, ids, at=AT)
    same = drift(run, run)
    assert (same["agreement"] == 1).all()
    assert same.attrs == {"kl": 0, "differing": 0}
    layer = run.meta["moe_layers"][0]
    with rerouted(model, layers=layer, ban=0):
        banned = record(model, ids, at=AT)
    table, whole = drift(run, banned, bins=3), saturation(run, banned).set_index("layer")
    assert table.groupby("layer")["tokens"].sum().tolist() == [24] * len(whole)
    weighted = (table["agreement"] * table["tokens"]).groupby(table["layer"]).sum() / 24
    np.testing.assert_allclose(weighted, whole["agreement"])
    lost = (run[f"layers.{layer}.feed_forward.router.indices"] == 0).float().mean().item()
    assert whole.loc[layer, "agreement"] == pytest.approx(1 - lost)
    p, q = (each.logits.double().log_softmax(-1) for each in (run, banned))
    assert table.attrs["kl"] == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item())
    assert (table["least"] <= table["margin"]).all()
    assert (table["margin"] <= table["most"]).all()


def test_texts_of_unequal_length_need_to_say_what_corresponds(new_text_model):
    model = new_text_model()
    long, first, last = ([[5, 6, 7, 8, 9]], [[5, 6, 7]], [[7, 8, 9]])
    runs = [record(model, ids, at=AT) for ids in (first, last, long)]
    with pytest.raises(ValueError, match='align="start"'):
        saturation(runs[0], runs[2])
    table = saturation(runs[0], runs[2], align="start")
    assert table["agreement"].tolist() == [1] * len(table)  # causal: what follows changes nothing
    assert saturation(runs[1], runs[2], "end")["tokens"].tolist() == [3] * len(table)
    with pytest.raises(ValueError, match="are not the same"):
        saturation(runs[1], runs[2], "start")
    mapped = saturation(runs[1], runs[2], {0: 2, 2: 4})
    assert mapped["tokens"].tolist() == [2] * len(table)
    with pytest.raises(ValueError, match="place"):
        saturation(runs[1], runs[2], {0: 9})


def test_corrupted_prompts_are_compared_but_other_texts_are_not(new_text_model):
    model = new_text_model()
    runs = [record(model, [ids], at=AT) for ids in ([5, 6, 7, 8], [5, 9, 7, 8], [1, 2, 3, 4])]
    assert saturation(runs[0], runs[1]).attrs["differing"] == 1
    with pytest.raises(ValueError, match="4 of 4 tokens"):
        saturation(runs[0], runs[2])


def test_routes_of_a_serving_engine_are_compared_and_unknown_ones_left_out(new_text_model):
    model = new_text_model(num_experts_per_tok=2)
    run = record(model, [[5, 6, 7, 8]], at=AT)
    routes = RoutedExperts.from_run(run)
    assert (saturation(run, routes)["agreement"] == 1).all()
    experts = routes.experts.copy()
    experts[-1] = -1
    partly = RoutedExperts(experts, routes.layers, routes.num_layers, routes.num_experts)
    table = saturation(run, partly)
    assert set(table["tokens"]) == {3}
    assert (table["agreement"] == 1).all()
    assert drift(run, partly)["kl"].isna().all()


def test_other_models_and_other_rows_are_refused(new_text_model):
    model = new_text_model()
    run = record(model, [[5, 6], [7, 8]], at=AT)
    with pytest.raises(ValueError, match="4 and 6 experts"):
        saturation(run, record(new_text_model(num_local_experts=6), [[5, 6], [7, 8]], at=AT))
    with pytest.raises(ValueError, match="rows"):
        saturation(run, record(model, [[5, 6]], at=AT))
    with pytest.raises(ValueError, match="bins"):
        drift(run, run, bins=0)
