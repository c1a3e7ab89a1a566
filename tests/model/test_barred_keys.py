"""Barred keys are seen by nobody but their own queries, and that takes no mask over all pairs of positions."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llama4lab.model.barred_keys import attended
from llama4lab.model.token_layout import TokenLayout, token_layout

HEADS, KV_HEADS, D_HEAD = 4, 2, 8


class Largest(TorchDispatchMode):
    """Remembers how many elements the largest tensor has that is made inside."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.untyped_storage().size() // max(tensor.element_size(), 1))
        return out


def drawn(batch: int, seq: int, key: int, generator: torch.Generator) -> list[torch.Tensor]:
    shapes = [(batch, HEADS, seq, D_HEAD), (batch, KV_HEADS, key, D_HEAD), (batch, KV_HEADS, key, D_HEAD)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def by_hand(q, k, v, layout: TokenLayout, chunk: int | None, hidden: torch.Tensor) -> torch.Tensor:
    """The whole pattern, one query at a time."""
    k, v = (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (k, v))
    batch, total = q.shape[0], layout.key_positions.shape[1]
    where, documents = layout.key_positions.expand(batch, -1), layout.documents.expand(batch, -1)
    out = torch.zeros_like(q)
    for row in range(batch):
        for query in range(q.shape[2]):
            at = layout.past + query
            if documents[row, at] < 0:
                continue
            seen = (documents[row] == documents[row, at]) & (where[row] <= where[row, at]) & ~hidden[row]
            if chunk is not None:
                seen &= where[row] // chunk == where[row, at] // chunk
            seen[at] = True
            keys = seen.nonzero().squeeze(-1) - (total - min(k.shape[2], total))
            assert keys.min() >= 0
            scores = (k[row, :, keys] * q[row, :, query, None]).sum(-1) * D_HEAD**-0.5
            out[row, :, query] = (scores.softmax(-1)[..., None] * v[row, :, keys]).sum(1)
    return out


LAYOUTS = {
    "plain": {},
    "padded": {"attention_mask": torch.tensor([[1] * 23, [0] * 5 + [1] * 18, [0] * 22 + [1]])},
    "packed": {"position_ids": torch.tensor([[*range(9), *range(14)], [*range(3, 23), *range(3)], [*range(23)]])},
}

BARRED = {"0": {0}, "7": {7}, "some": {3, 9, 21, 22}, "first": {"first_token"}, "all": {"first_token", *range(23)}}


@pytest.mark.parametrize("past", [0, 22, 15])
@pytest.mark.parametrize("chunk", [None, 6])
@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("barred", BARRED.values(), ids=BARRED)
def test_attention_past_barred_keys_is_that_of_the_whole_pattern(kind, chunk, past, barred):
    generator = torch.Generator().manual_seed(0)
    whole = token_layout((3, 23), torch.device("cpu"), **LAYOUTS[kind])
    layout = TokenLayout(
        whole.positions[:, past:], whole.key_positions, whole.documents, None if whole.start is None else past
    )
    hidden = torch.zeros(3, 23, dtype=torch.bool)
    hidden[:, [place for place in barred if isinstance(place, int)]] = True
    if "first_token" in barred:
        documents = whole.documents.expand(3, -1)
        for row in range(3):
            for document in set(documents[row].tolist()) - {-1}:
                hidden[row, (documents[row] == document).nonzero()[0]] = True
    q, k, v = drawn(3, 23 - past, 23, generator)
    found = attended(q, k, v, layout, chunk, barred=frozenset(barred))
    valid = (whole.documents[:, past:] >= 0).expand(3, -1)[:, None, :, None]
    assert torch.allclose(found * valid, by_hand(q, k, v, layout, chunk, hidden), atol=1e-5)


def test_empty_places_of_a_static_cache_are_not_seen():
    generator = torch.Generator().manual_seed(1)
    layout = token_layout((2, 9), torch.device("cpu"))
    q, k, v = drawn(2, 9, 16, generator)
    hidden = torch.zeros(2, 9, dtype=torch.bool)
    hidden[:, 4] = True
    found = attended(q, k, v, layout, None, barred=frozenset({4}))
    assert torch.allclose(found, by_hand(q, k[:, :, :9], v[:, :, :9], layout, None, hidden), atol=1e-5)


@pytest.mark.parametrize("barred", [{"first_token"}, {5, 700}, set(range(0, 1024, 3))], ids=["first", "two", "a third"])
def test_no_tensor_has_all_pairs_of_positions(barred):
    length = 1024
    layout = token_layout((1, length), torch.device("cpu"))
    q, k, v = drawn(1, length, length, torch.Generator().manual_seed(2))
    with Largest() as largest:
        attended(q, k, v, layout, None, barred=frozenset(barred))
    assert 0 < largest.numel < length * length / 2


def test_gradients_flow_past_barred_keys(new_text_model, random_ids):
    ids, small = random_ids(1, 20), new_text_model(num_hidden_layers=4)
    attention = small.text.layers[3].self_attn
    gradients = []
    for kernel in ("auto", "eager"):
        small.attn, attention.barred = kernel, frozenset({2, 11})
        try:
            embeds = small.get_input_embeddings()(ids).detach().requires_grad_()
            small(inputs_embeds=embeds, use_cache=False).logits[:, -1].logsumexp(-1).sum().backward()
        finally:
            small.attn, attention.barred = "auto", frozenset()
        gradients.append(embeds.grad)
    assert torch.allclose(*gradients, atol=1e-5)
