"""The two root-mean-square norms of Llama 4's text layers."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


def rms_normalised(x: Float[Tensor, "*rest d"], eps: float) -> Float[Tensor, "*rest d"]:
    """Gives x divided by the root of its mean square over the last axis, computed in float32, in the dtype of x."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).type_as(x)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned weight, which is applied after the cast back to the model's dtype."""

    def __init__(self, d_model: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x: Float[Tensor, "*rest d"]) -> Float[Tensor, "*rest d"]:
        return rms_normalised(x, self.eps) * self.weight

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"
