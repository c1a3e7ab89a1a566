"""A linear map whose weight stays packed, in memory or on disk."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llama4lab.model.expert_bank import Held, Source, made_once
from llama4lab.model.packed_matrix import PackedMatrix, product


class PackedLinear(nn.Module):
    """Stands in the place of an `nn.Linear`. Its `weight` is read like any other, and made whenever it is.

    Args:
        packed: The weight, or where it comes from.
        bias: The bias, if there is one.
        dtype: To compute in.
    """

    def __init__(self, packed: PackedMatrix | Source, bias: nn.Parameter | None, dtype: torch.dtype):
        super().__init__()
        self.source: Source = Held([packed]) if isinstance(packed, PackedMatrix) else packed
        self.bias, self.dtype = bias, dtype
        self.out_features, self.in_features = self.source.shape

    @property
    def packed(self) -> PackedMatrix:
        """The weight as it is stored."""
        return self.source.matrix(0)

    @property
    def weight(self) -> Float[Tensor, "d_out d_in"]:
        """The numbers, in the dtype of the model."""
        return self.packed.dense(self.dtype)

    def forward(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        dtype, device = x.dtype, x.device
        self.source.expect([0])

        def make() -> Tensor:
            return self.packed.dense(dtype).to(device)

        return product(x, made_once(make(), make), self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLinear":
        # What is stored moves, and stays as it is; the dtype is that of what is made of it.
        super()._apply(fn, recurse)
        like = fn(torch.empty(0, dtype=self.dtype, device=self.source.device))
        self.source, self.dtype = self.source.to(like.device), like.dtype
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.source.scheme}"
