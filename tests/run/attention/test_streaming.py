"""Sums over attention that is never built, against patterns that are."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from llama4lab.model.token_layout import token_layout
from llama4lab.run.attention.reductions import Wanted, reduced
from llama4lab.run.attention.streaming import attention_stream, recorded_stream
from llama4lab.run.recording import record

QUERIES_AND_KEYS = ["layers.*.self_attn.q_rot", "layers.*.self_attn.k_rot"]
EXACT: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}
BY_QUERY = ("entropy", "first_token", "itself", "own_chunk", "earlier")


def dense(q, k, layout, chunk, map_chunk):
    """The same sums, from the pattern that the definition of visible keys gives."""
    batch, seq, heads, width = q.shape
    k = k.repeat_interleave(heads // k.shape[2], dim=2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) * width**-0.5
    seen = layout.visible(chunk, 0, seq).expand(batch, seq, seq)
    valid = layout.query_valid.expand(batch, seq)
    pattern = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1) * valid[:, None, :, None]
    positions, documents = layout.positions.expand(batch, seq), layout.documents.expand(batch, seq)
    label = positions // map_chunk if map_chunk else torch.zeros_like(positions)
    same = documents[:, :, None] == documents[:, None, :]
    begins = torch.ones_like(valid)
    for row in range(batch):
        own = documents[row].tolist()
        begins[row] = torch.tensor([own.index(document) == place for place, document in enumerate(own)])
    ordinal = valid.long().cumsum(1)

    def total(keys):
        return (pattern * keys[:, None]).sum(-1)

    chunks = label[valid].unique().tolist()
    count = torch.tensor([int((valid & (label == c)).sum()) for c in chunks])
    member = torch.stack([valid & (label == chunk) for chunk in chunks], -1).double()
    mass = torch.einsum("bhqk,bqx,bky->hxy", pattern, member, member) / count[:, None]
    distance = ordinal[:, :, None] - ordinal[:, None, :]
    edges = [0, *(2**i for i in range(math.ceil(math.log2(max(seq, 1))) + 1))]
    bins = [
        total((distance >= low) & (distance < high) & valid[:, None, :]).sum((0, 2)) / valid.sum()
        for low, high in pairwise(edges)
    ]
    return {
        "pattern": pattern,
        "valid": valid,
        "entropy": torch.special.entr(pattern).sum(-1),
        "first_token": total(same & (begins & valid)[:, None, :]),
        "itself": pattern.diagonal(dim1=-2, dim2=-1),
        "own_chunk": total(label[:, :, None] == label[:, None, :]),
        "earlier": total(label[:, :, None] > label[:, None, :]),
        "chunks": chunks,
        "chunk_queries": count,
        "chunk_mass": mass,
        "edges": edges,
        "distance_mass": torch.stack(bins, -1),
    }


def dense_targets(expected, layout, chunk, tokens):
    """Attention to the keys of each kind, and who has some, pair by pair from the definition."""
    pattern, valid = expected["pattern"], expected["valid"]
    batch, seq = valid.shape
    targets = torch.zeros(3, batch, seq, seq, dtype=torch.bool)
    seen = layout.visible(chunk, 0, seq).expand(batch, seq, seq)
    documents = layout.documents.expand(batch, seq)
    for row in range(batch):
        places = valid[row].nonzero().flatten().tolist()
        for number, query in enumerate(places):
            for before, key in enumerate(places[:number]):
                if not seen[row, query, key]:
                    continue
                token = tokens[row, query]
                targets[0, row, query, key] = before == number - 1
                targets[1, row, query, key] = token >= 0 and token == tokens[row, key]
                last = places[before - 1] if before else None
                if last is not None and documents[row, last] == documents[row, key]:
                    targets[2, row, query, key] = token >= 0 and token == tokens[row, last]
    attention = torch.stack([(pattern * kind[:, None]).sum(-1) for kind in targets])
    return attention, targets.any(-1)


def check(found, expected, top):
    assert found.valid.equal(expected["valid"])
    assert (found.chunks, found.edges) == (expected["chunks"], expected["edges"])
    assert found.chunk_queries.tolist() == expected["chunk_queries"].tolist()
    for name in (*BY_QUERY, "chunk_mass", "distance_mass"):
        torch.testing.assert_close(getattr(found, name).double(), expected[name].double(), **EXACT)
    pattern = expected["pattern"]
    weights = pattern.topk(min(top, pattern.shape[-1]), dim=-1).values
    torch.testing.assert_close(found.top_weights[..., : weights.shape[-1]].double(), weights, **EXACT)
    at_keys = pattern.gather(-1, found.top_keys.clamp(min=0)).masked_fill(found.top_keys < 0, 0)
    torch.testing.assert_close(found.top_weights.double(), at_keys, **EXACT)


@st.composite
def settings(draw):
    seq, kv_heads = draw(st.integers(1, 40)), draw(st.sampled_from([1, 2, 3]))
    return {
        "seed": draw(st.integers(0, 2**20)),
        "batch": draw(st.integers(1, 3)),
        "seq": seq,
        "kv_heads": kv_heads,
        "heads": kv_heads * draw(st.sampled_from([1, 2, 5])),
        "width": draw(st.sampled_from([2, 4, 16])),
        "size": draw(st.sampled_from([0.5, 1.0, 2.0])),
        "chunk": draw(st.none() | st.integers(1, 12)),
        "map_chunk": draw(st.none() | st.integers(3, 12)),
        "kind": draw(st.sampled_from(["plain", "left padding", "gaps", "packed", "late start", "jumps"])),
        "blocks": (draw(st.integers(3, 20)), draw(st.integers(3, 20))),
        "top": draw(st.integers(0, 5)),
        "vocabulary": draw(st.sampled_from([1, 3, 20])),
    }


def layout_of(case):
    batch, seq, generator = case["batch"], case["seq"], torch.Generator().manual_seed(case["seed"])
    mask = positions = None
    if case["kind"] == "left padding":
        padding = torch.randint(0, seq, (batch, 1), generator=generator)
        mask = (torch.arange(seq) >= padding).long()
    if case["kind"] == "gaps":
        mask = torch.randint(0, 2, (batch, seq), generator=generator)
        mask[:, 0] = 1
    if case["kind"] == "packed":
        lengths = torch.randint(1, 14, (seq,), generator=generator).tolist()
        row = torch.cat([torch.arange(length) for length in lengths])[:seq]
        positions = row.expand(batch, seq).clone()
        positions[0] = torch.arange(seq)
    if case["kind"] == "late start":
        positions = torch.arange(8190, 8190 + seq).expand(batch, seq)
    if case["kind"] == "jumps":
        positions = torch.randint(1, 5, (batch, seq), generator=generator).cumsum(1)
    return token_layout((batch, seq), torch.device("cpu"), attention_mask=mask, position_ids=positions)


@hypothesis_settings(max_examples=200)
@given(settings())
def test_sums_of_any_layout_are_those_of_the_dense_pattern(case):
    generator = torch.Generator().manual_seed(case["seed"])
    shape = case["batch"], case["seq"]
    q = case["size"] * torch.randn(*shape, case["heads"], case["width"], generator=generator)
    k = case["size"] * torch.randn(*shape, case["kv_heads"], case["width"], generator=generator)
    layout = layout_of(case)
    wanted = Wanted(case["map_chunk"], top=case["top"], blocks=case["blocks"])
    tokens = torch.randint(-1, case["vocabulary"], shape, generator=generator)
    found = reduced(q, k, layout, case["chunk"], wanted, tokens=tokens)
    expected = dense(q, k, layout, case["chunk"], case["map_chunk"])
    check(found, expected, case["top"])
    attention, has_target = dense_targets(expected, layout, case["chunk"], tokens)
    assert found.on_targets is not None
    assert found.has_target is not None
    torch.testing.assert_close(found.on_targets.double(), attention, **EXACT)
    assert found.has_target.equal(has_target)


@pytest.mark.parametrize("chunk", [None, 24])
def test_sizes_of_blocks_do_not_matter(chunk):
    q, k = torch.randn(2, 50, 4, 8), torch.randn(2, 50, 2, 8)
    layout = token_layout((2, 50), q.device)
    tokens = torch.randint(8, (2, 50))
    whole = reduced(q, k, layout, chunk, Wanted(24, top=3), tokens=tokens)
    assert whole.has_target is not None
    for blocks in [(1, 50), (50, 1), (7, 13), (16, 16)]:
        parts = reduced(q, k, layout, chunk, Wanted(24, top=3, blocks=blocks), tokens=tokens)
        for name in (*BY_QUERY, "chunk_mass", "distance_mass", "top_weights", "on_targets"):
            torch.testing.assert_close(getattr(parts, name), getattr(whole, name), **EXACT)
        assert parts.top_keys.equal(whole.top_keys)
        assert whole.has_target.equal(parts.has_target)  # pyright: ignore[reportArgumentType]


def test_masses_sum_to_one():
    q, k = torch.randn(2, 700, 4, 8), torch.randn(2, 700, 2, 8)
    found = reduced(q, k, token_layout((2, 700), q.device), None, Wanted(100))
    assert found.chunk_mass is not None
    for tensor in (found.chunk_mass.sum(-1), found.distance_mass.sum(-1), found.own_chunk + found.earlier):
        torch.testing.assert_close(tensor, torch.ones_like(tensor), **EXACT)


def test_scores_that_rise_from_block_to_block_are_taken_in_without_overflow():
    """Each key has a score larger by 40 than the one before, so all attention is on the token itself."""
    k = 40.0 * torch.arange(64.0)[None, :, None, None]
    q = torch.ones(1, 64, 1, 1)
    layout = token_layout((1, 64), q.device)
    tokens = torch.arange(64) % 2  # the first is the token of all even places
    up = reduced(q, k, layout, None, Wanted(8, top=1, blocks=(8, 4)), tokens=tokens[None])
    assert up.itself.equal(torch.ones(1, 1, 64))
    assert up.top_keys[0, 0, :, 0].tolist() == list(range(64))
    assert up.chunk_mass is not None
    torch.testing.assert_close(up.chunk_mass[0], torch.eye(8), **EXACT)
    assert up.on_targets is not None
    torch.testing.assert_close(up.on_targets, torch.zeros(3, 1, 1, 64), **EXACT)
    down = reduced(q, -k, layout, None, Wanted(8, blocks=(8, 4)), tokens=tokens[None])
    assert down.on_targets is not None
    assert down.on_targets[1, 0, 0].tolist() == pytest.approx([0, 0] + [1, 0] * 31)
    assert down.first_token.equal(torch.ones(1, 1, 64))
    torch.testing.assert_close(down.entropy, torch.zeros(1, 1, 64), **EXACT)


def test_a_planted_key_is_found_in_its_chunk_and_at_its_distance():
    """All queries look at the token at place 10, once it has passed; before, evenly at everything."""
    q, k = torch.ones(1, 32, 1, 1), torch.zeros(1, 32, 1, 1)
    k[0, 10] = 50.0
    found = reduced(q, k, token_layout((1, 32), q.device), None, Wanted(8, top=1, blocks=(5, 3)))
    assert found.chunk_mass is not None
    late = found.chunk_mass[0, 2:]
    assert late[:, 1].tolist() == pytest.approx([1, 1])
    assert found.top_keys[0, 0, 10:, 0].tolist() == [10] * 22
    assert found.entropy[0, 0, :10].tolist() == pytest.approx([math.log(n + 1) for n in range(10)], abs=1e-5)
    assert found.entropy[0, 0, 10:].tolist() == pytest.approx([0] * 22, abs=1e-5)
    # The far half of bin 16-31: queries 26 to 31.
    assert found.distance_mass[0, found.edges.index(16)].item() == pytest.approx(6 / 32)


def test_half_precision_is_summed_in_float32():
    q, k = torch.randn(1, 50, 2, 8).bfloat16(), torch.randn(1, 50, 2, 8).bfloat16()
    layout = token_layout((1, 50), q.device)
    check(reduced(q, k, layout, 16, Wanted(16, top=2)), dense(q, k, layout, 16, 16), 2)


def test_a_layout_of_other_tokens_is_refused():
    q, k = torch.randn(1, 3, 2, 8), torch.randn(1, 3, 2, 8)
    with pytest.raises(ValueError, match=r"Queries of 3 tokens, keys of 3 and a layout of 5 after 0 cached"):
        reduced(q, k, token_layout((1, 5), q.device), None)
    with pytest.raises(ValueError, match=r"layout of 3 after 2 cached"):
        reduced(q, k, token_layout((1, 3), q.device, past=2), None)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_chunk_size": 7, "num_attention_heads": 6, "num_key_value_heads": 2},
        {"no_rope_layers": [0] * 5, "layer_types": ["full_attention"] * 5},
        {"no_rope_layers": [1] * 5, "layer_types": ["chunked_attention"] * 5, "num_key_value_heads": 4},
        {"attention_chunk_size": None},
    ],
)
def test_a_stream_through_a_model_is_that_of_its_patterns(new_text_model, random_ids, changes):
    model = new_text_model(**changes)
    prompt = model.prompt([random_ids(30).tolist(), random_ids(21, seed=1).tolist()])
    run = record(model, prompt, at=[*QUERIES_AND_KEYS, "layers.*.self_attn.pattern"])
    wanted = Wanted(top=3, blocks=(11, 6))
    streams = attention_stream(model, prompt, wanted=wanted), recorded_stream(run, wanted=wanted)
    size = run.meta["chunk_size"]
    layout = token_layout((2, 30), torch.device("cpu"), attention_mask=prompt.attention_mask)
    for layer, pattern in run.layers("self_attn.pattern").items():
        chunk = size if layer in run.meta["chunked_layers"] else None
        q, k = run[f"layers.{layer}.self_attn.q_rot"], run[f"layers.{layer}.self_attn.k_rot"]
        expected = dense(q, k, layout, chunk, size)
        own = pattern.double() * expected["valid"][:, None, :, None]
        torch.testing.assert_close(expected["pattern"], own, **EXACT)
        for stream in streams:
            check(stream.layers[layer], expected, top=3)
