"""Recognising how a matrix is stored, from the names, dtypes and shapes of its tensors."""

import math
from dataclasses import replace

import torch

from llama4lab.checkpoint.declared import Declared
from llama4lab.checkpoint.gguf.blocks import GgmlBlocks
from llama4lab.checkpoint.matrices import Matrix
from llama4lab.checkpoint.parts import PLAIN_DTYPES, WHOLE, Slice, Wanted, assembled, columns_of, must_divide, without
from llama4lab.checkpoint.schemes.fp4 import GROUP, Nvfp4
from llama4lab.checkpoint.schemes.integers import AffineIntegers, PackedIntegers
from llama4lab.checkpoint.schemes.lookup import LARGEST_STATE, Lookup
from llama4lab.checkpoint.schemes.plain import Plain
from llama4lab.checkpoint.schemes.scaled import Scaled
from llama4lab.checkpoint.schemes.scheme import Scheme, Shape
from llama4lab.checkpoint.tensor_files import TensorFiles

EIGHT_BITS = (torch.float8_e4m3fn, torch.int8)
STATE = "weight.quant_state.bitsandbytes__"
# Blocks of scales that are in use; where the sides of a matrix are no multiples, the last block is cut short.
BLOCK = (128, 128)
# A scale that divides must not be 0, nor so small that what it divides overflows.
DIVIDES, MULTIPLIES, SCALES_BY = (1e-30, 1e30), (0.0, 1e30), (-1e30, 1e30)

SUFFIXES = (
    "weight", "weight_packed", "weight_scale", "weight_scale_2", "weight_global_scale", "weight_zero_point",
    "weight_shape", "weight_g_idx", "scales", "biases", f"{STATE}nf4", f"{STATE}fp4", "weight.absmax",
    "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map",
)  # fmt: skip
SCALES = {"weight_scale", "weight_scale_2", "scales", "biases", "weight_scale_inv"}
OF_WORDS = {"weight_global_scale", "weight_zero_point", "weight_shape", "weight_g_idx"}


