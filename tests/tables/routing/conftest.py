"""A model whose routing is set by hand, and prompts for it."""

# torch declares submodules as tensors or modules.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportCallIssue=false, reportOperatorIssue=false, reportIndexIssue=false, reportReturnType=false
# pyright: reportOptionalMemberAccess=false

from collections.abc import Callable

import pytest
import torch

from llama4lab.model.llama4 import HookedLlama4ForCausalLM
from llama4lab.prompt.prompt import Prompt
from llama4lab.run.recording import record
from llama4lab.run.run import Run

CLASSES = 4
READ = 0.1  # keeps gates well below 1, where it matters what they are multiplied with
WORDS = {10: 0, 20: 1, 30: 2, 40: 3}  # token -> class; its second class is the next one
WATCHED = [
    *(f"layers.*.feed_forward.{part}" for part in ("router.*", "experts.*", "shared_expert.out")),
    "layers.*.self_attn.out",
    "layers.*.resid_mid",
]


@torch.no_grad()
def plant(model: HookedLlama4ForCausalLM) -> None:
    """Makes tokens of class c go to expert c, which writes along direction 8 + c; nothing else writes.

    Embeddings are sums of class directions, attention and the shared expert write nothing, router rows are class
    directions. An expert has one neuron that reads its class by gate and up, so that it writes silu(z) * z.
    """
    for parameter in model.parameters():
        parameter.zero_()
    for module in model.modules():
        if type(module).__name__ == "RMSNorm":
            module.weight.fill_(1.0)
    embedding = model.get_input_embeddings().weight
    for token, kind in WORDS.items():
        embedding[token, kind], embedding[token, (kind + 1) % CLASSES] = 2.0, 1.0
    for block in model.text.layers:
        block.feed_forward.router.weight[:, :CLASSES] = READ * torch.eye(CLASSES)
        experts, d_ff = block.feed_forward.experts, block.feed_forward.experts.down_proj.shape[1]
        for expert in range(CLASSES):
            experts.gate_up_proj[expert, expert, 0] = experts.gate_up_proj[expert, expert, d_ff] = READ
            experts.down_proj[expert, 0, 8 + expert] = 1.0
    output = model.get_output_embeddings().weight
    for token, kind in WORDS.items():
        output[token, 8 + kind] = 1.0


@pytest.fixture(scope="session")
def planted_model(new_text_model) -> Callable[..., HookedLlama4ForCausalLM]:
    """A model of two routers with planted routes; keyword arguments change its config."""

    def make(**changes) -> HookedLlama4ForCausalLM:
        model = new_text_model(num_hidden_layers=2, interleave_moe_layer_step=1, **changes)
        plant(model)
        return model

    return make


@pytest.fixture(scope="session")
def planted_prompt() -> Prompt:
    """Tokens of the classes 0 1 2 2 3, and 1 0 behind three places of padding."""
    ids = torch.tensor([[10, 20, 30, 30, 40], [0, 0, 0, 20, 10]])
    mask = (ids != 0).long()
    tokens = [[f"<{token}>" if token else "" for token in row] for row in ids.tolist()]
    modality = [["text" if token else "pad" for token in row] for row in ids.tolist()]
    return Prompt(ids, mask, None, tokens, modality)


@pytest.fixture(scope="session")
def planted_run(planted_model, planted_prompt) -> Callable[..., tuple[HookedLlama4ForCausalLM, Run]]:
    """The planted model and its run of the prompt, everything about experts recorded."""

    def make(**changes) -> tuple[HookedLlama4ForCausalLM, Run]:
        model = planted_model(**changes)
        return model, record(model, planted_prompt, at=WATCHED)

    return make


@pytest.fixture(scope="session")
def routed_run(make_prompt, make_run) -> Callable[..., Run]:
    """A run of given choices: for each layer a list of rows of tokens, each a list of experts."""

    def make(choices: dict[int, list], *, num_experts: int = 4, rows: list[str] | None = None) -> Run:
        tensors = {f"layers.{layer}.feed_forward.router.indices": torch.tensor(own) for layer, own in choices.items()}
        first = next(iter(tensors.values()))
        rows = rows or [" ".join("abcdefghijklmnopqrstuvwxyz"[: first.shape[1]])] * first.shape[0]
        return make_run(make_prompt(*rows), tensors, num_experts=num_experts, moe_layers=list(choices))

    return make
