"""What a patch can reach, against following every edge of the attention graph by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama4lab.model.token_layout import token_layout
from llama4lab.run.sweep_engine.reach import blocks, reach


def brute_force(layout, chunks, row, entry, patched, read):
    """For each layer the tokens that a patch changes and that the metric sees, by the full visibility matrices."""
    seq = layout.positions.shape[1]
    sees = [layout.visible(chunk, 0, seq)[min(row, len(layout.visible(chunk, 0, seq)) - 1)].numpy() for chunk in chunks]
    changed = np.zeros(seq, dtype=bool)
    changed[patched[0] : patched[1] + 1] = True
    changes = []
    for layer in range(entry, len(chunks)):
        changed = changed | (sees[layer] & changed).any(1)
        changes.append(changed)
    needed = np.zeros(seq, dtype=bool)
    needed[read[0] : read[1] + 1] = True
    needs = {len(chunks): needed}
    for layer in reversed(range(len(chunks))):
        needed = needed | (sees[layer] & needed[:, None]).any(0)
        needs[layer] = needed
    return changes, needs


@given(data=st.data())
def test_no_token_that_matters_is_left_out(data):
    draw = data.draw
    seq, pad = draw(st.integers(4, 20)), draw(st.integers(0, 3))
    chunks = draw(st.lists(st.sampled_from([None, 3, 4]), min_size=1, max_size=5))
    mask = torch.ones(2, seq, dtype=torch.long)
    mask[1, :pad] = 0
    layout = token_layout((2, seq), torch.device("cpu"), attention_mask=mask)
    row = draw(st.integers(0, 1))
    start = pad if row else 0
    patched = sorted(draw(st.lists(st.integers(start, seq - 1), min_size=2, max_size=2)))
    read = sorted(draw(st.lists(st.integers(start, seq - 1), min_size=2, max_size=2)))
    entry = draw(st.integers(0, len(chunks)))
    found = reach(
        layout, chunks, np.array([row]), np.array([entry]), (np.array(patched[:1]), np.array(patched[1:])),
        (read[0], read[1]),
    )  # fmt: skip
    changes, needs = brute_force(layout, chunks, row, entry, patched, read)
    for offset, changed in enumerate(changes):
        layer = entry + offset
        matters = np.flatnonzero(changed & needs[layer + 1])
        first, end = found.first[layer, 0], found.end[layer, 0]
        if len(matters):
            assert first <= matters[0]
            assert matters[-1] < end
    if found.idle(np.array([entry]))[0]:
        final = changes[-1] if changes else np.isin(np.arange(seq), range(patched[0], patched[1] + 1))
        assert not (final & needs[len(chunks)]).any()


def test_a_patch_stays_in_its_chunk_until_a_nope_layer():
    layout = token_layout((1, 12), torch.device("cpu"))
    one = np.array([0])
    found = reach(layout, [4, 4, None, 4], one, one, (np.array([1]), np.array([1])), (11, 11))
    assert found.end[:, 0].tolist() == [4, 4, 12, 12, 12]
    assert found.first[:, 0].tolist() == [1, 1, 1, 8, 11]
    barred = reach(layout, [4, 4, 4, 4], one, one, (np.array([1]), np.array([1])), (11, 11))
    assert barred.idle(one)[0]


@pytest.mark.parametrize("chunk", [None, 4])
def test_padding_belongs_to_no_block(chunk):
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]])
    first, last = blocks(token_layout((1, 8), torch.device("cpu"), attention_mask=mask), chunk)
    assert first[0, :2].tolist() == [0, 1]
    assert last[0, :2].tolist() == [0, 1]
    assert first[0, 2:].tolist() == ([2] * 6 if chunk is None else [2] * 4 + [6] * 2)
