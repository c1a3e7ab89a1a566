"""Numbers stored as they are."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from llama4lab.checkpoint.schemes.scheme import Parts, Shape


@dataclass(frozen=True)
class Plain:
    """bfloat16, float16 or float32 values."""

    name: str = "plain"

    def dense(self, parts: Parts, shape: Shape) -> Float[Tensor, "d_out d_in"]:
        """Gives the matrix as it is stored."""
        return parts["weight"]
