"""A matrix that stays as it is stored: its numbers are made each time they are used, and dropped after."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from llama4lab.checkpoint.matrices import Matrix, Part
from llama4lab.checkpoint.schemes.encoding import encoded

Tensors = Mapping[str, Tensor]


class PackedMatrix:
    """Stored matrices, joined along `out`.

    Args:
        matrices: What they are.
        tensors: What each is stored in.
    """

    def __init__(self, matrices: Sequence[Matrix], tensors: Sequence[Tensors]):
        self.matrices, self.tensors = list(matrices), [dict(each) for each in tensors]

    @property
    def shape(self) -> tuple[int, int]:
        """Out and in."""
        return sum(matrix.shape[0] for matrix in self.matrices), self.matrices[0].shape[1]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return next(iter(self.tensors[0].values())).device

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return sum(tensor.nbytes for each in self.tensors for tensor in each.values())

    def to(self, device: torch.device) -> "PackedMatrix":
        """Gives the same on a device."""
        moved = [{role: tensor.to(device) for role, tensor in each.items()} for each in self.tensors]
        return PackedMatrix(self.matrices, moved)

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "d_out d_in"]:
        """Gives the numbers."""
        made = [matrix.dense(each, dtype) for matrix, each in zip(self.matrices, self.tensors, strict=True)]
        return torch.cat(made) if len(made) > 1 else made[0]


def quantized(
    matrices: Sequence[Matrix], tensors: Sequence[Tensors], method: str, device: torch.device | None = None
) -> PackedMatrix:
    """Rounds matrices to fewer bits, one after the other.

    Args:
        matrices: What they are.
        tensors: What each is stored in.
        method: "int8", "int4" or "fp8".
        device: Where to; None for where they are.
    """
    rounded: list[Matrix] = []
    parts: list[Tensors] = []
    for matrix, each in zip(matrices, tensors, strict=True):
        made, scheme = encoded(matrix.dense(each, torch.float32).to(device), method)
        base = matrix.parts["weight"].name.removesuffix(".weight")
        rounded.append(Matrix({role: Part(f"{base}.{role}") for role in made}, scheme, matrix.shape))
        parts.append(made)
    return PackedMatrix(rounded, parts)


class _Product(torch.autograd.Function):
    """`x @ weight.T + bias` that does not keep the weight for the way back: it is made again."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        x: Tensor, weight: Callable[[], Tensor], bias: Tensor | None
    ) -> Tensor:
        return F.linear(x, weight(), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.weight = inputs[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, Tensor | None]:
        own = gradients[0].reshape(-1, gradients[0].shape[-1]).sum(0) if ctx.needs_input_grad[2] else None
        return gradients[0] @ ctx.weight(), None, own

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return F.linear(tangents[0], ctx.weight(), tangents[2])


def product(
    x: Float[Tensor, "*rows d_in"],
    weight: Callable[[], Float[Tensor, "d_out d_in"]],
    bias: Float[Tensor, " d_out"] | None = None,
) -> Float[Tensor, "*rows d_out"]:
    """Gives `x @ weight().T + bias`; a gradient goes to `x` and the bias, and the weight is made anew for it."""
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return _Product.apply(x, weight, bias)  # pyright: ignore[reportReturnType]
    return F.linear(x, weight(), bias)
