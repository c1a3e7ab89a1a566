"""The gated MLP: the whole feed-forward of a dense layer, and the shared expert of a mixture-of-experts layer."""

from jaxtyping import Float
from torch import Tensor, nn
from transformers.activations import ACT2FN

from llama4lab.model.hook_point import HookPoint


class MLP(nn.Module):
    """`down(act(gate(x)) * up(x))`. Hook points: `hidden`, the neurons, and `out`."""

    def __init__(self, d_model: int, d_ff: int, activation: str):
        super().__init__()
        self.gate_proj = nn.Linear(d_model, d_ff, bias=False)
        self.up_proj = nn.Linear(d_model, d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, d_model, bias=False)
        self.activation = ACT2FN[activation]
        self.hidden = HookPoint("batch seq d_ff")
        self.out = HookPoint("batch seq d_model")

    def forward(self, x: Float[Tensor, "batch seq d_model"]) -> Float[Tensor, "batch seq d_model"]:
        hidden = self.hidden(self.activation(self.gate_proj(x)) * self.up_proj(x))
        return self.out(self.down_proj(hidden))
