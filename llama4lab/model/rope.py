"""Rotary position embeddings: interleaved pairs (2j, 2j + 1), one axis for text, two axes for image patches.

The tables are not buffers: `.to(dtype)` and `.half()` would round them (a relative error of 0.2 % in bfloat16), so they
are derived from the config in float32 and kept, a copy for each device, in a plain attribute.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Llama4TextConfig, Llama4VisionConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llama4lab.model.config_parts import patch_side, tile_side

STATIC_TYPES = ("default", "linear", "llama3", "yarn")


def rotated(
    x: Float[Tensor, "batch seq head d_head"], rotation: Float[Tensor, "#batch seq pair 2"]
) -> Float[Tensor, "batch seq head d_head"]:
    """Gives x with each pair of neighbouring features turned by its angle; computed in float32, in the dtype of x."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotation.unsqueeze(2).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).type_as(x)


def frequencies(config: Llama4TextConfig) -> tuple[Float[Tensor, " pair"], float]:
    """Gives the angle a position adds to each pair, in radians, and the factor on cosine and sine (1 but for yarn).

    Raises:
        ValueError: for a RoPE type whose frequencies depend on the length of the sequence.
    """
    kind = dict(config.rope_parameters or {}).get("rope_type", "default")
    if kind not in STATIC_TYPES:
        raise ValueError(
            f"config.rope_parameters asks for rope_type {kind!r}; supported are {', '.join(STATIC_TYPES)}.\n"
            "Frequencies that depend on the sequence length would disagree with keys that are already cached."
        )
    if kind == "default":
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
        return 1.0 / _theta(config) ** exponents, 1.0
    return ROPE_INIT_FUNCTIONS[kind](config, device=torch.device("cpu"))


def _theta(config: Llama4TextConfig | Llama4VisionConfig) -> float:
    parameters: dict[str, Any] = dict(config.rope_parameters or {})
    if "rope_theta" not in parameters:
        raise ValueError(f"{type(config).__name__}.rope_parameters has no rope_theta: {parameters}.")
    return float(parameters["rope_theta"])


class RotaryEmbedding(nn.Module):
    """Positions -> the cosine and sine of every pair, in float32 whatever the dtype of the model."""

    def __init__(self, config: Llama4TextConfig):
        super().__init__()
        self.config = config
        self._tables: dict[torch.device, Tensor] = {}
        self._factor = 1.0

    def forward(self, positions: Int[Tensor, "#batch seq"]) -> Float[Tensor, "#batch seq pair 2"]:
        if positions.device not in self._tables:
            table, self._factor = frequencies(self.config)
            self._tables[positions.device] = table.to(positions.device)
        angles = positions.unsqueeze(-1).float() * self._tables[positions.device]
        return torch.view_as_real(torch.polar(torch.ones_like(angles), angles)) * self._factor


class PatchRotaryEmbedding(nn.Module):
    """The rotation of each patch of an image: half the pairs turn with the column, half with the row.

    The class token, which is last, is not turned.
    """

    def __init__(self, config: Llama4VisionConfig):
        super().__init__()
        self.config = config
        self._tables: dict[torch.device, Tensor] = {}

    def forward(self, device: torch.device) -> Float[Tensor, "1 patch pair 2"]:
        if device not in self._tables:
            self._tables[device] = self._table().to(device)
        return self._tables[device]

    def _table(self) -> Float[Tensor, "1 patch pair 2"]:
        side = tile_side(self.config) // patch_side(self.config)
        width = self.config.hidden_size // self.config.num_attention_heads // 2
        exponents = torch.arange(0, width, 2, dtype=torch.float32, device="cpu") / width
        speeds = 1.0 / _theta(self.config) ** exponents
        patch = torch.arange(side**2, device="cpu")
        # Columns first, then rows: the (x, y) order. Swapped, every image is transposed.
        angles = torch.cat([(axis + 1).unsqueeze(-1) * speeds for axis in (patch % side, patch // side)], dim=-1)
        angles = torch.cat([angles, angles.new_zeros(1, angles.shape[-1])])
        return torch.stack([angles.cos(), angles.sin()], dim=-1).unsqueeze(0)
