"""What a plan places: the weights of a model, part by part, and which of them wait on disk."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from transformers import Llama4TextConfig

from llama4lab.model.weight_sizes import Weight

# The parts that are never split between devices, in the order in which a pass runs through them.
PARTS = ("vision_model", "multi_modal_projector", r".*\bembed_tokens", r".*\blayers\.\d+", r".*\bnorm", r".*\blm_head")


@dataclass(frozen=True)
class Model:
    """What is to be placed.

    Attributes:
        sizes: Of all weights.
        config: Of the text model.
        dtype: To compute in.
        tokens: Of the longest row.
        tied_head: The name of the head, if it is the embeddings once more.
    """

    sizes: Sequence[Weight]
    config: Llama4TextConfig
    dtype: torch.dtype
    tokens: int
    tied_head: str | None = None

    @cached_property
    def parts(self) -> dict[str, list[Weight]]:
        """The weights of each part."""
        found: dict[str, list[Weight]] = {}
        for size in self.sizes:
            found.setdefault(part_of(size.name), []).append(size)
        return found

    @cached_property
    def largest_expert(self) -> int:
        """Numbers in the largest matrix of an expert."""
        return max((size.parameters // size.experts for size in self.sizes if size.experts), default=0)


@dataclass(frozen=True)
class Case:
    """A model of which some weights wait.

    Attributes:
        model: The model.
        offload: Whether routed experts wait on disk.
        lent: Whether RAM lends what it holds to a GPU.
        disk: Parts of which all matrices wait on disk.
    """

    model: Model
    offload: bool = False
    lent: bool = False
    disk: frozenset[str] = frozenset()

    def waits(self, size: Weight) -> bool:
        """Whether a weight waits on disk."""
        return size.name in self._names

    @cached_property
    def needs(self) -> dict[str, int]:
        """Bytes of each part that are in memory all the time."""
        names = self._names
        return {
            part: sum(size.resident for size in sizes if size.name not in names)
            for part, sizes in self.model.parts.items()
        }

    @cached_property
    def waiting(self) -> list[Weight]:
        """What waits on disk."""
        return [
            size
            for part, sizes in self.model.parts.items()
            for size in sizes
            if (self.offload and size.experts) or (size.waits and part in self.disk)
        ]

    @cached_property
    def making(self) -> int:
        """The most bytes for the numbers of one matrix."""
        names = self._names
        sizes = self.model.sizes
        return max((size.making_waiting if size.name in names else size.making for size in sizes), default=0)

    @cached_property
    def passing(self) -> list[int]:
        """The largest of the matrices that wait, as they are read or kept."""
        each = [max(size.one_read, size.one_kept) for size in self.waiting for _ in range(min(max(size.experts, 1), 4))]
        return sorted(each)[-4:]

    @cached_property
    def rounding(self) -> int:
        """The most bytes for rounding a matrix that is read."""
        return max((size.rounding for size in self.waiting), default=0)

    @cached_property
    def largest(self) -> int:
        """Bytes of the largest weight that is in memory."""
        names = self._names
        return max((size.resident for size in self.model.sizes if size.name not in names), default=0)

    @cached_property
    def _names(self) -> set[str]:
        return {size.name for size in self.waiting}


@cache
def part_of(name: str) -> str:
    """Gives the part of the model that a weight goes with: a layer, the embeddings, the vision tower and so on."""
    found = next(found for pattern in PARTS if (found := re.match(pattern + r"(?=\.)", name)))
    return found[0]


def layer_of(part: str) -> int | None:
    """Gives the number of a text layer; None for another part."""
    found = re.search(r"(?<!vision_model\.model\.)\blayers\.(\d+)$", part)
    return int(found[1]) if found else None
