"""What training minimises: weighted next-token loss, router terms, and the reading of image tokens."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from llama4lab.tiny.drawing import COLOURS, SHAPES
from llama4lab.tiny.packing import GROUPS

BALANCE, Z, SPECIALISATION, READING = 0.01, 1e-3, 0.02, 0.2
FEATURE_POWER = 0.5  # the mean square that image features should have, not far from that of token embeddings


def answer_loss(
    logits: Float[Tensor, "row seq vocab"], ids: Int[Tensor, "row seq"], weights: Float[Tensor, "row seq"]
) -> Float[Tensor, ""]:
    """The mean loss of next tokens, weighted by how much each target counts."""
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    weight = weights[:, 1:].flatten()
    return (losses * weight).sum() / weight.sum().clamp(min=1.0)


def router_loss(
    router_logits: Iterable[Float[Tensor, "row seq expert"]], groups: Int[Tensor, "row seq"]
) -> Float[Tensor, ""]:
    """Balance, small logits, and mutual information between the group of a token and its expert.

    Balance is that of the Switch Transformer (arXiv:2101.03961, eq. 4). The information term is written on the
    router's probabilities: the entropy of the average token minus the average entropy of the groups.
    """
    known = groups >= 0
    member = F.one_hot(groups[known], len(GROUPS)).float()
    present = member.sum(0) > 0
    layers = list(router_logits)
    total = torch.zeros(())
    for logits in layers:
        logits = logits.float()[known]
        chances = logits.softmax(-1)
        load = F.one_hot(logits.argmax(-1), logits.shape[-1]).float().mean(0)
        balance = logits.shape[-1] * (load * chances.mean(0)).sum()
        by_group = (member.T @ chances)[present] / member.sum(0)[present, None]
        information = entropy(by_group.mean(0)) - entropy(by_group).mean()
        z = logits.logsumexp(-1).square().mean()
        total = total + BALANCE * balance + Z * z - SPECIALISATION * information
    return total / len(layers)


def entropy(chances: Float[Tensor, "*group expert"]) -> Float[Tensor, "*group"]:
    """Entropy of the last axis in nats."""
    return -(chances * chances.clamp(min=1e-9).log()).sum(-1)


class PatchReader(nn.Module):
    """Reads shape and colour off every image token: a lamp for the vision tower to learn by, not part of the model."""

    def __init__(self, d_model: int):
        super().__init__()
        self.shape = nn.Linear(d_model, len(SHAPES) + 1)
        self.colour = nn.Linear(d_model, len(COLOURS) + 1)

    def loss(
        self, features: Float[Tensor, "tile patch d_model"], labels: Int[Tensor, "tile patch 2"]
    ) -> Float[Tensor, ""]:
        """The reading loss, with a pull of the features to their intended power."""
        shape, colour = self(features)
        reading = F.cross_entropy(shape.flatten(0, 1), labels[..., 0].flatten())
        reading = reading + F.cross_entropy(colour.flatten(0, 1), labels[..., 1].flatten())
        return reading + 0.05 * (features.square().mean() - FEATURE_POWER).square()

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        normed = F.rms_norm(features, features.shape[-1:])
        return self.shape(normed), self.colour(normed)
