"""Sparse experts give what a loop over all experts and all tokens gives."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama4lab.model import experts as experts_file
from llama4lab.model.experts import Experts


def new_experts(text_config, dtype=torch.float32, **changes) -> Experts:
    experts = Experts(text_config(hidden_size=16, intermediate_size=12, **changes))
    generator = torch.Generator().manual_seed(3)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return experts.to(dtype)


def routing(batch: int, seq: int, slots: int, num_experts: int, dtype=torch.float32):
    generator = torch.Generator().manual_seed(batch + 10 * seq)
    x = torch.randn(batch, seq, 16, generator=generator)
    logits = torch.randn(batch, seq, num_experts, generator=generator)
    top = logits.topk(slots)
    return x.to(dtype), top.indices, top.values.sigmoid().to(dtype)


def weight(experts: Experts, name: str) -> torch.Tensor:
    return experts.get_parameter(name)


def by_loop(experts: Experts, x, indices, gates) -> torch.Tensor:
    """All experts on all tokens, one at a time; then the chosen ones."""
    outs = []
    for slot in range(indices.shape[-1]):
        scaled = x * gates[..., slot, None]
        every = []
        for gate_up, down in zip(weight(experts, "gate_up_proj"), weight(experts, "down_proj"), strict=True):
            gate, up = (scaled @ gate_up).chunk(2, -1)
            every.append((up * torch.nn.functional.silu(gate)) @ down)
        picked = torch.stack(every, -2).gather(-2, indices[..., slot, None, None].expand(*x.shape[:2], 1, x.shape[-1]))
        outs.append(picked.squeeze(-2))
    return torch.stack(outs, -2)


@given(
    batch=st.integers(1, 3),
    seq=st.integers(1, 12),
    slots=st.integers(1, 3),
    num_experts=st.sampled_from([3, 8]),
)
def test_sparse_experts_equal_the_loop_over_all(batch, seq, slots, num_experts, text_config):
    experts = new_experts(text_config, num_local_experts=num_experts, num_experts_per_tok=slots)
    inputs = routing(batch, seq, slots, num_experts)
    torch.testing.assert_close(experts(*inputs), by_loop(experts, *inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("seq", [1, 3, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_direct_path_equals_the_sorted_path(dtype, seq, slots, text_config, monkeypatch):
    experts = new_experts(text_config, dtype, num_experts_per_tok=slots)
    inputs = routing(2, seq, slots, 4, dtype)
    results = []
    for limit in (0, 10_000):
        monkeypatch.setattr(experts_file, "DIRECT_LIMIT", limit)
        results.append(experts(*inputs))
    torch.testing.assert_close(results[0], results[1], atol=2e-6 if dtype == torch.float32 else 0.02, rtol=0)


@pytest.mark.parametrize("seq", [1, 9])
@pytest.mark.parametrize("fast", [True, False])
def test_bfloat16_equals_float32_within_its_rounding_with_and_without_instructions(fast, seq, text_config, monkeypatch):
    monkeypatch.setattr(experts_file, "_fast_half_precision", lambda: fast)
    narrow = new_experts(text_config, torch.bfloat16, num_experts_per_tok=2)
    x, indices, gates = routing(1, seq, 2, 4, torch.bfloat16)
    out = narrow(x, indices, gates)
    assert out.dtype == torch.bfloat16
    wide = by_loop(narrow.float(), x.float(), indices, gates.float())
    torch.testing.assert_close(out.float(), wide, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("limit", [0, 10_000], ids=["sorted", "direct"])
def test_gradients_equal_those_of_the_loop(limit, text_config, monkeypatch):
    monkeypatch.setattr(experts_file, "DIRECT_LIMIT", limit)
    grads = []
    for sparse in (True, False):
        experts = new_experts(text_config, num_experts_per_tok=2)
        x, indices, gates = routing(2, 7, 2, 4)
        x.requires_grad_()
        gates.requires_grad_()
        out = experts(x, indices, gates) if sparse else by_loop(experts, x, indices, gates)
        (out * torch.arange(16)).sum().backward()
        grads.append([x.grad, gates.grad, weight(experts, "gate_up_proj").grad, weight(experts, "down_proj").grad])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_an_expert_that_nobody_chose_is_neither_read_nor_given_a_gradient(text_config):
    experts = new_experts(text_config)
    with torch.no_grad():
        weight(experts, "gate_up_proj")[2] = torch.nan
    x, indices, gates = routing(2, 9, 1, 4)
    indices[indices == 2] = 3
    out = experts(x, indices, gates)
    out.sum().backward()
    assert out.isfinite().all()
    gradient = weight(experts, "gate_up_proj").grad
    assert gradient is not None
    assert torch.equal(gradient[2], torch.zeros(16, 24))


@pytest.mark.parametrize("seq", [1, 9])
def test_watching_the_neurons_changes_nothing_and_shows_them_in_the_order_of_tokens(seq, text_config):
    experts = new_experts(text_config, num_experts_per_tok=2)
    x, indices, gates = routing(2, seq, 2, 4)
    plain, seen = experts(x, indices, gates), []
    with experts.hidden.register_forward_hook(lambda module, args, hidden: seen.append(hidden)):
        watched = experts(x, indices, gates)
    assert torch.equal(plain, watched)
    token, slot = (1, seq - 1), 1
    gate_up = weight(experts, "gate_up_proj")[indices[token][slot]]
    gate, up = (x[token] * gates[token][slot] @ gate_up).chunk(2, -1)
    torch.testing.assert_close(seen[0][token][slot], up * torch.nn.functional.silu(gate), atol=1e-5, rtol=1e-5)


def test_edited_neurons_reach_the_output_of_their_token_only(text_config):
    experts = new_experts(text_config)
    inputs = routing(2, 9, 1, 4)
    plain = experts(*inputs)

    def silence(module, args, hidden):
        hidden = hidden.clone()
        hidden[1, 4] = 0
        return hidden

    with experts.hidden.register_forward_hook(silence):
        edited = experts(*inputs)
    assert torch.equal(edited[1, 4], torch.zeros(1, 16))
    changed = (edited != plain).any(-1).squeeze(-1)
    assert changed.nonzero().tolist() == [[1, 4]]
