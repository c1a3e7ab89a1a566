"""Which experts get the slots of each token when some are barred, favoured, forced or exchanged."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

BARRED = -(10**6)


@dataclass(frozen=True, eq=False)
class Standing:
    """How the experts of a router stand with each token: slots go by level, and within a level by score.

    Attributes:
        scores: The router's logits, with what was added to them for the choice only.
        levels: 0 for most; above it those that come first, below it those that are barred.
    """

    scores: Float[Tensor, "batch seq expert"]
    levels: Int[Tensor, "batch seq expert"]

    @classmethod
    def of(cls, logits: Float[Tensor, "batch seq expert"]) -> "Standing":
        """The standing that the logits give."""
        scores = logits.detach()
        scores = scores if scores.dtype == torch.float64 else scores.float()
        return cls(scores, torch.zeros_like(scores, dtype=torch.long))

    def best(self, held: Int[Tensor, "batch seq slot"]) -> Int[Tensor, "batch seq slot"]:
        """The experts that stand best, as many as there are slots; where two stand equal, those of `held` win."""
        slots = held.shape[-1]
        rank = torch.arange(slots, 0, -1, device=held.device).expand(held.shape)
        keys = (torch.zeros_like(self.levels).scatter(-1, held, rank), self.scores, self.levels)
        order = torch.arange(self.levels.shape[-1], device=held.device).expand(self.levels.shape)
        for key in keys:
            order = order.gather(-1, key.gather(-1, order).argsort(dim=-1, descending=True, stable=True))
        return order[..., :slots]

    def honouring(self, held: Int[Tensor, "batch seq slot"]) -> "Standing":
        """Puts the held experts of a token on top if they are not its best ones, so were chosen by something else."""
        best = self.best(held)
        other = (held.sort(-1).values != best.sort(-1).values).any(-1, keepdim=True)
        top = self.levels.amax(-1, keepdim=True) + 1
        lifted = self.levels.scatter(-1, held, top.expand(held.shape))
        return Standing(self.scores, torch.where(other, lifted, self.levels))

    def changed(
        self, *, barred: Sequence[int] = (), preferred: Sequence[int] = (), biases: Mapping[int, float] | None = None
    ) -> "Standing":
        """With some experts barred, some before all others, and numbers added to the scores of some."""
        scores, levels = self.scores.clone(), self.levels.clone()
        for expert, bias in (biases or {}).items():
            scores[..., expert] += bias
        if preferred:
            levels[..., list(preferred)] = levels.amax(-1, keepdim=True) + 1
        levels[..., list(barred)] = BARRED
        return Standing(scores, levels)

    def where(self, mask: Bool[Tensor, "batch seq"], other: "Standing") -> "Standing":
        """This standing where the mask says so, and the other elsewhere."""
        mask = mask[..., None]
        return Standing(torch.where(mask, self.scores, other.scores), torch.where(mask, self.levels, other.levels))

    def bars(self, chosen: Int[Tensor, "batch seq slot"]) -> Bool[Tensor, "batch seq"]:
        """Whether a token has an expert that is barred."""
        return (self.levels.gather(-1, chosen) == BARRED).any(-1)


def in_place(held: Int[Tensor, "batch seq slot"], new: Int[Tensor, "batch seq slot"]) -> Int[Tensor, "batch seq slot"]:
    """The new experts, each in the slot that it had; the others take the slots left free, in their order."""
    same = held[..., :, None] == new[..., None, :]
    stays, entering = same.any(-1), ~same.any(-2)
    free = stays.int().argsort(dim=-1, stable=True)
    first = (~entering).int().argsort(dim=-1, stable=True)
    return torch.where(stays, held, held.scatter(-1, free, new.gather(-1, first)))


def forced_first(held: Int[Tensor, "batch seq slot"], forced: Sequence[int]) -> Int[Tensor, "batch seq slot"]:
    """The forced experts in the first slots; the others as they are, as many as there is room for."""
    slots = held.shape[-1]
    first = torch.tensor(forced, device=held.device).expand(*held.shape[:-1], len(forced))
    kept = (held[..., :, None] != first[..., None, :]).all(-1)
    order = (~kept).int().argsort(dim=-1, stable=True)
    return torch.cat([first, held.gather(-1, order)], dim=-1)[..., :slots]


def mapped(held: Int[Tensor, "batch seq slot"], mapping: Mapping[int, int], num_experts: int) -> Tensor:
    """Each expert replaced by the one that the mapping has for it."""
    table = torch.arange(num_experts, device=held.device)
    for expert, other in mapping.items():
        table[expert] = other
    return table[held]
