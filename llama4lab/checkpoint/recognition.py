"""Recognising how a matrix is stored, from the names, dtypes and shapes of its tensors."""

import math

import torch

from llama4lab.checkpoint.matrices import Matrix, Part
from llama4lab.checkpoint.schemes.fp4 import GROUP, Nvfp4
from llama4lab.checkpoint.schemes.integers import AffineIntegers, PackedIntegers
from llama4lab.checkpoint.schemes.lookup import Lookup
from llama4lab.checkpoint.schemes.plain import Plain
from llama4lab.checkpoint.schemes.scaled import Scaled
from llama4lab.checkpoint.schemes.scheme import Scheme, Shape
from llama4lab.checkpoint.tensor_files import TensorFiles

PLAIN_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
STATE = "weight.quant_state.bitsandbytes__"
# Blocks of scales that are in use; where the sides of a matrix are no multiples, the last block is cut short.
BLOCK = 128


class Recognition:
    """Finds the stored form of matrices.

    Args:
        shards: The files.
    """

    def __init__(self, shards: TensorFiles):
        self.shards = shards

    def linear(self, base: str, shape: tuple[int, int], index: int | None = None) -> Matrix | None:
        """Gives the matrix `base`, or one of the matrices stacked under it; None if it is not there in any known form.

        Args:
            base: Its name on disk, without `.weight`.
            shape: Out and in.
            index: Which of the matrices, if they are stacked.

        Raises:
            ValueError: if it is there, and a tensor of it has another shape than its form asks for.
        """
        has = {suffix: f"{base}.{suffix}" for suffix in SUFFIXES if f"{base}.{suffix}" in self.shards}
        kinds = [suffix for suffix in has if suffix.startswith(STATE)]
        if kinds:
            return self._lookup(has, kinds[0], shape, index)
        if "weight_packed" in has:
            dtype = self.shards.spec(has["weight_packed"]).dtype
            return self._integers(has, shape, index) if dtype == torch.int32 else self._fp4(has, shape, index)
        if "weight" not in has:
            return None
        dtype, own = self.shards.spec(has["weight"]).dtype, self.shards.spec(has["weight"]).scheme
        if own is not None:
            stored = self._own_shape(has["weight"], index)
            return self._made({"weight": (has["weight"], stored)}, own, shape, index)
        if dtype in PLAIN_DTYPES and len(has.keys() & SCALES) == 0:
            return self._made({"weight": (has["weight"], shape)}, Plain(), shape, index)
        if dtype == torch.uint8 and "weight_scale_2" in has:
            renamed = has | {"weight_packed": has["weight"], "weight_global_scale": has["weight_scale_2"]}
            return self._fp4(renamed, shape, index, divides=False)
        if dtype in (torch.uint32, torch.int32) and {"scales", "biases"} <= has.keys():
            return self._affine(has, shape, index)
        if dtype in EIGHT_BITS and "weight_scale" in has:
            return self._scaled(has["weight"], has["weight_scale"], shape, index)
        return None

    def fused(self, name: str, shape: Shape, index: int) -> Matrix | None:
        """Gives the matrix of one expert out of a tensor [expert, in, out]; None if it is in no known form.

        Raises:
            ValueError: as for `linear`.
        """
        if name not in self.shards:
            return None
        d_in, d_out = shape[1:]
        dtype, own = self.shards.spec(name).dtype, (d_out, d_in)
        scale = next((name + end for end in ("_weight_scale", "_scale") if name + end in self.shards), None)
        if dtype in PLAIN_DTYPES and scale is None:
            return self._made({"weight": (name, (d_in, d_out))}, Plain(), own, index, turned=True)
        if dtype == torch.uint8 and scale and f"{name}_weight_scale_2" in self.shards:
            parts = {
                "weight_packed": (name, (d_in // 2, d_out)),
                "weight_scale": (scale, (d_in // GROUP, d_out)),
                "global_scale": (f"{name}_weight_scale_2", ()),
            }
            return self._made(parts, Nvfp4(divides=False), own, index, turned=True)
        if dtype in EIGHT_BITS and scale:
            grain = "row" if math.prod(self.shards.spec(scale).shape) == shape[0] * d_out else "tensor"
            # A row of the matrix is a column of the tensor; the scales of one projection are stored as a column.
            each = self.shards.spec(scale).shape[1:] if grain == "row" else ()
            parts = {"weight": (name, (d_in, d_out)), "weight_scale": (scale, each)}
            return self._made(parts, Scaled(dtype, grain), own, index, turned=True)
        return None

    def _lookup(self, has: dict[str, str], state: str, shape: tuple[int, int], index: int | None) -> Matrix:
        file = self.shards.file(has[state])
        try:
            scheme, stored = Lookup.of(self.shards[has[state]])
        except ValueError as error:
            raise ValueError(f"{file}: {has['weight']} cannot be read: {error}.") from error
        if stored != shape:
            raise ValueError(f"{file}: {has['weight']} holds a matrix {list(stored)}; by config.json it is {shape}.")
        values = shape[0] * shape[1]
        blocks = math.ceil(values / scheme.block)
        wanted = {"weight": (math.ceil(values / 2), 1), "absmax": (blocks,), "quant_map": (16,)}
        if scheme.nested:
            wanted |= {"nested_absmax": (math.ceil(blocks / scheme.nested),), "nested_quant_map": (256,)}
        names = {role: has.get(role if role == "weight" else f"weight.{role}", f"weight.{role}") for role in wanted}
        parts: dict[str, tuple[str, Shape]] = {role: (names[role], wanted[role]) for role in wanted}
        parts["quant_state"] = has[state], self.shards.spec(has[state]).shape
        return self._made(parts, scheme, shape, index)

    def _integers(self, has: dict[str, str], shape: tuple[int, int], index: int | None) -> Matrix:
        words = self._own_shape(has["weight_packed"], index)[-1]
        bits = 8 if words == math.ceil(shape[1] / 4) else 4
        groups = self._own_shape(has["weight_scale"], index)[-1] if "weight_scale" in has else 1
        if shape[1] % max(groups, 1):
            raise ValueError(
                f"{self.shards.file(has['weight_scale'])}: {has['weight_scale']} has {groups} groups for {shape[1]} "
                "columns, which do not divide."
            )
        parts: dict[str, tuple[str, Shape]] = {
            "weight_packed": (has["weight_packed"], (shape[0], math.ceil(shape[1] * bits / 32))),
            "weight_scale": (has.get("weight_scale", "weight_scale"), (shape[0], groups)),
        }
        if "weight_shape" in has and (said := tuple(self.shards[has["weight_shape"]].tolist())) != shape:
            file = self.shards.file(has["weight_shape"])
            raise ValueError(f"{file}: {has['weight_shape']} says {list(said)}; by config.json it is {list(shape)}.")
        if "weight_shape" in has:
            parts["weight_shape"] = has["weight_shape"], (2,)
        if "weight_zero_point" in has:
            parts["weight_zero_point"] = has["weight_zero_point"], (math.ceil(shape[0] * bits / 32), groups)
        if "weight_g_idx" in has:
            parts["weight_g_idx"] = has["weight_g_idx"], (shape[1],)
        return self._made(parts, PackedIntegers(bits, shape[1] // groups), shape, index)

    def _affine(self, has: dict[str, str], shape: tuple[int, int], index: int | None) -> Matrix | None:
        bits = 32 * self._own_shape(has["weight"], index)[-1] / shape[1]
        groups = self._own_shape(has["scales"], index)[-1]
        if bits not in (2, 4, 8) or shape[1] % groups:
            return None
        scales = (shape[0], groups)
        parts = {"weight": (has["weight"], (shape[0], round(shape[1] * bits / 32)))}
        parts |= {"scales": (has["scales"], scales), "biases": (has["biases"], scales)}
        return self._made(parts, AffineIntegers(round(bits), shape[1] // groups), shape, index)

    def _fp4(self, has: dict[str, str], shape: tuple[int, int], index: int | None, divides: bool = True) -> Matrix:
        whole = has.get("weight_global_scale", "weight_global_scale")
        own: Shape = self._own_shape(whole, index) if whole in self.shards else ()
        parts = {
            "weight_packed": (has["weight_packed"], (shape[0], shape[1] // 2)),
            "weight_scale": (has.get("weight_scale", "weight_scale"), (shape[0], shape[1] // GROUP)),
            "global_scale": (whole, own if own == (1,) else ()),
        }
        return self._made(parts, Nvfp4(divides), shape, index)

    def _scaled(self, weight: str, scale: str, shape: tuple[int, int], index: int | None) -> Matrix:
        dtype, own = self.shards.spec(weight).dtype, self._own_shape(scale, index)
        if math.prod(own) == 1:
            scheme = Scaled(dtype, "tensor")
        elif own in ((shape[0],), (shape[0], 1)):
            scheme = Scaled(dtype, "row")
        else:
            # Blocks are those in use, or else such as divide the matrix evenly; any other shape is refused below.
            sides = [
                BLOCK if math.ceil(side / BLOCK) == count else side // max(count, 1)
                for side, count in zip(shape, own, strict=False)
            ]
            rows, columns = [*sides, 1, 1][:2]
            scheme = Scaled(dtype, "block", (max(rows, 1), max(columns, 1)))
            own = (math.ceil(shape[0] / scheme.block[0]), math.ceil(shape[1] / scheme.block[1]))
        return self._made({"weight": (weight, shape), "weight_scale": (scale, own)}, scheme, shape, index)

    def _own_shape(self, name: str, index: int | None) -> Shape:
        shape = self.shards.spec(name).shape
        return shape if index is None else shape[1:]

    def _made(
        self,
        parts: dict[str, tuple[str, Shape]],
        scheme: Scheme,
        shape: tuple[int, int],
        index: int | None,
        turned: bool = False,
    ) -> Matrix:
        """Checks that every part is there in its shape. A number for the whole tensor has no axis of experts."""
        found: dict[str, Part] = {}
        for role, (name, wanted) in parts.items():
            if name not in self.shards:
                beside = next(name for name, _ in parts.values() if name in self.shards)
                raise ValueError(
                    f"{self.shards.file(beside)}: {beside} is stored without its {name}; it cannot be read."
                )
            stored = self.shards.spec(name).shape
            single = len(stored) == len(wanted)
            if (stored if single else stored[1:]) != wanted or (not single and index is None):
                raise ValueError(
                    f"{self.shards.file(name)}: {name} has shape {list(stored)}; for a matrix {list(shape)} in "
                    f"{scheme.name} it is {list(wanted)}" + (" for each expert." if index is not None else ".")
                )
            found[role] = Part(name, None if single else index)
        return Matrix(found, scheme, shape, turned)


SCALES = {"weight_scale", "weight_scale_2", "scales", "biases", "weight_scale_inv"}
SUFFIXES = (
    *("weight", "weight_packed", "weight_scale", "weight_scale_2", "weight_global_scale", "weight_zero_point"),
    *(
        "weight_shape",
        "weight_g_idx",
        "scales",
        "biases",
        f"{STATE}nf4",
        f"{STATE}fp4",
        "weight.absmax",
        "weight.quant_map",
    ),
    *("weight.nested_absmax", "weight.nested_quant_map"),
)
