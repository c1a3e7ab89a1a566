"""How training goes: answer accuracy and loss by domain on validation documents."""

import random

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from llama4lab.tiny.document import Document
from llama4lab.tiny.domains.catalogue import DRAWS, sample
from llama4lab.tiny.packing import GROUPS, Packer, Rows


def padded(packer: Packer, documents: list[Document]) -> Rows:
    """One document a row, padded on the right (nothing looks forward, so padding changes nothing before it)."""
    encoded = [packer.tokens(document) for document in documents]
    length = max(len(ids) for ids, _ in encoded)
    ids, weights = torch.full((len(encoded), length), packer.pad), torch.zeros(len(encoded), length)
    for row, (new, weight) in enumerate(encoded):
        ids[row, : len(new)], weights[row, : len(new)] = torch.tensor(new), torch.tensor(weight)
    groups = torch.tensor([GROUPS.index(document.domain) for document in documents])
    groups = torch.where(ids == packer.pad, -1, groups[:, None])
    scenes = [document.scene for document in documents if document.scene is not None]
    return Rows(ids, weights, groups, scenes, packer.end_of_turn)


@torch.no_grad()
def answers(
    model: nn.Module, rows: Rows, pixel_values: Float[Tensor, "tile 3 h w"] | None = None
) -> tuple[Float[Tensor, " answer"], Float[Tensor, " answer"], Int[Tensor, " answer"]]:
    """Loss, correctness (0 or 1) and row of every answer token, ends of turns apart.

    Args:
        model: the model.
        rows: documents, one a row.
        pixel_values: pixels in place of those of the rows' own scenes.
    """
    pixels = rows.pixel_values() if pixel_values is None else pixel_values
    logits = model(input_ids=rows.ids, pixel_values=pixels).logits[:, :-1].float()
    targets = rows.ids[:, 1:]
    asked = (rows.weights[:, 1:] == 1.0) & (targets != rows.end_of_turn)
    losses = F.cross_entropy(logits[asked], targets[asked], reduction="none")
    right = (logits[asked].argmax(-1) == targets[asked]).float()
    return losses, right, asked.nonzero()[:, 0]


def documents(domain: str, n: int, seed: int = 0, split: str = "validation") -> list[Document]:
    """`n` documents of a domain and split, the same for the same seed."""
    rng = random.Random(f"{domain} {split} {seed}")
    return [sample(domain, rng, split) for _ in range(n)]


def report(model: nn.Module, packer: Packer, n: int = 32) -> dict[str, tuple[float, float]]:
    """(answer accuracy, answer loss) by domain on validation documents."""
    model.eval()
    found = {}
    for domain in DRAWS:
        losses, right, _ = answers(model, padded(packer, documents(domain, n)))
        found[domain] = (right.mean().item(), losses.mean().item())
    model.train()
    return found
