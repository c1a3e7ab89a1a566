"""The names that Meta gives the tensors of a Llama 4, those that the model has for them, and how ranks share them.

Two spellings are in use: that of the published files (`moe_w_in_eD_F`, `wqkv`, `fc1_weight`) and that of the modules of
Meta's code, into which they are turned when it loads them (`w1`, `wq`, `w1` and `w3`). Both are read.
"""

import re
from typing import NamedTuple

LAYER = r"layers\.(?P<layer>0|[1-9]\d*)\."
ENCODER = r"vision_embeddings\.vision_encoder\."
BLOCK = ENCODER + r"transformer\.resblocks\.(?P<layer>0|[1-9]\d*)\."
TEXT, VISION = "model.layers.{layer}.", "vision_model.model.layers.{layer}."

# Whatever changes no number of a forward pass, or is computed from the settings.
IGNORED = re.compile(r"rope\.freqs|freqs?_cis|.*\._extra_state|.*\.(\w+_)?gate_stats_3E|.*\.expert_activation_DE")


class Target(NamedTuple):
    """What a stored tensor is in the model.

    Attributes:
        names: Of the tensors that its rows are, from the first to the last.
        axis: Along which the ranks share it; None if every rank has the whole.
        turned: Whether it is stored as [in, out].
    """

    names: tuple[str, ...]
    axis: int | None
    turned: bool = False


class Bank(NamedTuple):
    """What one projection of all experts of a layer is called.

    Attributes:
        layer: The number of the layer.
        projection: "gate", "up" or "down".
    """

    layer: int
    projection: str


# Where ranks share the rows of a matrix, its axis is 0; where they share the columns, it is 1.
RULES: dict[str, tuple[str, int | None]] = {
    r"tok_embeddings\.weight": ("model.embed_tokens.weight", 0),
    r"output\.weight": ("lm_head.weight", 0),
    r"norm\.weight": ("model.norm.weight", None),
    LAYER + r"(attention\.wqkv\.layer_norm_weight|attention_norm\.weight)": (TEXT + "input_layernorm.weight", None),
    LAYER + r"(feed_forward\.norm\.weight|feed_forward\.mlp\.layer_norm[._]weight|ffn_norm\.weight)": (
        TEXT + "post_attention_layernorm.weight",
        None,
    ),
    LAYER + r"attention\.w(?P<part>[qkv])\.weight": (TEXT + "self_attn.{part}_proj.weight", 0),
    LAYER + r"attention\.wo\.weight": (TEXT + "self_attn.o_proj.weight", 1),
    LAYER + r"feed_forward\.w1\.weight": (TEXT + "feed_forward.gate_proj.weight", 0),
    LAYER + r"feed_forward\.w3\.weight": (TEXT + "feed_forward.up_proj.weight", 0),
    LAYER + r"feed_forward\.(w2\.weight|mlp\.fc2_weight)": (TEXT + "feed_forward.down_proj.weight", 1),
    **{
        LAYER + rf"feed_forward\.({published}|shared_expert\.{module})\.weight": (
            TEXT + f"feed_forward.shared_expert.{part}_proj.weight",
            axis,
        )
        for published, module, part, axis in (
            ("w_in_shared_FD", "w1", "gate", 0),
            ("w_swiglu_FD", "w3", "up", 0),
            ("w_out_shared_DF", "w2", "down", 1),
        )
    },
    ENCODER + r"conv1\._linear\.weight": ("vision_model.patch_embedding.linear.weight", 0),
    ENCODER + r"(?P<part>class_embedding|positional_embedding_vlm)": ("vision_model.{part}", None),
    ENCODER + r"ln_(?P<part>pre|post)\.(?P<end>weight|bias)": ("vision_model.layernorm_{part}.{end}", None),
    BLOCK + r"attn\.w(?P<part>[qkv])\.(?P<end>weight|bias)": (VISION + "self_attn.{part}_proj.{end}", 0),
    BLOCK + r"attn\.wo\.weight": (VISION + "self_attn.o_proj.weight", 1),
    BLOCK + r"attn\.wo\.bias": (VISION + "self_attn.o_proj.bias", None),
    BLOCK + r"ln_1\.(?P<end>weight|bias)": (VISION + "input_layernorm.{end}", None),
    BLOCK + r"ln_2\.(?P<end>weight|bias)": (VISION + "post_attention_layernorm.{end}", None),
    BLOCK + r"mlp\.c_fc\.(?P<end>weight|bias)": (VISION + "mlp.fc1.{end}", 0),
    BLOCK + r"mlp\.c_proj\.weight": (VISION + "mlp.fc2.weight", 1),
    BLOCK + r"mlp\.c_proj\.bias": (VISION + "mlp.fc2.bias", None),
    r"vision_embeddings\.vision_adapter\.mlp\.c_fc\.weight": ("vision_model.vision_adapter.mlp.fc1.weight", 0),
    r"vision_embeddings\.vision_adapter\.mlp\.c_proj\.weight": ("vision_model.vision_adapter.mlp.fc2.weight", 1),
    r"vision_projection\.weight": ("multi_modal_projector.linear_1.weight", 0),
}
COMPILED = {re.compile(pattern): target for pattern, target in RULES.items()}

ROUTER = re.compile(LAYER + r"feed_forward\.router_DE")
QKV = re.compile(LAYER + r"attention\.wqkv\.weight")
GATE_UP = re.compile(LAYER + r"feed_forward\.mlp\.fc1_weight")
EXPERTS = re.compile(LAYER + r"feed_forward\.experts\.(?P<part>moe_w_in_eD_F|moe_w_swiglu_eD_F|moe_w_out_eF_D|w[123])")
PROJECTIONS = {"moe_w_in_eD_F": "gate", "moe_w_swiglu_eD_F": "up", "moe_w_out_eF_D": "down"}
PROJECTIONS |= {"w1": "gate", "w3": "up", "w2": "down"}


def target_of(name: str) -> Target | None:
    """Gives what a stored tensor is in the model; None for experts, and for what no Llama 4 has."""
    if found := ROUTER.fullmatch(name):
        return Target((f"model.layers.{found['layer']}.feed_forward.router.weight",), None, turned=True)
    if found := QKV.fullmatch(name):
        return Target(tuple(f"model.layers.{found['layer']}.self_attn.{part}_proj.weight" for part in "qkv"), 0)
    if found := GATE_UP.fullmatch(name):
        start = f"model.layers.{found['layer']}.feed_forward"
        return Target((f"{start}.gate_proj.weight", f"{start}.up_proj.weight"), 0)
    for pattern, (target, axis) in COMPILED.items():
        if found := pattern.fullmatch(name):
            return Target((target.format(**found.groupdict()),), axis)
    return None


def bank_of(name: str) -> Bank | None:
    """Gives which experts a stored tensor, or a tensor of scales, belongs to; None for any other."""
    found = EXPERTS.fullmatch(name)
    return Bank(int(found["layer"]), PROJECTIONS[found["part"]]) if found else None
