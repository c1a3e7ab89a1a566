"""What was rounded while it was loaded is written as compressed-tensors stores it, experts one by one."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from llama4lab.checkpoint.layouts import Place
from llama4lab.checkpoint.matrices import Matrix
from llama4lab.checkpoint.quantization_settings import can_be_told
from llama4lab.checkpoint.schemes.scheme import Scheme
from llama4lab.checkpoint.written_shards import Entry
from llama4lab.model.expert_bank import ExpertBank
from llama4lab.model.packed_matrix import PackedMatrix
from llama4lab.model.packed_weights import (
    Packed,
    described,
    fetched,
    matrices_of,
    packed_of,
    parameter_in_memory,
    shape_of,
    weights_of,
)
from llama4lab.model.plain_tensors import Entries, parameter_entries, transformers_layout

ROUNDED = {"weight", "weight_packed", "weight_scale", "weight_shape"}  # what rounding makes, by what it is


def is_rounded(model: nn.Module) -> bool:
    """Whether what is packed in a model is as it is after rounding, which compressed-tensors has a form for."""
    for weight in packed_of(model):
        for number in range(len(matrices_of(weight))):
            own = described(weight, number)
            for matrix, tensors in zip(own.matrices, own.tensors, strict=True):
                rounded = can_be_told(matrix.scheme) and tensors.keys() <= ROUNDED and not matrix.turned
                if not rounded and (not matrix.is_plain or isinstance(weight, ExpertBank)):
                    return False
    return True


@dataclass
class Rounded:
    """What to write for a model that was rounded while it was loaded.

    Attributes:
        entries: The tensors.
        modules: The names of the rounded linear modules, by how they are.
        plain: The names of the others.
    """

    entries: Entries = field(default_factory=dict)
    modules: dict[Scheme, list[str]] = field(default_factory=dict)
    plain: list[str] = field(default_factory=list)


def rounded_entries(model: nn.Module) -> Rounded:
    """Gives what to write for a model that was rounded while it was loaded."""
    weights, _ = weights_of(model)
    layout = transformers_layout(weights, unfused=True)
    vocabulary = {f"{name}.weight" for name, module in model.named_modules() if hasattr(module, "num_embeddings")}
    made = Rounded()
    for name, weight in weights.items():
        if isinstance(weight, Packed):
            # Gate and up that were rounded as one come after each other, and are read as one.
            fetch = lru_cache(maxsize=1)(lambda number, weight=weight: fetched(weight, number))
            for number, places in enumerate(layout.matrices(name, shape_of(weight))):
                for part in _separate(described(weight, number), places):
                    made.entries |= part.entries(fetch, number)
                    if not part.matrix.is_plain:
                        made.modules.setdefault(part.matrix.scheme, []).append(part.place.base)
                    elif name not in vocabulary:
                        made.plain.append(part.place.base)
            continue
        own = parameter_entries(name, parameter_in_memory(model, name, weight), layout)
        made.entries |= own
        if name not in vocabulary:
            linear = [
                on_disk for on_disk, entry in own.items() if on_disk.endswith(".weight") and len(entry.shape) == 2
            ]
            made.plain += [on_disk.removesuffix(".weight") for on_disk in linear]
    return made


class _Separate(NamedTuple):
    """A matrix at its place, which some rows of matrix `of` of an expert are."""

    place: Place
    matrix: Matrix
    tensors: Mapping[str, Tensor]
    of: int
    rows: slice

    def entries(self, fetch: Callable[[int], PackedMatrix], number: int) -> Entries:
        made = {role: Entry(t.dtype, tuple(t.shape), self._pieces(fetch, number, role)) for role, t in self._cut()}
        if "weight_shape" in made:
            made["weight_shape"] = Entry.of(torch.tensor(self.place.shape))
        return {f"{self.place.base}.{role}": entry for role, entry in made.items()}

    def _cut(self) -> list[tuple[str, Tensor]]:
        return [(role, tensor[self.rows]) for role, tensor in self.tensors.items()]

    def _pieces(self, fetch: Callable[[int], PackedMatrix], number: int, role: str) -> Callable[[], list[Tensor]]:
        return lambda: [fetch(number).tensors[self.of][role][self.rows]]


def _separate(packed: PackedMatrix, places: Sequence[Place]) -> Iterator[_Separate]:
    """The matrices at some places; gate and up may have been rounded as one, the rows of gate first."""
    alone, start = len(packed.matrices) == len(places), 0
    for number, place in enumerate(places):
        of = number if alone else 0
        rows = slice(None) if alone else slice(start, start + place.shape[0])
        yield _Separate(place, packed.matrices[of], packed.tensors[of], of, rows)
        start += place.shape[0]
