"""Self-attention of a text layer: RoPE inside a chunk, or NoPE over the whole document."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from accelerate.utils import align_module_device
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Cache, Llama4TextConfig

from llama4lab.model import attention_kernels, barred_keys, flex_kernel
from llama4lab.model.cache import check_room
from llama4lab.model.hook_point import HookPoint
from llama4lab.model.layer_kinds import is_chunked, uses_rope
from llama4lab.model.norm import rms_normalised
from llama4lab.model.packed_layout import PackedLayout
from llama4lab.model.rope import rotated
from llama4lab.model.token_layout import TokenLayout


class SelfAttention(nn.Module):
    """Grouped-query attention.

    `scores`, `pattern` and `head_out` are computed only where somebody listens. Scores and pattern are float32 whatever
    the dtype of the model, as they are inside the fused kernels.

    All attributes are read at every pass; see `llama4lab.edited`, which changes them for a while.

    Attributes:
        rope: Whether queries and keys are turned by their positions.
        qk_norm: Whether queries and keys are normed.
        tuning: Whether queries are sharpened by their positions as the config says; or the factor, the same at all
            positions; or a function from positions to factors.
        chunk_size: Size of the attention chunk in tokens; None for full causal attention.
        rotate: Another rotation than that of the model: a function of the positions; None for the model's.
        barred: Keys that only their own queries see: places in the rows, "first_token" for that of each document.
        dense_mask: Whether the fused kernel gets all keys at once and a mask, as in transformers, bit for bit.
    """

    def __init__(self, config: Llama4TextConfig, layer: int):
        super().__init__()
        self.config = config
        self.layer = layer
        self.rope = uses_rope(config, layer)
        self.qk_norm = bool(config.use_qk_norm) and self.rope
        self.tuning: bool | float | Callable[[Tensor], Tensor] = bool(config.attn_temperature_tuning) and not self.rope
        self.rotate: Callable[[Tensor], Tensor] | None = None
        self.barred: frozenset[int | str] = frozenset()
        self.chunk_size = config.attention_chunk_size if is_chunked(config, layer) else None
        self.dense_mask = False
        self.d_head = config.head_dim
        width, kv_width = config.num_attention_heads * self.d_head, config.num_key_value_heads * self.d_head
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.attention_bias)
        self.q = HookPoint("batch seq head d_head")
        self.k = HookPoint("batch seq kv_head d_head")
        self.v = HookPoint("batch seq kv_head d_head")
        self.q_rot = HookPoint("batch seq head d_head")
        self.k_rot = HookPoint("batch seq kv_head d_head")
        self.scores = HookPoint("batch head query key", lazy=True)
        self.pattern = HookPoint("batch head query key", lazy=True)
        self.z = HookPoint("batch seq head d_head")
        self.head_out = HookPoint("batch seq head d_model", lazy=True)
        self.out = HookPoint("batch seq d_model")

    def forward(
        self,
        x: Float[Tensor, "batch seq d_model"],
        rotation: Float[Tensor, "#batch seq pair 2"],
        layout: TokenLayout | PackedLayout,
        cache: Cache | None = None,
        mask: Tensor | None = None,
    ) -> Float[Tensor, "batch asking d_model"]:
        q = self.q(self.q_proj(layout.asking(x)).unflatten(-1, (-1, self.d_head)))
        k = self.k(self.k_proj(x).unflatten(-1, (-1, self.d_head)))
        v = self.v(self.v_proj(x).unflatten(-1, (-1, self.d_head)))
        if self.rope:
            rotation = rotation if self.rotate is None else self.rotate(layout.positions)
            q, k = rotated(q, layout.asking(rotation)), rotated(k, rotation)
        if self.qk_norm:
            # Without weights, for each head alone, after RoPE: a score is then sqrt(d_head) times a cosine.
            q, k = rms_normalised(q, self.config.rms_norm_eps), rms_normalised(k, self.config.rms_norm_eps)
        if self.tuning is not False:
            q = (q * self.temperature(layout.asking(layout.positions))).to(q.dtype)
        q, k = self.q_rot(q), self.k_rot(k)
        q, k, v = (rearrange(t, "batch seq head d_head -> batch head seq d_head") for t in (q, k, v))
        if cache is not None:
            if self.layer == 0 and isinstance(layout, TokenLayout) and not torch.compiler.is_compiling():
                check_room(cache, layout.key_positions.shape[1])
            k, v = cache.update(k, v, self.layer)
            attention_kernels.check_kept(layout, self.chunk_size, k.shape[2])
        if isinstance(layout, PackedLayout):
            watched = self.scores.watched or self.pattern.watched
            z = layout.attended(self.attend, q, k, v, None if watched else self.chunk_size)
        else:
            z = self.attend(q, k, v, layout, mask)
        return self.out(self.combine(self.z(rearrange(z, "batch head seq d_head -> batch seq head d_head"))))

    def temperature(self, positions: Int[Tensor, "#batch seq"]) -> Float[Tensor, "#batch seq 1 1"]:
        """The factor by which a NoPE layer sharpens attention at far positions; positions count from 0."""
        if callable(self.tuning):
            return self.tuning(positions)[..., None, None]
        if not isinstance(self.tuning, bool):
            return torch.full_like(positions, self.tuning, dtype=torch.float32)[..., None, None]
        steps = torch.floor((positions.float() + 1.0) / self.config.floor_scale)
        return (torch.log1p(steps) * self.config.attn_scale + 1.0)[..., None, None]

    def attend(
        self,
        q: Float[Tensor, "batch head seq d_head"],
        k: Float[Tensor, "batch kv_head key d_head"],
        v: Float[Tensor, "batch kv_head key d_head"],
        layout: TokenLayout,
        mask: Tensor | None,
    ) -> Float[Tensor, "batch head seq d_head"]:
        """Softmax-weighted sums of values: by the fused kernel, or step by step where someone looks at a step."""
        dropout = self.config.attention_dropout if self.training else 0.0
        kernel = self.config._attn_implementation
        stepwise = kernel == "eager" or self.scores.watched or self.pattern.watched
        if self.barred and (stepwise or mask is not None or torch.compiler.is_compiling()):
            mask = barred_keys.narrowed_mask(layout, self.barred, k.shape[2], mask)
        if stepwise:
            bias = attention_kernels.additive_mask(layout, self.chunk_size, k.shape[2], mask)
            z = self._attend_eagerly(q, k, v, bias, dropout)
        elif mask is not None:
            z = attention_kernels.masked(q, k, v, layout, self.chunk_size, mask, dropout)
        elif self.barred:
            z = barred_keys.attended(q, k, v, layout, self.chunk_size, barred=self.barred, dropout=dropout)
        elif kernel == "flex_attention":
            z = flex_kernel.flex(q, k, v, layout, self.chunk_size)
        elif self.dense_mask:
            z = attention_kernels.dense(q, k, v, layout, self.chunk_size, dropout)
        else:
            z = attention_kernels.fused(q, k, v, layout, self.chunk_size, dropout)
        if layout.start is None:
            # Padding attends to nothing, whichever kernel ran.
            z = z * layout.query_valid[:, None, :, None]
        return z

    def _attend_eagerly(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, dropout: float
    ) -> Float[Tensor, "batch head seq d_head"]:
        group, wide = q.shape[1] // k.shape[1], torch.promote_types(q.dtype, torch.float32)
        k, v = (t.to(wide).repeat_interleave(group, dim=1) for t in (k, v))
        scores = einsum(q.to(wide), k, "batch head query d, batch head key d -> batch head query key")
        pattern = self.pattern(torch.softmax(self.scores(scores * self.d_head**-0.5 + bias), dim=-1))
        pattern = F.dropout(pattern, dropout)
        return einsum(pattern, v, "batch head query key, batch head key d -> batch head query d").to(q.dtype)

    def combine(self, z: Float[Tensor, "batch seq head d_head"]) -> Float[Tensor, "batch seq d_model"]:
        """The output projection; head by head where somebody looks at single heads."""
        if not self.head_out.watched:
            return self.o_proj(z.flatten(-2))
        with align_module_device(self.o_proj):  # an offloaded weight is on the meta device between calls
            weight = rearrange(self.o_proj.weight, "d_model (head d_head) -> head d_head d_model", d_head=self.d_head)
            parts = einsum(z, weight, "batch seq head d_head, head d_head d_model -> batch seq head d_model")
            out = self.head_out(parts).sum(-2)
            return out if self.o_proj.bias is None else out + self.o_proj.bias
