"""bitsandbytes' 4 bits: each value is an entry of a table of 16, times the largest value of its block."""

import json
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from llama4lab.checkpoint.schemes.scheme import Parts, Shape


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
        try:
            known = json.loads(bytes(state.tolist()))
            nested, offset = int(known.get("nested_blocksize", 0)), float(known.get("nested_offset", 0))
            scheme = cls(str(known["quant_type"]), int(known["blocksize"]), nested, offset)
            shape = tuple(map(int, known["shape"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"its quant_state is not what bitsandbytes writes ({error!r})") from error
        if scheme.kind not in ("nf4", "fp4") or scheme.block < 1 or scheme.nested < 0:
            raise ValueError(f"its quant_state says {scheme.kind} in blocks of {scheme.block}")
        return scheme, shape

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
