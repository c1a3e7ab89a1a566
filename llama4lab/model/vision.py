"""The vision tower: image tiles -> patches -> transformer -> pixel shuffle -> adapter. Leading axis: the tile."""

from math import isqrt

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor, nn
from transformers import Llama4VisionConfig

from llama4lab.model.config_parts import patch_side, tile_side
from llama4lab.model.hook_point import HookPoint
from llama4lab.model.rope import PatchRotaryEmbedding, rotated


class PatchEmbedding(nn.Module):
    """Cuts a tile into square patches and projects each; features of a patch run channel, row, column."""

    def __init__(self, config: Llama4VisionConfig):
        super().__init__()
        self.patch_size = patch_side(config)
        self.linear = nn.Linear(config.num_channels * self.patch_size**2, config.hidden_size, bias=False)

    def forward(self, tiles: Float[Tensor, "tile channel height width"]) -> Float[Tensor, "tile patch d_vision"]:
        patches = F.unfold(tiles, kernel_size=self.patch_size, stride=self.patch_size)
        return self.linear(rearrange(patches, "tile pixel patch -> tile patch pixel"))


class VisionAttention(nn.Module):
    """Bidirectional attention among the patches of a tile; pattern and scores only where somebody listens."""

    def __init__(self, config: Llama4VisionConfig):
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.d_head = width // config.num_attention_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.o_proj = nn.Linear(width, width)
        self.q = HookPoint("tile patch head d_head")
        self.k = HookPoint("tile patch head d_head")
        self.v = HookPoint("tile patch head d_head")
        self.q_rot = HookPoint("tile patch head d_head")
        self.k_rot = HookPoint("tile patch head d_head")
        self.z = HookPoint("tile patch head d_head")
        self.scores = HookPoint("tile head query key", lazy=True)
        self.pattern = HookPoint("tile head query key", lazy=True)
        self.out = HookPoint("tile patch d_vision")

    def forward(
        self, x: Float[Tensor, "tile patch d_vision"], rotation: Float[Tensor, "1 patch pair 2"]
    ) -> Float[Tensor, "tile patch d_vision"]:
        q = self.q(self.q_proj(x).unflatten(-1, (-1, self.d_head)))
        k = self.k(self.k_proj(x).unflatten(-1, (-1, self.d_head)))
        v = self.v(self.v_proj(x).unflatten(-1, (-1, self.d_head)))
        q, k = self.q_rot(rotated(q, rotation)), self.k_rot(rotated(k, rotation))
        q, k, v = (rearrange(t, "tile patch head d -> tile head patch d") for t in (q, k, v))
        dropout = self.config.attention_dropout if self.training else 0.0
        if self.config._attn_implementation == "eager" or self.scores.watched or self.pattern.watched:
            scores = einsum(q.float(), k.float(), "t head query d, t head key d -> t head query key")
            pattern = self.pattern(torch.softmax(self.scores(scores * self.d_head**-0.5), dim=-1))
            pattern = F.dropout(pattern, dropout)
            z = einsum(pattern, v.float(), "t head query key, t head key d -> t head query d").to(q.dtype)
        else:
            z = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        z = self.z(rearrange(z, "tile head patch d -> tile patch head d"))
        return self.out(self.o_proj(z.flatten(-2)))


class VisionMLP(nn.Module):
    """Two linear maps around a GELU."""

    def __init__(self, config: Llama4VisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.hidden = HookPoint("tile patch d_ff")
        self.out = HookPoint("tile patch d_vision")

    def forward(self, x: Float[Tensor, "tile patch d_vision"]) -> Float[Tensor, "tile patch d_vision"]:
        return self.out(self.fc2(self.hidden(F.gelu(self.fc1(x)))))


class VisionLayer(nn.Module):
    """Attention and MLP, each behind a LayerNorm and added to the residual stream."""

    def __init__(self, config: Llama4VisionConfig):
        super().__init__()
        self.self_attn = VisionAttention(config)
        self.mlp = VisionMLP(config)
        self.input_layernorm = nn.LayerNorm(config.hidden_size)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size)
        self.resid_pre = HookPoint("tile patch d_vision")
        self.resid_mid = HookPoint("tile patch d_vision")
        self.resid_post = HookPoint("tile patch d_vision")

    def forward(
        self, x: Float[Tensor, "tile patch d_vision"], rotation: Float[Tensor, "1 patch pair 2"]
    ) -> Float[Tensor, "tile patch d_vision"]:
        x = self.resid_pre(x)
        x = self.resid_mid(x + self.self_attn(self.input_layernorm(x), rotation))
        return self.resid_post(x + self.mlp(self.post_attention_layernorm(x)))


