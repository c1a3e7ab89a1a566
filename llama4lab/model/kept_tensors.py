"""What stays packed, or waits on disk, is written as its checkpoint has it: the same names, the same bytes."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from llama4lab.checkpoint.matrices import Part
from llama4lab.checkpoint.quantization import is_for_activations
from llama4lab.checkpoint.tensor_files import TensorFiles
from llama4lab.checkpoint.weights import Weights
from llama4lab.checkpoint.written_shards import Entry
from llama4lab.model.packed_weights import (
    Packed,
    fetched,
    matrices_of,
    method_of,
    packed_of,
    parameter_in_memory,
    shape_of,
    waits_in,
    weights_of,
)
from llama4lab.model.plain_tensors import Entries, parameter_entries


def is_from(model: nn.Module, files: TensorFiles) -> bool:
    """Whether what is packed in a model, or waits on disk, is in these files in the same shape and dtype."""
    for weight in packed_of(model):
        if waits_in(weight) is not None:
            if waits_in(weight) is not files or method_of(weight) is not None:
                return False
            continue
        for number in range(len(matrices_of(weight))):
            own = fetched(weight, number)
            for matrix, tensors in zip(own.matrices, own.tensors, strict=True):
                if not all(_is_there(files, part, tensors[role]) for role, part in matrix.parts.items()):
                    return False
    return True


def kept_entries(model: nn.Module, files: TensorFiles) -> Entries:
    """Gives what to write for a model whose packed weights are those of these files.

    What the files have packed and the model as numbers (embeddings and routers of MLX) is written packed too, as long
    as it stands for the same numbers. Scales of activations, which the model does not use, are copied.
    """
    weights, tied = weights_of(model)
    stored = Weights(files, {name: shape_of(weight) for name, weight in weights.items()}, tied)
    packed_there = set(stored.packed)
    entries: Entries = {}
    for name, weight in weights.items():
        if isinstance(weight, Packed):
            entries |= _as_stored(weight, files)
            continue
        tensor = parameter_in_memory(model, name, weight)
        if name in packed_there and torch.equal(stored.read(name, dtype=tensor.dtype), tensor.cpu()):
            entries |= {on_disk: _copy(files, on_disk) for on_disk in stored.on_disk(name)}
        else:
            entries |= parameter_entries(name, tensor, stored.layout)
    return entries | {name: _copy(files, name) for name in files if is_for_activations(name)}


def _as_stored(weight: Packed, files: TensorFiles) -> Entries:
    """The tensors that hold a weight, under the names that they have on disk."""
    on_disk = waits_in(weight) is not None
    pieces: dict[str, list[Callable[[], Tensor]]] = {}
    for number, own in enumerate(matrices_of(weight)):
        for place, matrix in enumerate(own):
            for role, part in matrix.parts.items():
                found = pieces.setdefault(part.name, [])
                # One number may be the scale of all experts; it is written once.
                if not found or part.index is not None:
                    found.append(_read(files, part) if on_disk else _held(weight, number, place, role))
    return {name: Entry(files.spec(name).dtype, files.spec(name).shape, _each(found)) for name, found in pieces.items()}


def _is_there(files: TensorFiles, part: Part, tensor: Tensor) -> bool:
    if part.name not in files:
        return False
    spec = files.spec(part.name)
    shape = spec.shape if part.index is None else spec.shape[1:]
    return spec.dtype == tensor.dtype and shape == tuple(tensor.shape)


def _copy(files: TensorFiles, name: str) -> Entry:
    return Entry(files.spec(name).dtype, files.spec(name).shape, lambda: [files[name]])


def _read(files: TensorFiles, part: Part) -> Callable[[], Tensor]:
    return lambda: files[part.name] if part.index is None else files.read(part.name, part.index)


def _held(weight: Packed, number: int, place: int, role: str) -> Callable[[], Tensor]:
    return lambda: fetched(weight, number).tensors[place][role]


def _each(makers: Sequence[Callable[[], Tensor]]) -> Callable[[], Iterator[Tensor]]:
    return lambda: (make() for make in makers)
