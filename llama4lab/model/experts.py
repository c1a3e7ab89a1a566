"""The routed experts: each token visits only the experts it was sent to, and only their weights are read."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Llama4TextConfig
from transformers.activations import ACT2FN

from llama4lab.model.expert_bank import ExpertBank
from llama4lab.model.hook_point import HookPoint

HALF = (torch.bfloat16, torch.float16)
DIRECT_LIMIT = 4  # up to so many (token, slot) pairs, sorting them by expert costs more than it saves


class Experts(nn.Module):
    """A bank of gated MLPs whose weights are stacked, `[in, out]`, gate before up.

    The weights are parameters, or banks of experts that are packed or wait elsewhere (`hold`); both are read alike.
    Hook points: `hidden`, the neurons of each chosen expert, and `out`, what each chosen expert writes.
    """

    def __init__(self, config: Llama4TextConfig):
        super().__init__()
        num_experts, d_model, d_ff = config.num_local_experts, config.hidden_size, config.intermediate_size
        self.gate_up_proj: Tensor | ExpertBank = nn.Parameter(torch.empty(num_experts, d_model, 2 * d_ff))
        self.down_proj: Tensor | ExpertBank = nn.Parameter(torch.empty(num_experts, d_ff, d_model))
        self.activation = ACT2FN[config.hidden_act]
        self.hidden = HookPoint("batch seq slot d_ff", lazy=True)
        self.out = HookPoint("batch seq slot d_model")

    def forward(
        self,
        x: Float[Tensor, "batch seq d_model"],
        indices: Int[Tensor, "batch seq slot"],
        gates: Float[Tensor, "batch seq slot"],
    ) -> Float[Tensor, "batch seq slot d_model"]:
        # The gate scales the expert's input, not its output; through a gated MLP its effect is near quadratic.
        inputs = (x.unsqueeze(-2) * gates.unsqueeze(-1)).flatten(0, 2)
        chosen = indices.flatten()
        if chosen.numel() <= DIRECT_LIMIT:
            order, groups = None, [(expert, 1) for expert in chosen.tolist()]
        else:
            order = chosen.argsort(stable=True)
            counts = torch.bincount(chosen, minlength=self.gate_up_proj.shape[0]).tolist()
            groups = [(expert, count) for expert, count in enumerate(counts) if count]
            inputs = inputs[order]
        hidden = self._gate_up(inputs, groups)
        if self.hidden.watched:
            placed = self._unsorted(hidden, order).unflatten(0, indices.shape)
            hidden = self.hidden(placed).flatten(0, 2)
            hidden = hidden if order is None else hidden[order]
        out = self._unsorted(self._matmul(hidden, self.down_proj, groups), order)
        return self.out(out.unflatten(0, indices.shape))

    def _gate_up(self, inputs: Tensor, groups: list[tuple[int, int]]) -> Float[Tensor, "row d_ff"]:
        gate, up = self._matmul(inputs, self.gate_up_proj, groups).chunk(2, dim=-1)
        return up * self.activation(gate)

    def hold(self, name: str, bank: ExpertBank) -> None:
        """Puts a bank in the place of the parameter `gate_up_proj` or `down_proj`."""
        self._parameters.pop(name, None)
        setattr(self, name, bank)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Experts":
        super()._apply(fn, recurse)
        for name in ("gate_up_proj", "down_proj"):
            if isinstance(bank := getattr(self, name), ExpertBank):
                setattr(self, name, bank.moved(fn))
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in ("gate_up_proj", "down_proj"):
            if isinstance(bank := getattr(self, name), ExpertBank):
                destination[prefix + name] = torch.stack([bank[expert] for expert in range(len(bank))])

    def _matmul(self, rows: Float[Tensor, "row d_in"], weight: Tensor | ExpertBank, groups) -> Tensor:
        """Each group of rows times the weight of its expert; rows of a group stand together."""
        if isinstance(weight, ExpertBank):
            parts = rows.split([count for _, count in groups])
            return torch.cat(weight.products(parts, [expert for expert, _ in groups]))
        if _one_call_is_faster(rows):
            sizes = torch.zeros(weight.shape[0], dtype=torch.int32)
            for expert, count in groups:
                sizes[expert] = count
            return F.grouped_mm(rows, weight, offs=sizes.cumsum(0).to(rows.device, torch.int32))
        parts = rows.split([count for _, count in groups])
        # The gradient of a slice is as large as the whole bank, that of an unbound one is not.
        bank = weight.unbind() if torch.is_grad_enabled() and weight.requires_grad else weight
        return torch.cat([_product(part, bank[expert]) for part, (expert, _) in zip(parts, groups, strict=True)])

    def _unsorted(self, rows: Float[Tensor, "row d"], order: Int[Tensor, " row"] | None) -> Float[Tensor, "row d"]:
        # By gathering with the inverse permutation: out of place, and differentiable.
        return rows if order is None else rows[order.argsort()]


def _product(x: Float[Tensor, "row d_in"], weight: Float[Tensor, "d_in d_out"]) -> Float[Tensor, "row d_out"]:
    if x.device.type == "cpu" and x.dtype in HALF and not _fast_half_precision():
        # Without bfloat16 instructions, torch multiplies [in, out] weights 200 times slower than in float32.
        if x.shape[0] == 1:
            return torch.mv(weight.t(), x[0]).unsqueeze(0)
        return (x.float() @ weight.float()).to(x.dtype)
    return x @ weight


def _one_call_is_faster(rows: Float[Tensor, "row d_in"]) -> bool:
    # On a GPU, one grouped call saves a launch for each expert; on a CPU it is no faster than one product each.
    return rows.is_cuda and rows.dtype == torch.bfloat16 and rows.shape[0] > DIRECT_LIMIT


def _fast_half_precision() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