class Recognition:
    """Finds the stored form of matrices.

    Args:
        shards: The files.
    """

    def __init__(self, shards: TensorFiles):
        self.shards = shards
        self.declared = Declared.by(shards.folder)

    def linear(
        self, base: str, shape: tuple[int, int], index: int | None = None, count: int | None = None
    ) -> Matrix | None:
        """Gives the matrix `base`, or one of the matrices stacked under it; None if it is not there in any known form.

        Args:
            base: Its name on disk, without `.weight`.
            shape: Out and in.
            index: Which of the matrices, if they are stacked.
            count: How many there are, if they are stacked.

        Raises:
            ValueError: if it is there, and a part of it is missing, or has another shape or dtype than its form asks
                for, or if config.json says something else of it.
        """
        has = {suffix: f"{base}.{suffix}" for suffix in SUFFIXES if f"{base}.{suffix}" in self.shards}
        which = Slice(index, count)
        kinds = [suffix for suffix in has if suffix.startswith(STATE)]
        if kinds:
            return self._lookup(base, has[kinds[0]], shape, which)
        if "weight_packed" in has:
            of_floats = self.shards.spec(has["weight_packed"]).dtype == torch.uint8 or "weight_global_scale" in has
            return (self._fp4 if of_floats else self._integers)(base, shape, which)
        if "weight" not in has:
            if has.keys() - {"scales", "weight"}:  # GPTQ and AWQ have scales beside tensors of other names
                missing = "weight_packed" if has.keys() & OF_WORDS else "weight"
                raise without(self.shards, next(iter(has.values())), f"{base}.{missing}")
            return None
        spec = self.shards.spec(has["weight"])
        if spec.scheme is not None:
            stored = spec.shape if index is None else spec.shape[1:]
            if isinstance(spec.scheme, GgmlBlocks):
                stored = spec.scheme.stored_shape(shape)
            parts = {"weight": Wanted(has["weight"], stored, (spec.dtype,))}
            if "weight_scale" in has:
                own = self._own_shape(has["weight_scale"], index)
                parts["weight_scale"] = Wanted(has["weight_scale"], own, within=MULTIPLIES)
            return self._made(parts, spec.scheme, shape, which)
        if spec.dtype in PLAIN_DTYPES and len(has.keys() & SCALES) == 0:
            return self._made({"weight": Wanted(has["weight"], shape)}, Plain(), shape, which)
        if spec.dtype == torch.uint8 and has.keys() & {"weight_scale", "weight_scale_2"}:
            return self._fp4(base, shape, which, divides=False)
        if spec.dtype in (torch.uint32, torch.int32) and has.keys() & {"scales", "biases"}:
            return self._affine(base, shape, which)
        if spec.dtype in EIGHT_BITS and not has.keys() & (SCALES - {"weight_scale"}):
            return self._scaled(base, shape, which)
        return None

    def fused(self, name: str, shape: Shape, index: int) -> Matrix | None:
        """Gives the matrix of one expert out of a tensor [expert, in, out]; None if it is in no known form.

        Raises:
            ValueError: as for `linear`.
        """
        if name not in self.shards:
            return None
        count, d_in, d_out = shape
        dtype, own, which = self.shards.spec(name).dtype, (d_out, d_in), Slice(index, count)
        ends = [name + end for end in ("_weight_scale", "_scale") if name + end in self.shards]
        scale, second = next(iter(ends), f"{name}_weight_scale"), f"{name}_weight_scale_2"
        if dtype in PLAIN_DTYPES and not ends:
            made = self._made({"weight": Wanted(name, (d_in, d_out))}, Plain(), own, which)
        elif dtype == torch.uint8 and (ends or second in self.shards):
            must_divide(self.shards, name, d_in, GROUP)
            parts = {
                "weight_packed": Wanted(name, (d_in // 2, d_out), (torch.uint8,)),
                "weight_scale": Wanted(scale, (d_in // GROUP, d_out), (torch.float8_e4m3fn,)),
                "global_scale": Wanted(second, (), within=MULTIPLIES),
            }
            made = self._made(parts, Nvfp4(divides=False), own, which)
        elif dtype in EIGHT_BITS:
            # A row of the matrix is a column of the tensor; the scales of one projection are stored as a column.
            each = self._own_shape(scale, index)
            by_row = each in ((d_out,), (1, d_out), (d_out, 1))
            grains = self.declared.grains()[0]
            if grains and "tensor" not in grains and not by_row:
                each, by_row = (1, d_out), True
            parts = {
                "weight": Wanted(name, (d_in, d_out), (dtype,)),
                "weight_scale": Wanted(scale, each * by_row, within=SCALES_BY),
            }
            made = self._made(parts, Scaled(dtype, "row" if by_row else "tensor"), own, which)
            self.declared.refuse_eight_bits(self.shards.file(name), name, dtype)
        else:
            return None
        return replace(made, turned=True)

    def _lookup(self, base: str, state: str, shape: tuple[int, int], which: Slice) -> Matrix:
        file, spec = self.shards.file(state), self.shards.spec(state)
        if spec.dtype != torch.uint8 or len(spec.shape) != 1 or spec.nbytes > LARGEST_STATE:
            raise ValueError(
                f"{file}: {state} is stored as {spec.dtype} {list(spec.shape)}; it is JSON in uint8 of at most "
                f"{LARGEST_STATE:,} bytes."
            )
        try:
            scheme, stored = Lookup.of(self.shards[state])
            if scheme.kind != state.removeprefix(f"{base}.{STATE}"):
                raise ValueError(f"its quant_state says {scheme.kind}, its name another kind")
        except ValueError as error:
            raise ValueError(
                f"{file}: {base}.weight cannot be read: {str(error).rstrip('.')}.\nIts state is {state}."
            ) from error
        if stored != shape:
            raise ValueError(
                f"{file}: {base}.weight holds a matrix {list(stored)}; by config.json it is {list(shape)}.\n"
                f"Its state is {state}."
            )
        values = shape[0] * shape[1]
        blocks = math.ceil(values / scheme.block)
        parts = {
            "weight": Wanted(f"{base}.weight", (math.ceil(values / 2), 1), (torch.uint8,)),
            "absmax": Wanted(f"{base}.weight.absmax", (blocks,), within=SCALES_BY),
            "quant_map": Wanted(f"{base}.weight.quant_map", (16,), within=SCALES_BY),
            "quant_state": Wanted(state, spec.shape, (torch.uint8,)),
        }
        if scheme.nested:
            own = (math.ceil(blocks / scheme.nested),)
            parts["absmax"] = Wanted(f"{base}.weight.absmax", (blocks,), (torch.uint8,))
            parts["nested_absmax"] = Wanted(f"{base}.weight.nested_absmax", own, within=SCALES_BY)
            parts["nested_quant_map"] = Wanted(f"{base}.weight.nested_quant_map", (256,), within=SCALES_BY)
        return self._made(parts, scheme, shape, which)

    def _integers(self, base: str, shape: tuple[int, int], which: Slice) -> Matrix:
        packed, scale, zero = f"{base}.weight_packed", f"{base}.weight_scale", f"{base}.weight_zero_point"
        bits = 8 if self._last(packed, which) == math.ceil(shape[1] / 4) else 4
        groups = self._last(scale, which) if scale in self.shards else 1
        size = columns_of(self.shards, scale, groups, shape[1])
        parts = {
            "weight_packed": Wanted(packed, (shape[0], math.ceil(shape[1] * bits / 32)), (torch.int32,)),
            "weight_scale": Wanted(scale, (shape[0], groups), within=SCALES_BY),
        }
        said, order = f"{base}.weight_shape", f"{base}.weight_g_idx"
        if said in self.shards:
            parts["weight_shape"] = Wanted(said, (2,), WHOLE)
        if zero in self.shards:
            parts["weight_zero_point"] = Wanted(zero, (math.ceil(shape[0] * bits / 32), groups), (torch.int32,))
        if order in self.shards:
            parts["weight_g_idx"] = Wanted(order, (shape[1],), WHOLE, within=(0, groups - 1))
        if scale in self.shards:
            self.declared.refuse_integers(self.shards.file(scale), f"{packed} with {scale}", bits, size, shape[1])
        made = self._made(parts, PackedIntegers(bits, size), shape, which)
        if zero not in self.shards:
            self.declared.refuse_symmetric(self.shards.file(packed), packed, bits)
        if said in self.shards and tuple(self.shards[said].tolist()) != shape:
            found = self.shards[said].tolist()
            raise ValueError(f"{self.shards.file(said)}: {said} says {found}; by config.json it is {list(shape)}.")
        return made

    def _affine(self, base: str, shape: tuple[int, int], which: Slice) -> Matrix:
        weight, scales = f"{base}.weight", f"{base}.scales"
        words = self._last(weight, which)
        bits = next((bits for bits in (2, 4, 8) if words == shape[1] * bits / 32), None)
        if bits is None:
            raise ValueError(
                f"{self.shards.file(weight)}: {weight} has rows of {words} words for {shape[1]} columns, which is not "
                "2, 4 or 8 bits a value."
            )
        groups = self._last(scales, which) if scales in self.shards else 1
        size = columns_of(self.shards, scales, groups, shape[1])
        parts = {"weight": Wanted(weight, (shape[0], words), (torch.uint32, torch.int32))}
        parts |= {role: Wanted(f"{base}.{role}", (shape[0], groups), within=SCALES_BY) for role in ("scales", "biases")}
        if scales in self.shards:
            self.declared.refuse_integers(self.shards.file(scales), f"{weight} with {scales}", bits, size, shape[1])
        return self._made(parts, AffineIntegers(bits, size), shape, which)

    def _fp4(self, base: str, shape: tuple[int, int], which: Slice, divides: bool = True) -> Matrix:
        weight, whole = ("weight_packed", "weight_global_scale") if divides else ("weight", "weight_scale_2")
        must_divide(self.shards, f"{base}.{weight}", shape[1], GROUP)
        own = self._own_shape(f"{base}.{whole}", which.index)
        parts = {
            "weight_packed": Wanted(f"{base}.{weight}", (shape[0], shape[1] // 2), (torch.uint8,)),
            "weight_scale": Wanted(f"{base}.weight_scale", (shape[0], shape[1] // GROUP), (torch.float8_e4m3fn,)),
            "global_scale": Wanted(
                f"{base}.{whole}", own if own == (1,) else (), within=DIVIDES if divides else MULTIPLIES
            ),
        }
        return self._made(parts, Nvfp4(divides), shape, which)

    def _scaled(self, base: str, shape: tuple[int, int], which: Slice) -> Matrix:
        weight, scale = f"{base}.weight", f"{base}.weight_scale"
        dtype, own = self.shards.spec(weight).dtype, self._own_shape(scale, which.index)
        grains, blocks = self.declared.grains()
        fitting = [
            (Scaled(dtype, "tensor"), own if own in ((1,), (1, 1)) else ()),
            (Scaled(dtype, "row"), own if own == (shape[0],) else (shape[0], 1)),
            *(
                (Scaled(dtype, "block", block), (math.ceil(shape[0] / block[0]), math.ceil(shape[1] / block[1])))
                for block in sorted(blocks or {BLOCK})
            ),
        ]
        allowed = [(scheme, each) for scheme, each in fitting if not grains or scheme.grain in grains] or fitting
        # Where none fits, the last is the one to compare with.
        scheme, each = next((pair for pair in allowed if pair[1] == own), allowed[-1])
        parts = {"weight": Wanted(weight, shape, (dtype,)), "weight_scale": Wanted(scale, each, within=SCALES_BY)}
        made = self._made(parts, scheme, shape, which)
        self.declared.refuse_eight_bits(self.shards.file(weight), weight, dtype)
        return made

    def _own_shape(self, name: str, index: int | None) -> Shape:
        shape = self.shards.spec(name).shape if name in self.shards else ()
        return shape if index is None else shape[1:]

    def _last(self, name: str, which: Slice) -> int:
        return (0, *self._own_shape(name, which.index))[-1]

    def _made(self, parts: dict[str, Wanted], scheme: Scheme, shape: tuple[int, int], which: Slice) -> Matrix:
        return assembled(self.shards, parts, scheme, shape, which)
