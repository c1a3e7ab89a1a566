"""What single experts are for: their load, their information about domains, and what breaks without them."""

import copy

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from llama4lab.model.llama4 import HookedLlama4
from llama4lab.model.moe import MixtureOfExperts
from llama4lab.tiny.architecture import initialise
from llama4lab.tiny.domains.catalogue import DRAWS
from llama4lab.tiny.packing import GROUPS, Packer, Rows
from llama4lab.tiny.progress import answers, documents, padded


def held_out(packer: Packer, n: int) -> Rows:
    """Rows of `n` held-out documents of every domain that fits into a chunk (four times as many translations)."""
    found = []
    for domain in DRAWS:
        if "far" not in domain:
            found += documents(domain, 4 * n if domain == "translation" else n, split="test")
    return padded(packer, found)


def untrained(model: HookedLlama4, seed: int = 1) -> HookedLlama4:
    """A model of the same shape with start values: what any figure has to be compared with."""
    fresh = copy.deepcopy(model)
    initialise(fresh, seed)
    return fresh


@torch.no_grad()
def expert_counts(model: HookedLlama4, rows: Rows) -> dict[int, Float[Tensor, "group expert"]]:
    """How many tokens of each group every expert got, by layer."""
    output = model(input_ids=rows.ids, pixel_values=rows.pixel_values(), output_router_logits=True)
    known = rows.groups >= 0
    member = F.one_hot(rows.groups[known], len(GROUPS)).float()
    counts = {}
    for layer, logits in output.router_logits.items():
        chosen = F.one_hot(logits[known].argmax(-1), logits.shape[-1]).float()
        counts[layer] = member.T @ chosen
    return counts


def expert_load(model: HookedLlama4, rows: Rows) -> dict[int, Float[Tensor, " expert"]]:
    """The share of tokens that each expert got, by layer."""
    return {layer: counts.sum(0) / counts.sum() for layer, counts in expert_counts(model, rows).items()}


def information(model: HookedLlama4, rows: Rows) -> dict[int, float]:
    """Mutual information between the domain of a token and its expert in nats, all domains weighing the same."""
    found = {}
    for layer, counts in expert_counts(model, rows).items():
        joint = counts / counts.sum(-1, keepdim=True).clamp(min=1) / len(GROUPS)
        independent = joint.sum(0, keepdim=True) * joint.sum(1, keepdim=True)
        found[layer] = (joint * (joint.clamp(min=1e-12) / independent.clamp(min=1e-12)).log()).sum().item()
    return found


def ablation(model: HookedLlama4, rows: Rows) -> dict[int, Float[Tensor, "expert group"]]:
    """By how much the answer loss of each group rises when one expert writes nothing, by layer."""
    baseline = group_losses(model, rows)
    rises = {}
    for index, layer in enumerate(model.text.layers):
        if isinstance(layer.feed_forward, MixtureOfExperts):
            experts = range(layer.feed_forward.router.out_features)
            silenced = [_without(model, layer.feed_forward, expert, rows) for expert in experts]
            rises[index] = torch.stack(silenced) - baseline
    return rises


def _without(model: HookedLlama4, feed_forward: MixtureOfExperts, expert: int, rows: Rows) -> Float[Tensor, " group"]:
    """The losses by group while one expert writes nothing for the tokens that were sent to it."""
    sent: list[Tensor] = []

    def note(module, inputs, indices):
        sent[:] = [indices]

    def silence(module, inputs, out):
        return out * rearrange(sent[0] != expert, "batch seq slot -> batch seq slot 1")

    handles = [
        feed_forward.router.indices.register_forward_hook(note),
        feed_forward.experts.out.register_forward_hook(silence),
    ]
    try:
        return group_losses(model, rows)
    finally:
        for handle in handles:
            handle.remove()


def group_losses(model: HookedLlama4, rows: Rows) -> Float[Tensor, " group"]:
    """The mean answer loss of every group."""
    losses, _, row = answers(model, rows)
    member = F.one_hot(rows.groups[row, 0], len(GROUPS)).float()
    return (losses @ member) / member.sum(0).clamp(min=1)


def ranking(rises: dict[int, Float[Tensor, "expert group"]]) -> list[tuple[int, int, int, float, float]]:
    """(layer, expert, group hit most, its rise, median rise of all groups), the largest difference first."""
    found = []
    for layer, table in rises.items():
        for expert, row in enumerate(table):
            hit, group = row.max(0)
            found.append((layer, expert, int(group), hit.item(), row.median().item()))
    return sorted(found, key=lambda entry: entry[4] - entry[3])
