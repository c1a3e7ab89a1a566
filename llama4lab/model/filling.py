"""Filling an empty model with the weights of a checkpoint: as numbers, packed, or left to wait on disk."""

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from llama4lab.checkpoint.matrices import Matrix
from llama4lab.checkpoint.weights import Weights
from llama4lab.model.expert_bank import ExpertBank, Held, Source
from llama4lab.model.expert_store import ExpertStore, Stored
from llama4lab.model.experts import Experts
from llama4lab.model.packed_linear import PackedLinear
from llama4lab.model.packed_matrix import PackedMatrix, quantized
from llama4lab.model.stored_embedding import StoredEmbedding
from llama4lab.model.wanted import Wanted

# What may be quantized on the way: the MLPs. Routers, attention, embeddings, head and vision stay as they are.
QUANTIZABLE = re.compile(
    r"layers\.\d+\.feed_forward\.((shared_expert\.)?(gate|up|down)_proj\.weight|experts\.(gate_up|down)_proj)$"
)


class Filling:
    """Puts every stored tensor into its place, in the order of the files.

    Args:
        weights: What is stored.
        dtype: To compute in.
        placed: The device of each parameter.
        waiting: The parameters that stay on disk; of them only matrices do, what is small is read.
        store: Where they wait; None if all are in memory.
        quantize: How to quantize the MLPs; None to take them as they are.
    """

    def __init__(
        self,
        weights: Weights,
        dtype: torch.dtype,
        placed: Mapping[str, torch.device],
        waiting: Collection[str] = (),
        store: ExpertStore | None = None,
        quantize: str | None = None,
    ):
        self.weights, self.dtype, self.placed, self.store, self.quantize = weights, dtype, placed, store, quantize
        self.packed, self.waiting = set(weights.packed), set(waiting)

    def fill(self, model: nn.Module, tied: Mapping[str, str]) -> None:
        """Fills a model; tensors that are another one once more come last, when that is there.

        Raises:
            ValueError: if a number is NaN or infinite, or if what is tied differs.
        """
        # A table that is used twice is one tensor, so it is in memory.
        self.waiting -= {*tied, *tied.values()}
        for name in sorted(self.weights.in_file_order(), key=tied.__contains__):
            path, _, leaf = name.rpartition(".")
            module = model.get_submodule(path)
            if name in tied:
                tensor = self._numbers(name)
                _check_tied(model, name, tied[name], tensor, self.weights.shards.folder)
            elif isinstance(module, Experts) and (name in self.waiting or self.quantize or name in self.packed):
                module.hold(leaf, self._bank(name, module.get_parameter(leaf)))
            elif leaf == "weight" and type(module) is nn.Linear and self._is_packed(name):
                _replace(model, path, PackedLinear(self._linear(name), module.bias, self.dtype))
            elif isinstance(module, nn.Embedding) and name in self.waiting and name not in self.packed:
                _replace(model, path, self._table(name, module))
            else:
                empty = module.get_parameter(leaf)
                setattr(module, leaf, nn.Parameter(self._numbers(name), requires_grad=empty.requires_grad))
        _link(model)

    def _numbers(self, name: str) -> Tensor:
        return self.weights.read(name, dtype=self.dtype, device=self.placed[name])

    def _is_packed(self, name: str) -> bool:
        return name in self.packed or name in self.waiting or self._rounded(name) is not None

    def _rounded(self, name: str) -> str | None:
        """How a matrix is quantized."""
        return self.quantize if QUANTIZABLE.search(name) else None

    def _linear(self, name: str) -> Source:
        (matrices,), device = self.weights.matrices(name), self.placed[name]
        if self.store is not None and name in self.waiting:
            return Stored(self.store, name, [Wanted((name, 0), matrices, True, self._rounded(name))], device)
        return Held([self._held(name, matrices)])

    def _bank(self, name: str, empty: nn.Parameter) -> ExpertBank:
        matrices, device = self.weights.matrices(name), self.placed[name]
        if self.store is not None and name in self.waiting:
            each = [Wanted((name, expert), own, False, self.quantize) for expert, own in enumerate(matrices)]
            source = Stored(self.store, name, each, device)
        else:
            source = Held([self._held(name, own) for own in matrices])
        experts, d_in, d_out = empty.shape
        return ExpertBank(source, (experts, d_in, d_out), self.dtype, device)

    def _table(self, name: str, module: nn.Embedding) -> StoredEmbedding:
        assert self.store is not None
        ((matrix,),) = self.weights.matrices(name)
        return StoredEmbedding(self.store, matrix.parts["weight"].name, module, self.dtype, self.placed[name])

    def _held(self, name: str, matrices: Sequence[Matrix]) -> PackedMatrix:
        tensors, device = [matrix.mapped(self.weights.shards) for matrix in matrices], self.placed[name]
        method = self._rounded(name)
        return quantized(matrices, tensors, method, device) if method else PackedMatrix(matrices, tensors).to(device)


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, own = path.rpartition(".")
    setattr(model.get_submodule(parent), own, module)


def _link(model: nn.Module) -> None:
    """Tells each source that waits on disk which one is used after it: modules stand in the order in which they run."""
    for source, after in pairwise(source for source in _sources(model) if isinstance(source, Stored)):
        source.then = after


def _sources(model: nn.Module) -> Iterator[Source]:
    for module in model.modules():
        if isinstance(module, PackedLinear):
            yield module.source
        elif isinstance(module, Experts):
            banks = (module.gate_up_proj, module.down_proj)
            yield from (bank.source for bank in banks if isinstance(bank, ExpertBank))


def held_nbytes(model: nn.Module) -> Counter[torch.device]:
    """Gives how many bytes of weights a model holds on each device; what waits on disk is not counted."""
    found: Counter[torch.device] = Counter()
    for parameter in model.parameters():
        found[parameter.device] += parameter.nbytes
    for source in _sources(model):
        if isinstance(source, Held):
            found[source.device] += sum(matrix.nbytes for matrix in source.matrices)
    return found


def _check_tied(model: nn.Module, name: str, other: str, tensor: Tensor, folder: Path) -> None:
    values = model.get_parameter(other)
    if not torch.equal(values.to(tensor.device), tensor):
        raise ValueError(
            f"{folder / 'config.json'} ties {name} to {other} (tie_word_embeddings), yet both are stored and differ."
        )
