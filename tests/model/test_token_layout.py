"""Positions, documents, visibility and runs, against a definition written out token by token."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama4lab.model.token_layout import TokenLayout, token_layout

CPU = torch.device("cpu")


class Rows:
    """Random rows of packed documents between padding, token by token: (document, position) or None for padding."""

    def __init__(self, rows: list[tuple[int, list[int]]]):
        self.tokens = []
        for left, documents in rows:
            row: list[tuple[int, int] | None] = [None] * left
            row += [(number, position) for number, length in enumerate(documents) for position in range(length)]
            self.tokens.append(row)
        self.length = max(len(row) for row in self.tokens)
        self.tokens = [row + [None] * (self.length - len(row)) for row in self.tokens]
        self.packed = any(len(documents) > 1 for _, documents in rows)

    def inputs(self, start: int, stop: int, *, positions: bool) -> dict:
        """What a caller passes for the tokens start to stop; a junk position at padding."""
        mask = torch.tensor([[token is not None for token in row[:stop]] for row in self.tokens]).long()
        where = torch.tensor([[7 if token is None else token[1] for token in row[start:stop]] for row in self.tokens])
        return {"attention_mask": mask, "position_ids": where if positions or self.packed else None, "past": start}

    def sees(self, row: int, query: int, key: int, chunk: int | None) -> bool:
        """The definition of who may attend to whom."""
        one, other = self.tokens[row][query], self.tokens[row][key]
        if query == key:
            return True
        if one is None or other is None or one[0] != other[0] or key > query:
            return False
        return chunk is None or one[1] // chunk == other[1] // chunk


rows = st.lists(
    st.tuples(st.integers(0, 5), st.lists(st.integers(1, 9), min_size=1, max_size=3)), min_size=1, max_size=3
).map(Rows)
chunks = st.sampled_from([None, 1, 2, 3, 4, 7])


def layouts(batch: Rows, cuts: list[int], positions: bool) -> list[tuple[TokenLayout, int, int]]:
    """The layout of each piece of the rows, each made with that of the piece before as history."""
    history, made = None, []
    for start, stop in pairwise([0, *sorted({cut for cut in cuts if cut < batch.length}), batch.length]):
        inputs = batch.inputs(start, stop, positions=positions)
        history = token_layout((len(batch.tokens), stop - start), CPU, history=history, **inputs)
        made.append((history, start, stop))
    return made


@given(batch=rows, chunk=chunks, cuts=st.lists(st.integers(1, 20), max_size=3), positions=st.booleans())
def test_a_key_is_visible_exactly_if_the_definition_says_so(batch, chunk, cuts, positions):
    for layout, start, stop in layouts(batch, cuts, positions):
        visible = layout.visible(chunk, 0, stop).expand(len(batch.tokens), -1, -1)
        for row in range(len(batch.tokens)):
            expected = [[batch.sees(row, query, key, chunk) for key in range(stop)] for query in range(start, stop)]
            assert visible[row].tolist() == expected


@given(batch=rows, cuts=st.lists(st.integers(1, 20), max_size=3), positions=st.booleans())
def test_every_token_has_its_position_and_padding_is_known(batch, cuts, positions):
    for layout, start, stop in layouts(batch, cuts, positions):
        assert layout.past == start
        places = layout.positions.expand(len(batch.tokens), -1)
        valid = layout.query_valid.expand(len(batch.tokens), -1)
        for row, tokens in enumerate(batch.tokens):
            assert valid[row].tolist() == [token is not None for token in tokens[start:stop]]
            for place, token in zip(places[row].tolist(), tokens[start:stop], strict=True):
                assert token is None or place == token[1]


@given(batch=rows, chunk=chunks, positions=st.booleans())
def test_runs_are_the_tokens_that_attend_among_themselves(batch, chunk, positions):
    [(layout, _, length)] = layouts(batch, [], positions)
    if layout.start is not None:
        return  # plain rows need no runs
    expected: dict[tuple, list[int]] = {}
    for row, tokens in enumerate(batch.tokens):
        for index, token in enumerate(tokens):
            if token is not None:
                key = (row, token[0], 0 if chunk is None else token[1] // chunk)
                expected.setdefault(key, []).append(row * length + index)
    found = [[index for index in run.tolist() if index >= 0] for block in layout.blocks(chunk) for run in block]
    assert sorted(found) == sorted(expected.values())
    for block in layout.blocks(chunk):
        assert ((block >= 0).long().diff(dim=1) <= 0).all()  # filled at the end only


@given(start=st.integers(0, 30), past=st.integers(0, 9), seq=st.integers(1, 9), chunk=chunks)
def test_plain_rows_at_any_offset_agree_with_their_positions(start, past, seq, chunk):
    history = None
    if past:
        before = torch.arange(start, start + past)[None]
        history = token_layout((2, past), CPU, position_ids=before)
    layout = token_layout((2, seq), CPU, past=past, history=history, position_ids=None if past else counted(start, seq))
    assert layout.start == start + past
    positions = torch.arange(start, start + past + seq)
    assert layout.key_positions[0].tolist() == positions.tolist()
    expected = positions[None, :] <= positions[past:, None]
    if chunk is not None:
        expected &= positions[None, :] // chunk == positions[past:, None] // chunk
    assert torch.equal(layout.visible(chunk, 0, past + seq)[0], expected)


def counted(start: int, seq: int) -> torch.Tensor:
    return torch.arange(start, start + seq)[None]


@given(batch=rows, chunk=chunks, first=st.integers(0, 8), extra=st.integers(0, 4))
def test_a_part_of_the_keys_is_a_part_of_the_table_and_empty_places_are_invisible(batch, chunk, first, extra):
    [(layout, _, length)] = layouts(batch, [], True)
    first = min(first, length)
    whole = torch.nn.functional.pad(layout.visible(chunk, 0, length), (0, extra))
    assert torch.equal(layout.visible(chunk, first, length + extra - first), whole[..., first:])


def test_a_mask_without_padding_leaves_rows_plain():
    layout = token_layout((2, 5), CPU, attention_mask=torch.ones(2, 5))
    assert layout.start == 0


def test_equal_rows_with_restarting_positions_are_not_plain():
    layout = token_layout((1, 4), CPU, position_ids=torch.tensor([[0, 1, 0, 1]]))
    assert layout.start is None
    assert layout.documents.tolist() == [[0, 0, 1, 1]]


def test_decoding_without_a_mask_remembers_the_padding_of_the_pass_before():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    history = token_layout((2, 4), CPU, attention_mask=mask)
    layout = token_layout((2, 1), CPU, past=4, history=history)
    assert layout.positions.tolist() == [[2], [4]]
    assert layout.visible(None, 0, 5).squeeze(1).tolist() == [[False, False, True, True, True], [True] * 5]


def test_repeated_rows_of_a_cache_keep_their_layout():
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    history = token_layout((2, 3), CPU, attention_mask=mask)
    layout = token_layout((4, 1), CPU, past=3, history=history)
    assert layout.positions.flatten().tolist() == [2, 2, 3, 3]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"attention_mask": torch.ones(2, 4)}, r"\[2, 4\].*\[2, 5\]"),
        ({"attention_mask": torch.ones(3, 5)}, r"\[3, 5\]"),
        ({"attention_mask": torch.ones(5)}, r"\[5\]"),
        ({"position_ids": torch.zeros(2, 4, dtype=torch.long)}, r"\[2, 4\]"),
        ({"position_ids": torch.zeros(3, 5, dtype=torch.long)}, r"\[3, 5\]"),
        ({"position_ids": torch.tensor([[0, 1, 2, -3, 4]])}, "-3"),
    ],
)
def test_a_mask_or_positions_that_do_not_fit_are_refused_with_their_shape(wrong, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        token_layout((2, 5), CPU, **wrong)