class VisionEncoder(nn.Module):
    """The layers of the vision transformer."""

    def __init__(self, config: Llama4VisionConfig):
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_hidden_layers))
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func = None

    def forward(
        self, x: Float[Tensor, "tile patch d_vision"], rotation: Float[Tensor, "1 patch pair 2"], first: int = 0
    ) -> Float[Tensor, "tile patch d_vision"]:
        for layer in self.layers[first:]:
            if self.gradient_checkpointing and self.training and self._gradient_checkpointing_func is not None:
                x = self._gradient_checkpointing_func(layer.__call__, x, rotation)
            else:
                x = layer(x, rotation)
        return x


def pixel_shuffled(
    x: Float[Tensor, "tile patch d_vision"], ratio: float
) -> Float[Tensor, "tile image_token d_shuffled"]:
    """Stacks the features of each square of neighbouring patches (2 x 2 at ratio 0.5): row first, then column."""
    side, step = isqrt(x.shape[1]), round(1 / ratio)
    pattern = "tile (row i column j) d -> tile (row column) (i j d)"
    return rearrange(x, pattern, row=side // step, i=step, j=step)


class VisionAdapterMLP(nn.Module):
    """Two linear maps, each followed by a GELU."""

    def __init__(self, config: Llama4VisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.intermediate_size, config.projector_input_dim, bias=False)
        self.fc2 = nn.Linear(config.projector_output_dim, config.projector_output_dim, bias=False)
        self.dropout = config.projector_dropout

    def forward(self, x: Float[Tensor, "tile image_token d_shuffled"]) -> Float[Tensor, "tile image_token d_adapter"]:
        hidden = F.dropout(F.gelu(self.fc1(x)), p=self.dropout, training=self.training)
        return F.gelu(self.fc2(hidden))


class VisionAdapter(nn.Module):
    """Holds the adapter MLP under the name that checkpoints use."""

    def __init__(self, config: Llama4VisionConfig):
        super().__init__()
        self.mlp = VisionAdapterMLP(config)

    def forward(self, x: Float[Tensor, "tile image_token d_shuffled"]) -> Float[Tensor, "tile image_token d_adapter"]:
        return self.mlp(x)


class VisionModel(nn.Module):
    """Normalised pixels of tiles -> one vector for each image token."""

    def __init__(self, config: Llama4VisionConfig):
        super().__init__()
        self.config = config
        width, num_patches = config.hidden_size, (tile_side(config) // patch_side(config)) ** 2
        self.patch_embedding = PatchEmbedding(config)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding_vlm = nn.Parameter(torch.empty(num_patches + 1, width))
        self.rotary_embedding = PatchRotaryEmbedding(config)
        self.layernorm_pre = nn.LayerNorm(width)
        self.layernorm_post = nn.LayerNorm(width)
        self.model = VisionEncoder(config)
        self.vision_adapter = VisionAdapter(config)
        self.patch_embed = HookPoint("tile patch d_vision")
        self.embed = HookPoint("tile patch d_vision")
        self.final_norm = HookPoint("tile patch d_vision")
        self.shuffled = HookPoint("tile image_token d_shuffled")
        self.adapter = HookPoint("tile image_token d_adapter")

    def forward(
        self, pixel_values: Float[Tensor, "tile channel height width"]
    ) -> Float[Tensor, "tile image_token d_adapter"]:
        size = tile_side(self.config)
        if pixel_values.ndim != 4 or pixel_values.shape[1:] != (self.config.num_channels, size, size):
            raise ValueError(
                f"pixel_values has shape {list(pixel_values.shape)}; the vision tower takes tiles of shape "
                f"[tile, {self.config.num_channels}, {size}, {size}].\nUse the image processor of this checkpoint."
            )
        x = self.patch_embed(self.patch_embedding(pixel_values.to(self.class_embedding.dtype)))
        # The class token comes last, and does not reach the text model.
        x = torch.cat([x, self.class_embedding.expand(x.shape[0], 1, -1)], dim=1)
        x = self.layernorm_pre(self.embed(x + self.positional_embedding_vlm))
        return self.continued(x, 0)

    def continued(
        self, x: Float[Tensor, "tile patch d_vision"], layer: int
    ) -> Float[Tensor, "tile image_token d_adapter"]:
        """What comes of the residual stream that enters a layer (the number of layers: that leaves the last one)."""
        x = self.layernorm_post(self.model(x, self.rotary_embedding(x.device), layer))
        x = self.final_norm(x)[:, :-1]
        x = self.shuffled(pixel_shuffled(x, self.config.pixel_shuffle_ratio))
        return self.adapter(self.vision_adapter(x))
