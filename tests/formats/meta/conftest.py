"""Small checkpoints in Meta's own format: the tensors of a model shared out between ranks, and params.json."""

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama4lab.model.pretrained import HookedPreTrainedModel

Tensors = dict[str, Tensor]
Write = Callable[..., Path]

# Sizes that Meta's rules for the widths of the MLPs can give.
SIZES: dict[str, Any] = {"intermediate_size": 88, "intermediate_size_mlp": 176}
RULE = {"multiple_of": 8, "ffn_dim_multiplier": 1.0, "ffn_exp": 2.0}
WIDE: dict[str, Any] = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 256, "intermediate_size_mlp": 344}
WIDE_RULE = {"multiple_of": 8, "ffn_dim_multiplier": 1.0, "ffn_exp": 6.0}
GROUP = 128

VISION = "vision_embeddings.vision_encoder."
# Ours -> Meta's, and the axis along which ranks share it.
TEXT_LAYER: dict[str, tuple[str, int | None]] = {
    "input_layernorm.weight": ("attention.wqkv.layer_norm_weight", None),
    "self_attn.o_proj.weight": ("attention.wo.weight", 1),
    "feed_forward.router.weight": ("feed_forward.router_DE", None),
    "feed_forward.shared_expert.gate_proj.weight": ("feed_forward.w_in_shared_FD.weight", 0),
    "feed_forward.shared_expert.up_proj.weight": ("feed_forward.w_swiglu_FD.weight", 0),
    "feed_forward.shared_expert.down_proj.weight": ("feed_forward.w_out_shared_DF.weight", 1),
    "feed_forward.down_proj.weight": ("feed_forward.mlp.fc2_weight", 1),
}
TOP: dict[str, tuple[str, int | None]] = {
    "model.embed_tokens.weight": ("tok_embeddings.weight", 0),
    "model.norm.weight": ("norm.weight", None),
    "lm_head.weight": ("output.weight", 0),
    "multi_modal_projector.linear_1.weight": ("vision_projection.weight", 0),
    "vision_model.vision_adapter.mlp.fc1.weight": ("vision_embeddings.vision_adapter.mlp.c_fc.weight", 0),
    "vision_model.vision_adapter.mlp.fc2.weight": ("vision_embeddings.vision_adapter.mlp.c_proj.weight", 1),
    "vision_model.class_embedding": (VISION + "class_embedding", None),
    "vision_model.positional_embedding_vlm": (VISION + "positional_embedding_vlm", None),
    "vision_model.patch_embedding.linear.weight": (VISION + "conv1._linear.weight", 0),
    **{
        f"vision_model.layernorm_{end}.{kind}": (f"{VISION}ln_{end}.{kind}", None)
        for end in ("pre", "post")
        for kind in ("weight", "bias")
    },
}
VISION_LAYER: dict[str, tuple[str, int | None]] = {
    **{f"self_attn.{p}_proj.{kind}": (f"attn.w{p}.{kind}", 0) for p in "qkv" for kind in ("weight", "bias")},
    "self_attn.o_proj.weight": ("attn.wo.weight", 1),
    "self_attn.o_proj.bias": ("attn.wo.bias", None),
    "mlp.fc1.weight": ("mlp.c_fc.weight", 0),
    "mlp.fc1.bias": ("mlp.c_fc.bias", 0),
    "mlp.fc2.weight": ("mlp.c_proj.weight", 1),
    "mlp.fc2.bias": ("mlp.c_proj.bias", None),
    **{f"input_layernorm.{kind}": (f"ln_1.{kind}", None) for kind in ("weight", "bias")},
    **{f"post_attention_layernorm.{kind}": (f"ln_2.{kind}", None) for kind in ("weight", "bias")},
}


def fp8_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """[expert, out, in] -> float8 of the same shape, and a scale for each row."""
    scale = (values.float().abs().amax(-1, keepdim=True) / 448).clamp(min=1e-12)
    return (values.float() / scale).to(torch.float8_e4m3fn), scale[..., 0]


def int4_groups(values: Tensor) -> tuple[Tensor, Tensor]:
    """[expert, out, in] -> bytes [expert, out, in / 2], and scales [expert, group, out]."""
    groups = values.float().unflatten(-1, (-1, GROUP))
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-6) / 8
    codes = (groups / scale).round().clamp(-8, 7).to(torch.int8).flatten(-2)
    return (codes[..., ::2] & 15) | (codes[..., 1::2] << 4), scale[..., 0].mT.contiguous()


