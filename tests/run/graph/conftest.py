"""Mixed passes step by step, with nothing but recorded runs and patches of hook points."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import llama4lab as lab
from llama4lab.run.metrics import evaluated, logit_diff


@pytest.fixture(scope="session")
def batch(small) -> tuple[lab.Prompt, lab.Prompt]:
    """Three clean rows of different length and their counterparts."""
    clean = [[5, 9, 17, 3, 8, 44, 21, 6, 90, 13], [7, 7, 2, 31, 12], [90, 14, 33, 6, 60, 2, 40]]
    corrupted = [[5, 12, 17, 3, 80, 44, 22, 6, 90, 13], [71, 7, 2, 31, 12], [90, 14, 33, 61, 60, 2, 40]]
    return small.prompt(clean), small.prompt(corrupted)


@pytest.fixture(scope="session")
def difference() -> lab.metrics.Metric:
    """A metric."""
    return logit_diff(11, 50)


@pytest.fixture(scope="session")
def written() -> Callable[..., dict[str, Tensor]]:
    """What every sender writes in a run, by name."""

    def read(run: lab.Run) -> dict[str, Tensor]:
        parts = {"embed_merged": run["embed_merged"]}
        for layer in range(run.meta["num_layers"]):
            for head, out in enumerate(run[f"layers.{layer}.self_attn.head_out"].unbind(2)):
                parts[f"layers.{layer}.self_attn.head_out.{head}"] = out
            block = f"layers.{layer}.feed_forward"
            if f"{block}.router.indices" not in run:
                parts[f"{block}.out"] = run[f"{block}.out"]
                continue
            for expert in range(run.meta["num_experts"]):
                own = run[f"{block}.router.indices"] == expert
                parts[f"{block}.experts.out.{expert}"] = (run[f"{block}.experts.out"] * own[..., None]).sum(2)
            parts[f"{block}.shared_expert.out"] = run[f"{block}.shared_expert.out"]
        return parts

    return read


@pytest.fixture(scope="session")
def step_by_step(written) -> Callable[..., Tensor]:
    """The metric of the base prompt where each receiver reads the given swapped senders from the source prompt.

    `swapped` has for the name of a receiver the names of its swapped senders. A pass gives the
    stream that a receiver reads and what the senders write; its own value is computed by hand and patched in, before
    those that come later.
    """

    def run(model, base, source, swapped: dict[str, list[str]], metric) -> Tensor:
        at = ["embed_merged", "layers.*.resid_*", "layers.*.self_attn.head_out", "layers.*.feed_forward.**"]
        theirs, patches, block = written(lab.record(model, source, at=at)), {}, ""
        for receiver, senders in swapped.items():
            if receiver.rstrip("0123456789") != block:  # what heads of one kind read is the same before and after them
                block = receiver.rstrip("0123456789")
                with lab.patched(model, {name: _joined(own) for name, own in patches.items()}):
                    now = lab.record(model, base, at=at)
                own = written(now)
            change = sum((theirs[name] - own[name] for name in senders), torch.zeros(()))
            if receiver == "logits":
                last = now.meta["num_layers"] - 1
                stream = now[f"layers.{last}.resid_post"] + change
                now.logits = model.lm_head(model.text.norm(stream))
                return evaluated(metric, now)
            name, patch = _patch(model, receiver, now, change)
            patches.setdefault(name, []).append(patch)
        with lab.patched(model, {name: _joined(own) for name, own in patches.items()}):
            return evaluated(metric, lab.record(model, base))

    return run


def _joined(functions: list[Callable[[Tensor], Tensor]]) -> Callable[[Tensor], Tensor]:
    def apply(old: Tensor) -> Tensor:
        for function in functions:
            old = function(old)
        return old

    return apply


def _patch(model, receiver: str, now: lab.Run, change: Tensor):
    """The hook point where a receiver's new value is put in, and the function that does it."""
    _, number, rest = receiver.split(".", 2)
    layer, parts = model.text.layers[int(number)], rest.split(".")
    if parts[0] == "self_attn":
        normed = layer.input_layernorm(now[f"layers.{number}.resid_pre"] + change)
        value = getattr(layer.self_attn, f"{parts[1]}_proj")(normed).unflatten(-1, (-1, layer.self_attn.d_head))
        head = torch.arange(value.shape[2])[:, None] == int(parts[2])
        return f"layers.{number}.self_attn.{parts[1]}", lambda old: torch.where(head, value, old)
    normed = layer.post_attention_layernorm(now[f"layers.{number}.resid_mid"] + change)
    name = f"layers.{number}.feed_forward"
    if parts[1:] == ["router"]:
        value = normed @ layer.feed_forward.router.weight.T
        return f"{name}.router.logits", lambda _: value
    if parts[1:] == ["shared_expert"] or parts[1:] == []:
        module = layer.feed_forward.shared_expert if parts[1:] else layer.feed_forward
        value = module(normed)
        return f"{name}.shared_expert.out" if parts[1:] else f"{name}.out", lambda _: value
    expert, indices, gates = int(parts[2]), now[f"{name}.router.indices"], now[f"{name}.router.gates"]
    experts = layer.feed_forward.experts
    gate, up = ((normed[:, :, None] * gates[..., None]) @ experts.gate_up_proj[expert]).chunk(2, -1)
    value = (up * experts.activation(gate)) @ experts.down_proj[expert]
    return f"{name}.experts.out", lambda old: torch.where((indices == expert)[..., None], value, old)
