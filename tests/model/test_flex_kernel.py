"""Attention by torch's flex kernel, which needs a compiler."""

import pytest
import torch

PROGRAM = """
ids = torch.randint(1, 64, (2, 21))
ids[1, :5] = 0
mask = (ids != 0).long()
with torch.no_grad():
    expected = model(ids, attention_mask=mask).logits
    model.attn = "flex"
    found = model(ids, attention_mask=mask).logits
assert model.attn == "flex"
assert (found - expected)[mask.bool()].abs().max() < 1e-5
with torch.no_grad():
    cache = model(ids[:1, :6], use_cache=True).cache
    pieces = [model(ids[:1, :6]).logits, *(model(ids[:1, at : at + 1], cache=cache).logits for at in range(6, 12))]
assert (torch.cat(pieces, 1) - expected[:1, :12]).abs().max() < 1e-5  # over the border before token 8
print("equal")
"""


def test_flex_attention_gives_the_logits_of_the_fused_kernel(printed_with_small_model):
    assert printed_with_small_model(PROGRAM) == "equal"


def test_where_torch_cannot_compile_the_error_says_what_works(new_text_model, random_ids, monkeypatch):
    def broken(*_args, **_options):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr("llama4lab.model.flex_kernel.compiled_flex", lambda: broken)
    model = new_text_model()
    model.attn = "flex"
    with (
        torch.no_grad(),
        pytest.raises(RuntimeError, match=r"attn='flex' needs torch.compile on cpu(?s:.*)Use attn='sdpa'"),
    ):
        model(random_ids(1, 9))


def test_gradients_on_a_cpu_are_refused_before_anything_is_compiled(new_text_model, random_ids, monkeypatch):
    monkeypatch.setattr("llama4lab.model.flex_kernel.compiled_flex", lambda: pytest.fail("it was compiled"))
    model = new_text_model()
    model.attn = "flex"
    with pytest.raises(RuntimeError, match=r"no gradients on a CPU(?s:.*)torch.no_grad"):
        model(random_ids(1, 9))