class Ranks:
    """What each rank holds of a model."""

    def __init__(self, count: int, method: str | None = None, kept: tuple[int, ...] = ()):
        self.held: list[dict[str, Any]] = [{} for _ in range(count)]
        self.scales: list[Tensors] = [{} for _ in range(count)]
        self.count, self.method, self.kept = count, method, kept

    def add(self, name: str, tensor: Tensor, axis: int | None) -> None:
        """Gives each rank its share; all of it without an axis."""
        parts = [tensor] * self.count if axis is None else tensor.chunk(self.count, axis)
        for held, part in zip(self.held, parts, strict=True):
            held[name] = part.contiguous().clone()

    def add_stacked(self, name: str, parts: list[Tensor]) -> None:
        """Gives each rank its share of the rows of each part, the parts one after the other."""
        shares = [part.chunk(self.count) for part in parts]
        for rank, held in enumerate(self.held):
            held[name] = torch.cat([share[rank] for share in shares])

    def add_experts(self, layer: int, name: str, key: str, values: Tensor, axis: int) -> None:
        """Gives each rank its share of [expert, in, out], as a matrix, quantized by itself."""
        start = f"layers.{layer}.feed_forward.experts."
        for held, scales, part in zip(self.held, self.scales, values.chunk(self.count, axis), strict=True):
            if self.method and layer not in self.kept:
                packed, scale = (fp8_rows if self.method == "fp8" else int4_groups)(part.mT.contiguous())
                scales[start + key] = scale
                part = packed.mT.contiguous().view(torch.float8_e4m3fn)
            held[start + name] = part.flatten(0, 1).contiguous().clone()


def ranks_of(state: Tensors, count: int, method: str | None = None, kept: tuple[int, ...] = ()) -> Ranks:
    """Shares the tensors of a model out, under the names of the published files."""
    ranks = Ranks(count, method, kept)
    state = {name.removeprefix("language_model."): tensor for name, tensor in state.items()}
    for name, tensor in state.items():
        if name in TOP:
            ranks.add(TOP[name][0], tensor, TOP[name][1])
        elif found := re.fullmatch(r"vision_model\.model\.layers\.(\d+)\.(.+)", name):
            theirs, axis = VISION_LAYER[found[2]]
            ranks.add(f"{VISION}transformer.resblocks.{found[1]}.{theirs}", tensor, axis)
        elif found := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name):
            _add_of_layer(ranks, int(found[1]), found[2], state)
        else:
            raise KeyError(name)
    return ranks


def _add_of_layer(ranks: Ranks, layer: int, name: str, state: Tensors) -> None:
    start, tensor = f"layers.{layer}.", state[f"model.layers.{layer}.{name}"]
    if name == "self_attn.q_proj.weight":
        parts = [state[f"model.layers.{layer}.self_attn.{part}_proj.weight"] for part in "qkv"]
        ranks.add_stacked(start + "attention.wqkv.weight", parts)
    elif name == "feed_forward.gate_proj.weight":
        up = state[f"model.layers.{layer}.feed_forward.up_proj.weight"]
        ranks.add_stacked(start + "feed_forward.mlp.fc1_weight", [tensor, up])
    elif name == "feed_forward.experts.gate_up_proj":
        gate, up = tensor.chunk(2, dim=-1)
        ranks.add_experts(layer, "moe_w_in_eD_F", "w1", gate, 2)
        ranks.add_experts(layer, "moe_w_swiglu_eD_F", "w3", up, 2)
    elif name == "feed_forward.experts.down_proj":
        ranks.add_experts(layer, "moe_w_out_eF_D", "w2", tensor, 1)
    elif name == "post_attention_layernorm.weight":
        dense = f"model.layers.{layer}.feed_forward.gate_proj.weight" in state
        ranks.add(start + f"feed_forward.{'mlp.layer_norm_weight' if dense else 'norm.weight'}", tensor, None)
    elif name in TEXT_LAYER:
        theirs, axis = TEXT_LAYER[name]
        ranks.add(start + theirs, tensor.T if name.endswith("router.weight") else tensor, axis)


