"""Mixture of experts: token choice, a sigmoid gate on the expert's input, and a shared expert beside."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Llama4TextConfig

from llama4lab.model.experts import Experts
from llama4lab.model.hook_point import HookPoint
from llama4lab.model.mlp import MLP


class Router(nn.Linear):
    """Chooses the experts of each token.

    The `logits` are before top-k: editing them re-routes. Editing `indices` forces an expert, whose gate is still the
    sigmoid of its own logit. Editing `gates` changes how strongly an expert is fed, not which.
    """

    def __init__(self, config: Llama4TextConfig):
        super().__init__(config.hidden_size, config.num_local_experts, bias=False)
        self.top_k = config.num_experts_per_tok
        self.logits = HookPoint("batch seq expert")
        self.indices = HookPoint("batch seq slot")
        self.gates = HookPoint("batch seq slot")

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] - gives the choice, not only the logits
        self, x: Float[Tensor, "batch seq d_model"]
    ) -> tuple[Int[Tensor, "batch seq slot"], Float[Tensor, "batch seq slot"]]:
        logits = self.logits(super().forward(x))
        # Ties are real in bfloat16 (1 token in 100), and argmax breaks them differently from topk.
        indices = self.indices(torch.topk(logits, self.top_k, dim=-1).indices)
        if self.indices.watched:
            self._check(indices)
        gates = torch.sigmoid(logits.gather(-1, indices).float()).to(logits.dtype)
        return indices, self.gates(gates)

    def _check(self, indices: Tensor) -> None:
        if indices.is_floating_point() or indices.min() < 0 or indices.max() >= self.out_features:
            raise ValueError(
                f"router.indices was set to {indices.dtype} values from {indices.min()} to {indices.max()}.\n"
                f"Expert indices are integers from 0 to {self.out_features - 1}."
            )


class MixtureOfExperts(nn.Module):
    """Routed experts plus shared expert. The shared expert sees the input without any gate."""

    def __init__(self, config: Llama4TextConfig):
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config)
        self.shared_expert = MLP(config.hidden_size, config.intermediate_size, config.hidden_act)
        self.out = HookPoint("batch seq d_model")

    def forward(self, x: Float[Tensor, "batch seq d_model"]) -> Float[Tensor, "batch seq d_model"]:
        indices, gates = self.router(x)
        routed = self.experts(x, indices, gates).sum(-2)
        return self.out(self.shared_expert(x) + routed)
