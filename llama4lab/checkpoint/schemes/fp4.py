"""NVFP4: 4-bit floats, a float8 scale for each 16 columns, and one scale for the whole tensor."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from llama4lab.checkpoint.schemes.scheme import Parts, Shape, grouped

# One bit of sign, two of exponent, one of mantissa.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
GROUP = 16


@dataclass(frozen=True)
class Nvfp4:
    """`weight_packed`, `weight_scale` and `global_scale`; the first of two values is in the low half of a byte.

    Attributes:
        divides: Whether the scale of the tensor divides (compressed-tensors) or multiplies (modelopt).
    """

    divides: bool

    @property
    def name(self) -> str:
        """Of the scheme."""
        return "nvfp4, groups of 16"

    def dense(self, parts: Parts, shape: Shape) -> Float[Tensor, "d_out d_in"]:
        """Gives value * scale of the group, times or divided by the scale of the tensor."""
        pairs, whole = parts["weight_packed"], parts["global_scale"].float().reshape(1, 1)
        table = torch.tensor([*E2M1, *(-value for value in E2M1)], device=pairs.device)
        values = table[torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(1).int()]
        scale = parts["weight_scale"].float()
        return grouped(values, scale / whole if self.divides else scale * whole)
