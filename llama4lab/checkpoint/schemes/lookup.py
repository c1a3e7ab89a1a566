"""bitsandbytes' 4 bits: each value is an entry of a table of 16, times the largest value of its block."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from llama4lab.checkpoint.schemes.scheme import Parts, Shape
from llama4lab.checkpoint.strict_json import parse_json

KINDS = ("nf4", "fp4")
DTYPES = ("bfloat16", "float16", "float32")
BLOCKS = (16, 8192)  # bitsandbytes has powers of two from 32 to 4096
LARGEST_STATE = 65_536  # bytes


@dataclass(frozen=True)
class Lookup:
    """`weight`, `absmax` and `quant_map`; `absmax` itself may be stored in 8 bits, with a table and blocks of its own.

    Attributes:
        kind: "nf4" or "fp4".
        block: How many values share a largest one; they run along the rows.
        nested: How many of those share one of theirs; 0 where they are stored as they are.
        offset: What the nested ones were lessened by.
    """

    kind: str
    block: int
    nested: int
    offset: float

    @classmethod
    def of(cls, state: UInt8[Tensor, " byte"]) -> "tuple[Lookup, Shape]":
        """Reads it, and the shape of the matrix, from the JSON that bitsandbytes stores beside the values.

        Raises:
            ValueError: if that is not what bitsandbytes writes.
        """
        known = parse_json(bytes(state.tolist()), source="its quant_state")
        kind, block, shape = known.get("quant_type"), known.get("blocksize", 0), known.get("shape", [])
        nested, offset = known.get("nested_blocksize", 0), known.get("nested_offset", 0)
        whole = isinstance(shape, list) and all(type(side) is int and side > 0 for side in shape)
        if kind not in KINDS or not _is_block(block) or not whole or known.get("dtype") not in DTYPES:
            raise ValueError(
                f"its quant_state says {kind!r:.40} in blocks of {block!r:.40} for a matrix {shape!r:.80} in "
                f"{known.get('dtype')!r:.40}"
            )
        finite = type(offset) in (int, float) and math.isfinite(offset)
        if not (nested == 0 or _is_block(nested)) or not finite or known.get("nested_dtype", "float32") not in DTYPES:
            raise ValueError(f"its quant_state says blocks of {nested!r:.40} in blocks, less {offset!r:.40}")
        return cls(str(kind), block, nested, float(offset)), tuple(shape)

    @property
    def name(self) -> str:
        """For example "nf4, blocks of 64"."""
        return f"{self.kind}, blocks of {self.block}"

    def dense(self, parts: Parts, shape: Shape) -> Float[Tensor, "d_out d_in"]:
        """Gives table entry * largest value of the block."""
        pairs = parts["weight"].flatten()
        values = parts["quant_map"].float()[torch.stack([pairs >> 4, pairs & 15], dim=-1).flatten().int()]
        largest = parts["absmax"]
        if self.nested:
            own = parts["nested_absmax"].float().repeat_interleave(self.nested)[: len(largest)]
            largest = parts["nested_quant_map"].float()[largest.int()] * own + self.offset
        wide = largest.float().repeat_interleave(self.block)[: len(values)]
        return (values * wide)[: shape[0] * shape[1]].reshape(shape)


def _is_block(size: Any) -> bool:
    return type(size) is int and BLOCKS[0] <= size <= BLOCKS[1] and size & (size - 1) == 0
