"""Streams of models and of runs: hooks, changes that are active, what is not there, runs that were cut."""

import math
from typing import Any

import pytest
import torch

from llama4lab.run.attention.streaming import attention_stream, recorded_stream
from llama4lab.run.recording import record

QUERIES_AND_KEYS = ["layers.*.self_attn.q_rot", "layers.*.self_attn.k_rot"]
EXACT: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}
BY_QUERY = ("entropy", "first_token", "itself", "own_chunk", "earlier")


def test_a_stream_leaves_no_hook_however_it_ends(small):
    def hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in small.modules())

    before = hooks()
    stream = attention_stream(small, [[1, 2, 3, 4]], layers=[2, 0])
    assert list(stream.layers) == [2, 0]

    def fail(*_):
        raise RuntimeError("stop here")

    handle = small.hook_points().module("layers.2.resid_mid").register_forward_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="stop here"):
            attention_stream(small, [[1, 2, 3, 4]])
    finally:
        handle.remove()
    assert hooks() == before


def test_an_ablation_shows_in_the_stream(small):
    zero = small.hook_points().module("layers.1.self_attn.q_rot").register_forward_hook(lambda m, i, q: q * 0)
    try:
        stream = attention_stream(small, [[1, 2, 3, 4, 5]])
    finally:
        zero.remove()
    even = torch.tensor([math.log(n) for n in range(1, 6)]).expand(4, 5)
    torch.testing.assert_close(stream.layers[1].entropy[0], even, **EXACT)
    assert not stream.layers[0].entropy[0].allclose(even, atol=1e-3)


def test_layers_and_positions_that_are_not_there_are_named(small):
    with pytest.raises(ValueError, match="Layer 9 was asked for; the model has layers 0 to 3"):
        attention_stream(small, [[1, 2]], layers=[1, 9])
    small.text.layers[1].self_attn.barred = frozenset({2})
    try:
        with pytest.raises(ValueError, match="Layer 1 bars single keys"):
            attention_stream(small, [[1, 2]])
        with pytest.raises(ValueError, match="Layer 1 bars single keys"):
            recorded_stream(record(small, [[1, 2]], at=QUERIES_AND_KEYS))
    finally:
        small.text.layers[1].self_attn.barred = frozenset()
    with pytest.raises(ValueError, match="No layer was asked for"):
        attention_stream(small, [[1, 2]], layers=[])
    run = record(small, [[1, 2, 3, 4]], at=QUERIES_AND_KEYS[:1])
    with pytest.raises(KeyError, match="k_rot"):
        recorded_stream(run)
    with pytest.raises(ValueError, match=r"cut to positions 2, 3, \.\.\.; attention needs the keys"):
        recorded_stream(run.cut(positions=slice(2, None)))


def test_a_run_cut_at_its_end_or_to_some_rows_keeps_its_sums(small, random_ids):
    prompt = small.prompt([random_ids(20).tolist(), random_ids(13, seed=1).tolist()])
    run = record(small, prompt, at=QUERIES_AND_KEYS)
    whole, cut = recorded_stream(run).layers[3], recorded_stream(run.cut(rows=1, positions=slice(0, 15))).layers[3]
    for name in BY_QUERY:
        torch.testing.assert_close(getattr(cut, name)[0], getattr(whole, name)[1, :, :15], **EXACT)


def test_another_chunk_size_for_a_while_is_followed(small, random_ids):
    prompt = small.prompt([random_ids(20).tolist()])
    attention = small.text.layers[3].self_attn
    before, attention.chunk_size = attention.chunk_size, 5
    try:
        run = record(small, prompt, at=[*QUERIES_AND_KEYS, "layers.3.self_attn.pattern"])
        streams = attention_stream(small, prompt), recorded_stream(run)
    finally:
        attention.chunk_size = before
    expected = run["layers.3.self_attn.pattern"].diagonal(dim1=-2, dim2=-1)
    for stream in streams:
        torch.testing.assert_close(stream.layers[3].itself, expected, **EXACT)
