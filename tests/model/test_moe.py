"""What editing a router does, and where the gate acts."""

import pytest
import torch
from torch.nn.functional import silu

from llama4lab.model.moe import MixtureOfExperts


@pytest.fixture(params=[1, 2], ids=["top-1", "top-2"])
def layer(request, new_text_model) -> MixtureOfExperts:
    return new_text_model(num_experts_per_tok=request.param).text.layers[3].feed_forward


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 6, 64)


def run(layer: MixtureOfExperts, x: torch.Tensor, **edits) -> dict[str, torch.Tensor]:
    """What the hook points show when `logits`, `indices` or `gates` are replaced by a function of themselves."""
    seen, handles = {}, []
    for name, edit in edits.items():
        handles.append(layer.router.get_submodule(name).register_forward_hook(lambda m, a, y, edit=edit: edit(y)))
    points = {"logits": layer.router, "indices": layer.router, "gates": layer.router}
    for name, owner in points.items():
        point = owner.get_submodule(name)
        handles.append(point.register_forward_hook(lambda m, a, y, name=name: seen.update({name: y})))
    handles.append(layer.experts.out.register_forward_hook(lambda m, a, y: seen.update(experts=y)))
    with torch.no_grad():
        seen["out"] = layer(x)
    for handle in handles:
        handle.remove()
    return seen


def expert(layer: MixtureOfExperts, index: int, x: torch.Tensor) -> torch.Tensor:
    gate, up = (x @ layer.experts.gate_up_proj[index]).chunk(2, -1)
    return (up * silu(gate)) @ layer.experts.down_proj[index]


def test_editing_logits_sends_the_token_to_another_expert_with_that_gate(layer, x):
    def prefer_the_last(logits):
        logits = logits.clone()
        logits[..., 3] = 9.0
        return logits

    seen = run(layer, x, logits=prefer_the_last)
    assert (seen["indices"][..., 0] == 3).all()
    torch.testing.assert_close(seen["gates"][..., 0], torch.tensor(9.0).sigmoid().expand(2, 6))
    torch.testing.assert_close(seen["experts"][..., 0, :], expert(layer, 3, x * torch.tensor(9.0).sigmoid()))


def test_editing_indices_forces_the_expert_whose_gate_is_the_sigmoid_of_its_own_logit(layer, x):
    seen = run(layer, x, indices=lambda indices: torch.full_like(indices, 2))
    own = seen["logits"][..., 2].sigmoid()
    torch.testing.assert_close(seen["gates"], own.unsqueeze(-1).expand_as(seen["gates"]))
    torch.testing.assert_close(seen["experts"][..., 0, :], expert(layer, 2, x * own.unsqueeze(-1)))


def test_editing_gates_changes_how_strongly_not_which(layer, x):
    plain = run(layer, x)
    seen = run(layer, x, gates=lambda gates: gates * 0.25)
    assert torch.equal(seen["indices"], plain["indices"])
    assert torch.equal(seen["logits"], plain["logits"])
    token = (1, 4)
    index, gate = int(plain["indices"][token][0]), plain["gates"][token][0]
    torch.testing.assert_close(seen["experts"][token][0], expert(layer, index, x[token] * gate * 0.25))


def test_a_gate_of_zero_leaves_the_shared_expert_alone(layer, x):
    seen = run(layer, x, gates=torch.zeros_like)
    torch.testing.assert_close(seen["out"], layer.shared_expert(x))


def test_the_gate_scales_the_input_of_an_expert_and_not_its_output(layer, x):
    """vllm#16744, sglang#7889, llm-compressor#1907: scaling the output instead gives plausible, wrong text."""
    seen = run(layer, x)
    token = (0, 3)
    index, gate = int(seen["indices"][token][0]), seen["gates"][token][0]
    torch.testing.assert_close(seen["experts"][token][0], expert(layer, index, gate * x[token]))
    wrong = gate * expert(layer, index, x[token])
    assert (seen["experts"][token][0] - wrong).norm() > 0.05 * wrong.norm()


def test_the_shared_expert_sees_the_input_without_gate(layer, x):
    seen = []
    with layer.shared_expert.out.register_forward_hook(lambda m, a, y: seen.append(y)):
        layer(x)
    gate, up = layer.shared_expert.gate_proj(x), layer.shared_expert.up_proj(x)
    torch.testing.assert_close(seen[0], layer.shared_expert.down_proj(silu(gate) * up))


def test_gates_are_sigmoids_and_do_not_sum_to_one(layer, x):
    seen = run(layer, x)
    torch.testing.assert_close(seen["gates"], seen["logits"].gather(-1, seen["indices"]).sigmoid())


def test_ties_go_to_the_expert_that_topk_takes(layer, x):
    seen = run(layer, x, logits=torch.zeros_like)
    top_k = seen["indices"].shape[-1]
    assert torch.equal(seen["indices"], torch.topk(torch.zeros(2, 6, 4), top_k).indices)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda indices: indices - 5, "-5.*0 to 3|-4.*0 to 3|from -"),
        (lambda indices: indices + 4, "0 to 3"),
        (lambda indices: indices.float(), "float32"),
    ],
    ids=["negative", "too large", "not whole"],
)
def test_indices_of_no_expert_are_refused(edit, message, layer, x):
    with pytest.raises((ValueError, TypeError), match=message):
        run(layer, x, indices=edit)


def test_router_logits_are_linear_in_the_input(layer, x):
    torch.testing.assert_close(run(layer, x)["logits"], x @ layer.router.weight.T)
