"""The weights of a model one by one, whatever holds them: parameters, packed matrices, or files that they wait in."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.accelerate import load_offloaded_parameter

from llama4lab.checkpoint.layouts import Shape
from llama4lab.checkpoint.matrices import Matrix, Part
from llama4lab.checkpoint.schemes.encoding import encoded
from llama4lab.checkpoint.schemes.plain import Plain
from llama4lab.checkpoint.tensor_files import TensorFiles
from llama4lab.model.expert_bank import ExpertBank, Held
from llama4lab.model.expert_store import Stored
from llama4lab.model.packed_linear import PackedLinear
from llama4lab.model.packed_matrix import PackedMatrix
from llama4lab.model.stored_embedding import StoredEmbedding

# What is no parameter: the weight of such a module, or a bank of experts.
Packed = PackedLinear | StoredEmbedding | ExpertBank


def weights_of(model: nn.Module) -> tuple[dict[str, Tensor | Packed], dict[str, str]]:
    """Gives every weight of a model by its name, in the order of the modules.

    Returns:
        The weights (modules that hold theirs in another way stand for it), and the names of parameters that are another
        one once more, each with the name of that other.
    """
    found: dict[str, Tensor | Packed] = {}
    tied: dict[str, str] = {}
    first: dict[int, str] = {}
    for path, module in model.named_modules():
        start = f"{path}." if path else ""
        if isinstance(module, PackedLinear | StoredEmbedding):
            found[f"{start}weight"] = module
        for name, value in [*module.named_parameters(recurse=False), *vars(module).items()]:
            if isinstance(value, nn.Parameter) and (other := first.setdefault(id(value), start + name)) != start + name:
                tied[start + name] = other
            elif isinstance(value, nn.Parameter | ExpertBank):
                found[start + name] = value
    return found, tied


def packed_of(model: nn.Module) -> list[Packed]:
    """Gives the weights of a model that are packed, or wait on disk."""
    return [weight for weight in weights_of(model)[0].values() if isinstance(weight, Packed)]


def shape_of(weight: Tensor | Packed) -> Shape:
    """Gives the shape of the numbers of a weight."""
    if isinstance(weight, PackedLinear):
        return weight.out_features, weight.in_features
    if isinstance(weight, StoredEmbedding):
        return weight.num_embeddings, weight.embedding_dim
    return tuple(weight.shape)


def waits_in(weight: Packed) -> TensorFiles | None:
    """Gives the files that a weight is read from whenever it is used; None if it is in memory."""
    if isinstance(weight, StoredEmbedding):
        return weight.store.shards
    return weight.source.store.shards if isinstance(weight.source, Stored) else None


def method_of(weight: Packed) -> str | None:
    """Gives how a weight that waits on disk is rounded whenever it is read; None if it is not."""
    source = None if isinstance(weight, StoredEmbedding) else weight.source
    return source.quantize if isinstance(source, Stored) else None


def matrices_of(weight: Packed) -> list[list[Matrix]]:
    """Gives the stored matrices that a weight is made of: a list for each expert, or one in all."""
    if isinstance(weight, StoredEmbedding):
        return [[Matrix({"weight": Part(weight.name)}, Plain(), (weight.num_embeddings, weight.embedding_dim))]]
    if isinstance(weight.source, Held):
        return [own.matrices for own in weight.source.matrices]
    if isinstance(weight.source, Stored):
        return weight.source.matrices
    raise TypeError(f"{type(weight.source).__name__} does not tell how its matrices are stored.")


def fetched(weight: Packed, number: int) -> PackedMatrix:
    """Gives the matrix of an expert, or the only one; what waits on disk is read, and leaves the store as it is."""
    if isinstance(weight, StoredEmbedding):
        return PackedMatrix(matrices_of(weight)[0], [{"weight": weight.store.shards[weight.name]}])
    return weight.source.fresh(number) if isinstance(weight.source, Stored) else weight.source.matrix(number)


def described(weight: Packed, number: int) -> PackedMatrix:
    """Gives what `fetched` does; what waits on disk is not read, and has no memory behind it."""
    files, method = waits_in(weight), method_of(weight)
    if files is None:
        return fetched(weight, number)
    own = matrices_of(weight)[number]
    if method is None:
        return PackedMatrix(own, [{role: _empty(files, part) for role, part in m.parts.items()} for m in own])
    made = [encoded(torch.empty(matrix.shape, device="meta"), method) for matrix in own]
    matrices = [Matrix({}, scheme, matrix.shape) for matrix, (_, scheme) in zip(own, made, strict=True)]
    return PackedMatrix(matrices, [tensors for tensors, _ in made])


def parameter_in_memory(model: nn.Module, name: str, value: Tensor) -> Tensor:
    """Gives a parameter; one that accelerate took out of its module, from where it waits."""
    if not value.is_meta:
        return value
    assert isinstance(model, PreTrainedModel)
    return load_offloaded_parameter(model, name)


def _empty(files: TensorFiles, part: Part) -> Tensor:
    spec = files.spec(part.name)
    return torch.empty(spec.shape if part.index is None else spec.shape[1:], dtype=spec.dtype, device="meta")
