"""What every scheme can do: make numbers of the tensors that a quantizer stored for one matrix."""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

Parts = Mapping[str, Tensor]
Shape = tuple[int, ...]


@runtime_checkable
class Scheme(Protocol):
    """A way to store a matrix.

    Attributes:
        name: What it is called in tables, for example "int4, groups of 128".
    """

    @property
    def name(self) -> str: ...

    def dense(self, parts: Parts, shape: Shape) -> Float[Tensor, "d_out d_in"]:
        """Gives the matrix in float32 (a plain one as it is stored), on the device of its parts.

        Args:
            parts: The stored tensors by what they are, for example `weight_packed` and `weight_scale`.
            shape: Of the matrix, [out, in].
        """
        ...


def grouped(values: Float[Tensor, "d_out d_in"], scale: Float[Tensor, "d_out group"]) -> Float[Tensor, "d_out d_in"]:
    """Multiplies each run of columns by the scale of its group."""
    rows, groups = scale.shape
    return (values.reshape(rows, groups, -1) * scale[:, :, None]).reshape(rows, -1)
