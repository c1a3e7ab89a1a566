"""Filling an empty model with the weights of a checkpoint: as numbers, packed, or as experts that wait on disk."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from llama4lab.checkpoint.matrices import Matrix, Part
from llama4lab.checkpoint.schemes.encoding import encoded
from llama4lab.checkpoint.weights import Weights
from llama4lab.model.expert_bank import ExpertBank, Held
from llama4lab.model.expert_store import ExpertStore, Stored
from llama4lab.model.experts import Experts
from llama4lab.model.packed_linear import PackedLinear
from llama4lab.model.packed_matrix import PackedMatrix

# What may be quantized on the way: the MLPs. Routers, attention, embeddings, head and vision stay as they are.
QUANTIZABLE = re.compile(r"layers\.\d+\.feed_forward\.(shared_expert\.)?(gate|up|down)_proj\.weight$")


class Filling:
    """Puts every stored tensor into its place, in the order of the files.

    Args:
        weights: What is stored.
        dtype: To compute in.
        placed: The device of each parameter.
        store: Where the experts wait; None if they are in memory.
        quantize: How to quantize the MLPs; None to take them as they are.
    """

    def __init__(
        self,
        weights: Weights,
        dtype: torch.dtype,
        placed: Mapping[str, torch.device],
        store: ExpertStore | None = None,
        quantize: str | None = None,
    ):
        self.weights, self.dtype, self.placed, self.store, self.quantize = weights, dtype, placed, store, quantize
        self.packed = set(weights.packed)

    def fill(self, model: nn.Module, tied: Mapping[str, str]) -> None:
        """Fills a model; tensors that are another one once more come last, when that is there.

        Raises:
            ValueError: if a number is NaN or infinite, or if what is tied differs.
        """
        for name in sorted(self.weights.in_file_order(), key=tied.__contains__):
            path, _, leaf = name.rpartition(".")
            module = model.get_submodule(path)
            if name in tied:
                tensor = self._numbers(name)
                _check_tied(model, name, tied[name], tensor, self.weights.shards.folder)
            elif isinstance(module, Experts) and (self.store or self.quantize or name in self.packed):
                module.hold(leaf, self._bank(name, module.get_parameter(leaf)))
            elif leaf == "weight" and type(module) is nn.Linear and self._stays_packed(name):
                self._replace(model, path, module, name)
            else:
                empty = module.get_parameter(leaf)
                setattr(module, leaf, nn.Parameter(self._numbers(name), requires_grad=empty.requires_grad))

    def _numbers(self, name: str) -> Tensor:
        return self.weights.read(name, dtype=self.dtype, device=self.placed[name])

    def _stays_packed(self, name: str) -> bool:
        return name in self.packed or (self.quantize is not None and QUANTIZABLE.search(name) is not None)

    def _replace(self, model: nn.Module, path: str, module: nn.Linear, name: str) -> None:
        (matrices,) = self.weights.matrices(name)
        linear = PackedLinear(self._held(matrices, self.placed[name]), module.bias, self.dtype)
        parent, _, own = path.rpartition(".")
        setattr(model.get_submodule(parent), own, linear)

    def _bank(self, name: str, empty: nn.Parameter) -> ExpertBank:
        matrices, device = self.weights.matrices(name), self.placed[name]
        if self.store is not None:
            source = Stored(self.store, name, matrices, device)
        else:
            source = Held([self._held(own, device) for own in matrices])
        experts, d_in, d_out = empty.shape
        return ExpertBank(source, (experts, d_in, d_out), self.dtype, device)

    def _held(self, matrices: Sequence[Matrix], device: torch.device) -> PackedMatrix:
        tensors = [matrix.mapped(self.weights.shards) for matrix in matrices]
        if self.quantize is None:
            return PackedMatrix(matrices, tensors).to(device)
        made = [
            _encoded(matrix, matrix.dense(each, torch.float32).to(device), self.quantize)
            for matrix, each in zip(matrices, tensors, strict=True)
        ]
        return PackedMatrix([matrix for matrix, _ in made], [each for _, each in made])


def _encoded(matrix: Matrix, values: Tensor, method: str) -> tuple[Matrix, dict[str, Tensor]]:
    tensors, scheme = encoded(values, method)
    base = matrix.parts["weight"].name.removesuffix(".weight")
    return Matrix({role: Part(f"{base}.{role}") for role in tensors}, scheme, matrix.shape), tensors


def _check_tied(model: nn.Module, name: str, other: str, tensor: Tensor, folder: Path) -> None:
    values = model.get_parameter(other)
    if not torch.equal(values.to(tensor.device), tensor):
        raise ValueError(
            f"{folder / 'config.json'} ties {name} to {other} (tie_word_embeddings), yet both are stored and differ."
        )
