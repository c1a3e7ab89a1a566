"""Path patching: laws. Single paths are compared with patches by hand in tests/run/graph."""

import pytest
import torch

import llama4lab as lab
from llama4lab.run.metrics import evaluated, logit_diff
from llama4lab.run.paths import patch_paths
from llama4lab.tiny.domains.indirect_objects import TEMPLATES, sentence

CLEAN = [[5, 9, 17, 3, 8, 44, 21], [7, 7, 2], [90, 14, 33, 6, 60]]
CORRUPTED = [[5, 12, 17, 3, 80, 44, 22], [71, 7, 2], [90, 14, 33, 61, 60]]
METRIC = logit_diff(11, 50)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("into", ["corrupted", "clean"])
def test_a_sender_patched_into_all_its_receivers_is_the_sender_patched(small, into):
    clean, corrupted = small.prompt(CLEAN), small.prompt(CORRUPTED)
    base, source = (corrupted, clean) if into == "corrupted" else (clean, corrupted)
    name = "layers.1.self_attn.head_out"
    theirs = lab.record(small, source, at=name)[name]
    paths = patch_paths(small, clean, corrupted, senders=f"{name}.*", receivers={"all": "**"}, metric=METRIC, into=into)
    for head in range(4):
        own = torch.arange(4)[:, None] == head
        with lab.patched(small, {name: lambda old, own=own: torch.where(own, theirs, old)}):
            close(paths.patched[head], evaluated(METRIC, lab.record(small, base)))


def test_an_expert_and_a_dense_mlp_patched_into_everything_are_patched_too(small):
    clean, corrupted = small.prompt(CLEAN), small.prompt(CORRUPTED)
    names = ["layers.2.feed_forward.out", "layers.1.feed_forward.shared_expert.out"]
    paths = patch_paths(small, clean, corrupted, senders=names, receivers={"all": "**"}, metric=METRIC)
    theirs = lab.record(small, clean, at=names)
    for index, name in enumerate(names):
        with lab.patched(small, {name: theirs[name]}):
            close(paths.patched[index], evaluated(METRIC, lab.record(small, corrupted)))


def test_the_stream_patched_into_all_behind_it_is_the_stream_patched(small):
    clean, corrupted = small.prompt(CLEAN), small.prompt(CORRUPTED)
    for name in ("layers.0.resid_post", "layers.1.resid_mid", "layers.3.resid_post"):
        paths = patch_paths(small, clean, corrupted, senders=name, receivers=name, metric=METRIC)
        theirs = lab.record(small, clean, at=name)[name]
        with lab.patched(small, {name: theirs}):
            close(paths.patched[0], evaluated(METRIC, lab.record(small, corrupted)))


def test_a_path_to_the_logits_is_the_direct_effect_under_a_new_final_norm(small):
    clean, corrupted = small.prompt(CLEAN), small.prompt(CORRUPTED)
    at = ["layers.2.self_attn.head_out", "layers.3.resid_post"]
    base, source = (lab.record(small, prompt, at=at) for prompt in (corrupted, clean))
    paths = patch_paths(
        small, clean, corrupted, senders="layers.2.self_attn.head_out.*", receivers="logits", metric=METRIC
    )
    direction = small.lm_head.weight[11] - small.lm_head.weight[50]
    for head in range(4):
        change = (source[at[0]] - base[at[0]])[:, -1, head]
        normed = small.model.norm(base[at[1]][:, -1] + change)
        close(paths.patched[head], normed @ direction)


def test_query_heads_that_share_a_kv_head_are_one_path_through_its_key(small):
    clean, corrupted = small.prompt(CLEAN), small.prompt(CORRUPTED)
    paths = patch_paths(
        small, clean, corrupted, senders="embed_merged", receivers="layers.2.self_attn.*.*", metric=METRIC
    )
    heads = dict(zip(paths.table["receiver"].tolist(), paths.table["receiver_heads"].tolist(), strict=True))
    assert heads["layers.2.self_attn.q.1"] == "1"
    assert heads["layers.2.self_attn.k.1"] == heads["layers.2.self_attn.v.1"] == "2, 3"
    assert "layers.2.self_attn.k.2" not in heads


def test_only_pairs_in_the_order_of_the_forward_pass_are_paths(small):
    clean, corrupted = small.prompt(CLEAN), small.prompt(CORRUPTED)
    paths = patch_paths(
        small,
        clean,
        corrupted,
        senders="layers.*.self_attn.head_out.0",
        receivers=["layers.*.self_attn.q.0", "logits"],
        metric=METRIC,
    )
    assert len(paths.paths) == 6 + 4
    grid = paths.grid("effect")
    assert grid.shape == (4, 4)  # no head comes before the queries of layer 0
    assert int(grid.isna().sum().sum()) == 6
    with pytest.raises(ValueError, match="None of the senders"):
        patch_paths(small, clean, corrupted, senders="layers.3.**", receivers="layers.1.self_attn.q.0", metric=METRIC)


def test_the_table_tells_means_and_spread_over_the_pairs(small):
    clean, corrupted = small.prompt(CLEAN), small.prompt(CORRUPTED)
    paths = patch_paths(small, clean, corrupted, senders="embed_merged", receivers={"all": "**"}, metric=METRIC)
    (line,) = paths.table.to_dict("records")
    assert line["edges"] == len(paths.paths[0].receivers)
    assert line["normalised"] == pytest.approx(1.0, abs=1e-5)  # all that the model is given
    effects = (paths.patched[0] - paths.corrupted).double()
    assert line["effect"] == pytest.approx(float(effects.mean()))
    assert line["effect_std"] == pytest.approx(float(effects.std()))
    assert "into the corrupted run" in repr(paths)


def test_prompts_of_other_lengths_are_refused(small):
    with pytest.raises(ValueError, match="Row 0 has 3 tokens"):
        patch_paths(small, [[1, 2, 3]], [[1, 2, 3, 4]], senders="embed_merged", receivers="logits", metric=METRIC)


def test_heads_of_layer_4_tell_the_name_movers_where_to_look(tiny, no_hooks_left):
    """Truth: in the packaged checkpoint layer 4 finds the giver, and steers the queries of layers 6 and 7."""
    pairs = [("Mary", "John"), ("Anna", "Peter")]
    clean, corrupted = (
        tiny.prompt([text.segments[0][0] for text in texts])
        for texts in zip(
            *[[sentence(TEMPLATES[0], a, b, giver, "store", "drink") for giver in (b, a)] for a, b in pairs],
            strict=True,
        )
    )
    metric = logit_diff([f" {a}" for a, _ in pairs], [f" {b}" for _, b in pairs])
    paths = patch_paths(
        tiny,
        clean,
        corrupted,
        senders="layers.*.self_attn.head_out.*",
        receivers={"queries of layers 6 and 7": ["layers.6.self_attn.q.*", "layers.7.self_attn.q.*"]},
        metric=metric,
    )
    best = paths.table.sort_values("effect").tail(2)
    assert set(best["sender"]) == {"layers.4.self_attn.head_out.2", "layers.4.self_attn.head_out.3"}
