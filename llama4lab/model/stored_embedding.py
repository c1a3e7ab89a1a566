"""An embedding whose table waits in its file: only the rows of the tokens that are there are read."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from llama4lab.model.expert_store import ExpertStore


class StoredEmbedding(nn.Module):
    """Stands in the place of an `nn.Embedding`.

    Args:
        store: Whose files the table is in.
        name: Of the tensor on disk.
        like: The embedding in whose place it stands.
        dtype: To compute in.
        device: To compute on.
    """

    def __init__(self, store: ExpertStore, name: str, like: nn.Embedding, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.store, self.name, self.dtype, self.device = store, name, dtype, device
        self.num_embeddings, self.embedding_dim = like.num_embeddings, like.embedding_dim
        self.padding_idx = like.padding_idx

    @property
    def weight(self) -> Float[Tensor, "vocab d_model"]:
        """The whole table. Where it is stored in the dtype of the model, it is a view of its file."""
        return self.store.shards[self.name].to(self.device, self.dtype)

    def forward(self, ids: Int[Tensor, "*rows"]) -> Float[Tensor, "*rows d_model"]:
        each, place = ids.unique(return_inverse=True)
        return self.store.rows(self.name, each).to(ids.device, self.dtype)[place]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "StoredEmbedding":
        super()._apply(fn, recurse)
        like = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        self.device, self.dtype = like.device, like.dtype
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, on disk"
