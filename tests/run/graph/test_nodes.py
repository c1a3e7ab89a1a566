import pytest
import torch

from llama4lab.run.graph.nodes import graph_of, node_counts


@pytest.fixture(scope="module")
def graph(text_config):
    """Layers 1 and 3 of 5 have four experts; four heads, two KV heads."""
    return graph_of(text_config())


def test_every_part_of_every_layer_is_a_node(graph):
    assert node_counts(graph.senders) == {"embed": 1, "head": 20, "mlp": 3, "expert": 8, "shared_expert": 2}
    receivers = {"q": 20, "k": 10, "v": 10, "mlp": 3, "router": 2, "expert": 8, "shared_expert": 2, "logits": 1}
    assert node_counts(graph.receivers) == receivers


def test_edges_go_from_each_sender_to_all_later_receivers(graph):
    names = [node.name for node in graph.receivers]
    head = [node.name for node in graph.senders].index("layers.1.self_attn.head_out.2")
    read = {name for name, edge in zip(names, graph.edges[head].tolist(), strict=True) if edge}
    assert "layers.1.feed_forward.router" in read
    assert "logits" in read
    assert not any(name.startswith(("layers.0.", "layers.1.self_attn")) for name in read)
    assert graph.edges[0].all()


def test_a_kv_head_concerns_all_query_heads_that_share_it(graph):
    own = {node.name: node.heads for node in graph.receivers}
    assert own["layers.2.self_attn.q.3"] == (3,)
    assert own["layers.2.self_attn.k.0"] == own["layers.2.self_attn.v.0"] == (0, 1)
    fed = graph.feeds[[node.name for node in graph.receivers].index("layers.2.self_attn.k.1")]
    names = {node.name for node, own in zip(graph.senders, fed.tolist(), strict=True) if own}
    assert names == {"layers.2.self_attn.head_out.2", "layers.2.self_attn.head_out.3"}


def test_a_router_feeds_all_experts_and_an_experts_input_one(graph):
    router = graph.sets("receiver", "layers.1.feed_forward.router")["layers.1.feed_forward.router"]
    assert int(graph.feeds[router].sum()) == 4
    for own in graph.sets("receiver", "layers.1.feed_forward.experts.*").values():
        assert int(graph.feeds[own].sum()) == 1


def test_the_stream_as_a_sender_is_all_before_and_as_a_receiver_all_behind(graph):
    for place in ("layers.0.resid_pre", "layers.2.resid_mid", "layers.4.resid_post"):
        (before,), (behind,) = (graph.sets(role, place).values() for role in ("sender", "receiver"))
        crossing = torch.zeros_like(graph.edges)
        crossing[torch.tensor(before)[:, None], torch.tensor(behind)] = True
        assert bool((crossing & ~graph.edges).sum() == 0), place
        assert all(graph.senders[i].stage < graph.receivers[j].stage for i in before for j in behind)
    assert len(graph.sets("sender", "layers.0.resid_pre")["layers.0.resid_pre"]) == 1
    assert len(graph.sets("receiver", "layers.4.resid_post")["layers.4.resid_post"]) == 1


def test_labels_join_what_they_name(graph):
    sets = graph.sets("sender", {"early": ["layers.0.self_attn.head_out.*", "embed_merged"], "late": "layers.4.**"})
    assert list(sets) == ["early", "late"]
    assert len(sets["early"]) == 5
    assert {graph.senders[i].layer for i in sets["late"]} == {4}


def test_an_unknown_name_is_answered_with_near_ones(graph):
    with pytest.raises(ValueError, match=r"matches none .* senders(.|\n)*layers\.1\.self_attn\.head_out"):
        graph.sets("sender", "layers.1.self_attn.head_outs.2")
