"""The text stack: embedding, layers, final norm."""

from collections.abc import Callable, Sequence
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Cache, Llama4TextConfig

from llama4lab.model.attention import SelfAttention
from llama4lab.model.hook_point import HookPoint
from llama4lab.model.layer_kinds import is_moe
from llama4lab.model.mlp import MLP
from llama4lab.model.moe import MixtureOfExperts
from llama4lab.model.norm import RMSNorm
from llama4lab.model.packed_layout import PackedLayout
from llama4lab.model.rope import RotaryEmbedding
from llama4lab.model.stored_embedding import StoredEmbedding
from llama4lab.model.token_layout import TokenLayout


class TextLayer(nn.Module):
    """`x + attention(norm(x))`, then `+ feed_forward(norm(.))`."""

    def __init__(self, config: Llama4TextConfig, layer: int):
        super().__init__()
        self.self_attn = SelfAttention(config, layer)
        if is_moe(config, layer):
            self.feed_forward = MixtureOfExperts(config)
        else:
            self.feed_forward = MLP(config.hidden_size, config.intermediate_size_mlp, config.hidden_act)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.resid_pre = HookPoint("batch seq d_model")
        self.resid_mid = HookPoint("batch seq d_model")
        self.resid_post = HookPoint("batch seq d_model")

    def forward(
        self,
        x: Float[Tensor, "batch seq d_model"],
        rotation: Float[Tensor, "#batch seq pair 2"],
        layout: TokenLayout | PackedLayout,
        cache: Cache | None = None,
        mask: Tensor | None = None,
    ) -> Float[Tensor, "batch asking d_model"]:
        x = self.resid_pre(x)
        attended = self.self_attn(self.input_layernorm(x), rotation, layout, cache, mask)
        x = self.resid_mid(layout.asking(x) + attended)
        return self.resid_post(x + self.feed_forward(self.post_attention_layernorm(x)))


class TextModel(nn.Module):
    """Token embeddings or ready input vectors -> normed residual stream of the last layer.

    Attributes:
        edits: What `llama4lab.edited` has changed in the layers; a cache goes on only under the edits that it was
            filled under.
    """

    def __init__(self, config: Llama4TextConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        layers = nn.ModuleList(TextLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.layers = cast(Sequence[TextLayer], layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config)
        self.embed = HookPoint("batch seq d_model")
        self.embed_merged = HookPoint("batch seq d_model")
        self.final_norm = HookPoint("batch seq d_model")
        self.edits: tuple = ()
        # transformers sets these two when gradient checkpointing is switched on.
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func: Callable | None = None

    @property
    def checkpointing(self) -> bool:
        """Whether layers run again in the backward pass; never in a pass that records no gradients."""
        return self.gradient_checkpointing and self.training and torch.is_grad_enabled()

    @property
    def chunk_sizes(self) -> list[int | None]:
        """The chunk size of each layer; None for full causal attention."""
        return [layer.self_attn.chunk_size for layer in self.layers]

    def embedded(self, input_ids: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq d_model"]:
        """The embeddings of tokens.

        Raises:
            ValueError: for ids that are not two-dimensional, empty, or outside the vocabulary.
        """
        size = self.embed_tokens.num_embeddings
        if input_ids.ndim != 2 or input_ids.numel() == 0 or input_ids.is_floating_point():
            raise ValueError(
                f"input_ids has shape {list(input_ids.shape)} and dtype {input_ids.dtype}.\n"
                "Pass whole numbers of shape [batch, seq] with at least one row and one token."
            )
        if not torch.compiler.is_compiling() and input_ids.device.type == "cpu":
            low, high = int(input_ids.min()), int(input_ids.max())
            if low < 0 or high >= size:
                wrong = low if low < 0 else high
                raise ValueError(f"input_ids holds the id {wrong}; the vocabulary has ids 0 to {size - 1}.")
        table = self.embed_tokens
        device = table.device if isinstance(table, StoredEmbedding) else table.weight.device
        # Offloaded weights are on the meta device between passes; what brings them back moves the ids too.
        return self.embed(self.embed_tokens(input_ids if device.type == "meta" else input_ids.to(device)))

    def forward(
        self,
        x: Float[Tensor, "batch seq d_model"],
        layout: TokenLayout,
        cache: Cache | None = None,
        masks: dict[str, Tensor | None] | None = None,
    ) -> Float[Tensor, "batch seq d_model"]:
        """Runs the layers.

        Args:
            x: Embedded tokens, images merged in.
            layout: The positions of the tokens.
            cache: Keys and values of earlier tokens; this pass adds its own.
            masks: A caller's own mask `[batch, 1 or head, query, key]` for each kind of layer.
        """
        if cache is not None and not torch.compiler.is_compiling():
            self._check_edits(cache, layout)
        x = self.embed_merged(x)
        rotation = self.rotary_emb(layout.positions)
        assert self.config.layer_types is not None
        for layer, kind in zip(self.layers, self.config.layer_types, strict=False):
            mask = masks.get(kind) if masks is not None else None
            if self.checkpointing and self._gradient_checkpointing_func is not None:
                x = self._gradient_checkpointing_func(layer.__call__, x, rotation, layout, None, mask)
            else:
                x = layer(x, rotation, layout, cache, mask)
        return self.final_norm(self.norm(x))

    def _check_edits(self, cache: Cache, layout: TokenLayout) -> None:
        """Refuses keys and values that were computed otherwise than the new ones will be."""
        filled_under = getattr(cache, "edits", ())
        if layout.past and filled_under != self.edits:
            raise ValueError(
                f"The cache was filled {_under(filled_under)}; this pass runs {_under(self.edits)}.\n"
                "Run the whole rows again, with a new cache."
            )
        if filled_under != self.edits:
            cache.edits = self.edits  # pyright: ignore[reportAttributeAccessIssue] - goes with its keys


def _under(edits: tuple) -> str:
    found = sorted({f"{name} edited" for _, name, _ in edits})
    return f"with {', '.join(found)}" if found else "without edits of attention"
