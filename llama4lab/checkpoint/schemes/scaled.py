"""8-bit floats or integers times a scale: for the whole tensor, for each row, or for each block."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from llama4lab.checkpoint.schemes.scheme import Parts, Shape

Grain = Literal["tensor", "row", "block"]


@dataclass(frozen=True)
class Scaled:
    """`weight` in 8 bits and its `weight_scale`.

    Attributes:
        dtype: In which the values are stored.
        grain: What has a scale of its own.
        block: Rows and columns of a block.
    """

    dtype: torch.dtype
    grain: Grain
    block: tuple[int, int] = (1, 1)

    @property
    def name(self) -> str:
        """For example "float8_e4m3fn, a scale for each row"."""
        each = f"block of {self.block[0]} x {self.block[1]}" if self.grain == "block" else self.grain
        return f"{str(self.dtype).removeprefix('torch.')}, a scale for each {each}"

    def dense(self, parts: Parts, shape: Shape) -> Float[Tensor, "d_out d_in"]:
        """Gives value * scale."""
        values, scale = parts["weight"].float(), parts["weight_scale"].float()
        if self.grain == "tensor":
            return values * scale.reshape(1, 1)
        if self.grain == "row":
            return values * scale.reshape(-1, 1)
        rows, columns = self.block
        wide = scale.repeat_interleave(rows, 0)[: shape[0]].repeat_interleave(columns, 1)[:, : shape[1]]
        return values * wide
