"""The bridge from the vision tower to the text model."""

from jaxtyping import Float
from torch import Tensor, nn
from transformers import Llama4Config

from llama4lab.model.config_parts import text_part, vision_part


class MultiModalProjector(nn.Module):
    """From the width of the vision adapter to that of the text model."""

    def __init__(self, config: Llama4Config):
        super().__init__()
        self.linear_1 = nn.Linear(vision_part(config).vision_output_dim, text_part(config).hidden_size, bias=False)

    def forward(self, x: Float[Tensor, "tile image_token d_adapter"]) -> Float[Tensor, "tile image_token d_model"]:
        return self.linear_1(x)
