"""Slots against a sorted list."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama4lab.run.routes.slots import BARRED, Standing, forced_first, in_place


@settings(max_examples=50)
@given(st.data())
def test_slots_go_to_those_who_stand_best_and_those_who_stay_keep_theirs(data):
    experts = data.draw(st.integers(2, 7))
    slots = data.draw(st.integers(1, experts - 1))
    barred = data.draw(st.sets(st.integers(0, experts - 1), max_size=experts - slots))
    liked = data.draw(st.sets(st.integers(0, experts - 1))) - barred
    scores = [float(data.draw(st.integers(-2, 2))) for _ in range(experts)]  # with ties
    logits = torch.tensor(scores)[None, None]
    held = torch.topk(logits, slots).indices
    standing = Standing.of(logits).honouring(held)
    assert (standing.levels == 0).all()
    standing = standing.changed(barred=sorted(barred), preferred=sorted(liked))
    best = standing.best(held)
    before = held.flatten().tolist()

    def key(expert):
        return (expert in liked, scores[expert], slots - before.index(expert) if expert in before else 0, -expert)

    expected = sorted(set(range(experts)) - barred, key=key, reverse=True)[:slots]
    assert best.flatten().tolist() == expected
    placed = in_place(held, best).flatten().tolist()
    assert sorted(placed) == sorted(expected)
    assert all(placed[slot] == expert for slot, expert in enumerate(before) if expert in expected)
    assert [expert for expert in placed if expert not in before] == [e for e in expected if e not in before]
    assert (standing.levels == BARRED).sum() == len(barred)
    forced = data.draw(st.lists(st.integers(0, experts - 1), min_size=1, max_size=slots, unique=True))
    first = forced_first(held, forced).flatten().tolist()
    assert first == [*forced, *[expert for expert in before if expert not in forced]][:slots]
