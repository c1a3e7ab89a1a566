"""Reading a matrix of a model a second time: place by place from the bytes on disk."""

from collections.abc import Iterator
from math import prod

import numpy as np
from jaxtyping import Float

from llama4lab.checkpoint.gguf.blocks import GgmlBlocks
from llama4lab.checkpoint.meta.files import MetaFiles
from llama4lab.checkpoint.second.formulas import (
    Formula,
    affine_integers,
    nvfp4,
    packed_integers,
    plain,
    scaled,
    table_of_16,
)
from llama4lab.checkpoint.second.ggml_blocks import ggml_blocks
from llama4lab.checkpoint.second.meta_ranks import MetaRanks
from llama4lab.checkpoint.second.places import Stored, places
from llama4lab.checkpoint.second.raw_tensor import RawTensor
from llama4lab.checkpoint.tensor_files import TensorFiles

STRIP = 2**20  # numbers that are made together


class SecondMatrix:
    """A matrix [out, in] as the second decoder reads it; of other tensors, all but the last axis count as rows.

    Args:
        parts: Rows, columns and formula of each of the matrices that are joined along `out`.
    """

    def __init__(self, parts: list[tuple[int, int, Formula]]):
        self._parts = parts
        self.scheme = " and ".join(dict.fromkeys(formula.scheme for _, _, formula in parts))
        self.shape = sum(rows for rows, _, _ in parts), parts[0][1]

    def strips(self) -> Iterator[tuple[int, Float[np.ndarray, "row d_in"]]]:
        """Gives the numbers some rows at a time, each time with the number of the first."""
        first = 0
        for rows, columns, formula in self._parts:
            height = max(1, STRIP // max(columns, 1))
            for start in range(0, rows, height):
                row = np.arange(start, min(start + height, rows))[:, None]
                yield first + start, formula.at(row, np.arange(columns)[None])
            first += rows


class SecondDecoder:
    """Opens tensors of a checkpoint for a second look.

    Args:
        files: The checkpoint.
    """

    def __init__(self, files: TensorFiles):
        self.files = files
        self._ranks = MetaRanks(files.folder) if isinstance(files, MetaFiles) else None

    def matrix(self, name: str, shape: tuple[int, ...], expert: int | None = None) -> SecondMatrix:
        """Opens a tensor of the model, or the matrix of one expert.

        Args:
            name: Of the tensor in the model.
            shape: Its shape there; of a bank, [expert, in, out].
            expert: Which expert, if it is a bank.

        Raises:
            KeyError: if it is stored in no way that is known.
            ValueError: if it is stored in another shape.
        """
        if expert is None:
            rows, columns = prod(shape[:-1]), shape[-1]
        else:
            columns, rows = shape[1:]
        if self._ranks is not None:
            made = self._ranks.formulas(name, columns, expert)
        else:
            stored = places(self.files, name, expert)
            made = [self._opened(place, columns, rows // len(stored)) for place in stored]
        return SecondMatrix([(rows // len(made), columns, formula) for formula in made])

    def _opened(self, place: Stored, columns: int, rows: int) -> Formula:
        parts = {role: RawTensor.of(self.files, name).of_expert(place.expert) for role, name in place.roles.items()}
        packing = None if "weight" not in place.roles else self.files.spec(place.roles["weight"]).scheme
        if isinstance(packing, GgmlBlocks):
            return ggml_blocks(parts["weight"], columns, packing.kind.name)
        if place.turned:
            parts = {role: part.turned() for role, part in parts.items()}
        if any("quant_state" in role for role in parts):
            return table_of_16(parts, columns)
        if "weight_packed" in parts:
            return (nvfp4 if "weight_global_scale" in parts else packed_integers)(parts, columns)
        if "scales" in parts:
            return affine_integers(parts, columns)
        if "weight_scale_2" in parts:
            return nvfp4(parts, columns)
        if "weight_scale" in parts:
            return scaled(parts, columns)
        weight = parts["weight"]
        if weight.bits.size != rows * columns:
            found = f"{place.roles['weight']} has shape {list(weight.shape)}"
            raise ValueError(f"{found}; {rows} x {columns} were expected.")
        return plain({"weight": weight.rows_of(columns)}, columns)