def params_of(model: HookedPreTrainedModel, rule: dict[str, Any], scales: bool) -> dict[str, Any]:
    """The settings of a model as params.json says them."""
    config, full = model.text.config, model.config
    rope = dict(config.rope_parameters or {})
    params = rule | {
        "dim": config.hidden_size, "n_layers": config.num_hidden_layers, "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads, "vocab_size": config.vocab_size, "norm_eps": config.rms_norm_eps,
        "attention_chunk_size": config.attention_chunk_size, "rope_theta": rope["rope_theta"],
        "use_scaled_rope": rope["rope_type"] == "llama3", "nope_layer_interval": 4, "use_qk_norm": config.use_qk_norm,
        "attn_temperature_tuning": config.attn_temperature_tuning, "floor_scale": float(config.floor_scale),
        "attn_scale": config.attn_scale,
    }  # fmt: skip
    if config.moe_layers:
        params["moe_args"] = {
            "num_experts": config.num_local_experts,
            "capacity_factor": 1.0,
            "auto_scale_F": scales,
            "top_k": config.num_experts_per_tok,
            "interleave_moe_layer_step": config.interleave_moe_layer_step,
        }
    vision = getattr(full, "vision_config", None)
    if vision is not None:
        params["vision_args"] = {
            "image_size": {"height": vision.image_size, "width": vision.image_size},
            "patch_size": {"height": vision.patch_size, "width": vision.patch_size},
            "dim": vision.hidden_size,
            "n_layers": vision.num_hidden_layers,
            "n_heads": vision.num_attention_heads,
            "mlp_ratio": vision.intermediate_size / vision.hidden_size,
            "output_dim": vision.vision_output_dim,
            "pixel_shuffle_ratio": vision.pixel_shuffle_ratio,
        }
    return params


@pytest.fixture(autouse=True)
def _a_small_vocabulary_has_an_image_token_too(monkeypatch):
    """Meta's format does not say which token stands for an image patch; the small models have another one."""
    monkeypatch.setattr("llama4lab.checkpoint.meta.settings.IMAGE_PATCH", 127)


@pytest.fixture
def write(tmp_path_factory) -> Write:
    """Writes a model: the number of ranks, how its experts are quantized, in which layers they are not, and whether
    there are notes of the training beside the tensors; settings of params.json may be changed.
    """

    def make(
        model: HookedPreTrainedModel,
        ranks: int = 1,
        method: str | None = None,
        kept: tuple[int, ...] = (),
        notes: bool = True,
        **changes: Any,
    ) -> Path:
        folder = tmp_path_factory.mktemp("meta")
        wide = model.text.config.hidden_size == WIDE["hidden_size"]
        shared = ranks_of(model.state_dict(), ranks, method, kept)
        for rank, (held, scales) in enumerate(zip(shared.held, shared.scales, strict=True)):
            if notes:
                held |= {"layers.0.attention.wo._extra_state": io.BytesIO(b"no use \xff"), "rope.freqs": torch.ones(3)}
            torch.save(held, folder / f"consolidated.{rank:02d}.pth")
            if method:
                torch.save(scales, folder / f"{method}_scales_{rank}.pt")
        params = params_of(model, WIDE_RULE if wide else RULE, scales=wide) | changes
        (folder / "params.json").write_text(json.dumps(params))
        return folder

    return make


@pytest.fixture(scope="session")
def small_text_model(new_text_model) -> Callable[..., HookedPreTrainedModel]:
    """A random text model whose widths Meta's rules can give."""
    return lambda **changes: new_text_model(**(SIZES | changes))


@pytest.fixture(scope="session")
def small_model(new_model) -> Callable[..., HookedPreTrainedModel]:
    """The same with vision, for up to four ranks."""
    return lambda **changes: new_model(**(SIZES | {"vision": {"num_attention_heads": 4}} | changes))


@pytest.fixture(scope="session")
def wide_model(new_model) -> Callable[..., HookedPreTrainedModel]:
    """A model with vision whose experts are wide enough for groups of 128 in two ranks."""
    return lambda **changes: new_model(**(WIDE | changes))


@pytest.fixture(scope="session")
def experts_of() -> Callable[[HookedPreTrainedModel, int], Any]:
    """The routed experts of a layer."""
    return lambda model, layer: model.text.get_submodule(f"layers.{layer}.feed_forward.experts")


@pytest.fixture(scope="module")
def whole(new_text_model) -> HookedPreTrainedModel:
    """A model of two layers."""
    return new_text_model(intermediate_size=88, intermediate_size_mlp=176, num_hidden_layers=2)


@pytest.fixture
def folder(write, whole) -> Path:
    """A checkpoint of two ranks that nothing is wrong with yet."""
    return write(whole, 2)
