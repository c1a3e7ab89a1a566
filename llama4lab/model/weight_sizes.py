"""How many bytes each weight of a model takes: on disk, in memory, while it is used. No weight is read."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import prod

import torch
from torch import nn

from llama4lab.checkpoint.schemes.encoding import encoded
from llama4lab.checkpoint.summary import COMPONENTS
from llama4lab.checkpoint.weights import Weights
from llama4lab.model.experts import Experts
from llama4lab.model.filling import QUANTIZABLE

# At most so many bytes a number are alive while a packed matrix becomes numbers: float32 values, what they are made of,
# and their product with the scales.
MAKING = 16

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Weight:
    """A tensor of the model.

    Attributes:
        name: In the model.
        component: The part of the model, as in the summary of a checkpoint.
        parameters: How many numbers it has.
        stored: Bytes on disk.
        resident: Bytes in memory, if it is loaded whole.
        making: Bytes for the numbers of one of its matrices while they are used, if it is packed.
        experts: How many experts it holds matrices of; 0 if it is not routed.
        waits: Whether it can wait on disk: only matrices do, and tables whose rows are read.
        waiting: Bytes of its matrices as they are kept when they have been read.
        making_waiting: As `making`, for what was read; it keeps the dtype of the file.
        rounding: Bytes for rounding one of its matrices when it is read.
    """

    name: str
    component: str
    parameters: int
    stored: int
    resident: int
    making: int = 0
    experts: int = 0
    waits: bool = False
    waiting: int = 0
    making_waiting: int = 0
    rounding: int = 0

    @property
    def one_kept(self) -> int:
        """Bytes of one of its matrices as it is kept."""
        return self.waiting // max(self.experts, 1)

    @property
    def one_read(self) -> int:
        """Bytes that are read for one of its matrices."""
        return self.stored // max(self.experts, 1) if self.waiting else 0


@dataclass(frozen=True)
class Form:
    """Matrices as they are kept.

    Attributes:
        nbytes: Of all of them.
        making: Bytes for the numbers of one while they are used.
    """

    nbytes: int
    making: int


def weigh(model: nn.Module, weights: Weights | None, dtype: torch.dtype, quantize: str | None = None) -> list[Weight]:
    """Gives the sizes of all tensors of a model, a tied one once.

    Args:
        model: Without memory behind its parameters.
        weights: What is stored; None for plain numbers in `dtype`.
        dtype: To compute in.
        quantize: How the MLPs are quantized on the way.
    """
    packed = set(weights.packed) if weights is not None else set()
    sizes = []
    for name, parameter in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        module, shape = model.get_submodule(path), tuple(parameter.shape)
        size = _plain(name, shape, weights, dtype)
        if isinstance(module, Experts) or (leaf == "weight" and type(module) is nn.Linear):
            stored = _as_stored(weights, name, shape, dtype)
            rounded = quantize is not None and QUANTIZABLE.search(name) is not None
            kept = _quantized(weights, name, shape, quantize or "", dtype) if rounded else stored
            size = replace(size, waits=True, waiting=kept.nbytes, making_waiting=kept.making)
            if rounded or name in packed:
                size = replace(size, resident=kept.nbytes, making=kept.making)
            if rounded:
                size = replace(size, rounding=kept.making)
            if isinstance(module, Experts):
                size = replace(size, experts=shape[0])
        elif isinstance(module, nn.Embedding):
            size = replace(size, waits=name not in packed)
        sizes.append(size)
    return sizes


def component_of(name: str) -> str:
    """Gives the part of the model that a tensor belongs to."""
    return next(part for part, pattern in COMPONENTS.items() if re.search(pattern, name))


def _plain(name: str, shape: Shape, weights: Weights | None, dtype: torch.dtype) -> Weight:
    nbytes = prod(shape) * dtype.itemsize
    stored = nbytes if weights is None else sum(weights.shards.nbytes(own) for own in set(weights.on_disk(name)))
    return Weight(name, component_of(name), prod(shape), stored, nbytes)


def _as_stored(weights: Weights | None, name: str, shape: Shape, dtype: torch.dtype) -> Form:
    if weights is None:
        return Form(prod(shape) * dtype.itemsize, 0)
    matrices, files = weights.matrices(name), weights.shards
    making = 0
    for matrix in matrices[0]:
        stored = files.spec(matrix.parts["weight"].name).dtype if matrix.is_plain else None
        each = MAKING if stored is None else 0 if stored == dtype else dtype.itemsize
        making = max(making, each * prod(matrix.shape))
    nbytes = sum(matrix.nbytes(files) for own in matrices for matrix in own)
    return Form(nbytes, making + _joined([matrix.shape for matrix in matrices[0]], dtype))


def _quantized(weights: Weights | None, name: str, shape: Shape, method: str, dtype: torch.dtype) -> Form:
    whole, experts = ((shape[2], shape[1]), shape[0]) if len(shape) == 3 else ((shape[0], shape[1]), 1)
    own = [whole] if weights is None else [matrix.shape for matrix in weights.matrices(name)[0]]
    nbytes = sum(_encoded_nbytes(rows, columns, method) for rows, columns in own)
    return Form(experts * nbytes, MAKING * max(map(prod, own)) + _joined(own, dtype))


def _joined(own: Sequence[tuple[int, int]], dtype: torch.dtype) -> int:
    """Bytes for the numbers of matrices that are joined: those of each, and once more those of all."""
    return 2 * dtype.itemsize * sum(map(prod, own)) if len(own) > 1 else 0


@cache
def _encoded_nbytes(rows: int, columns: int, method: str) -> int:
    # On the meta device the encoder runs without a number, and its tensors have the sizes they always have.
    tensors, _ = encoded(torch.empty(rows, columns, device="meta"), method)
    return sum(tensor.nbytes for tensor in tensors.values())
