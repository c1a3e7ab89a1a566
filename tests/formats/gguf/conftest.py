"""Small GGUF checkpoints, written with the gguf package: whole, split, with a vision tower, in every type of blocks."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter
from torch import Tensor
from transformers import Llama4Config

PLAIN = {"F32": np.float32, "F16": np.float16}
# Where the float16 scales of random blocks are put; of the other types the library writes the blocks itself.
SCALES = {
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ2_XXS": (0,), "IQ2_XS": (0,),
    "IQ2_S": (0,), "IQ3_XXS": (0,), "IQ3_S": (0,), "IQ1_S": (0,), "IQ4_NL": (0,), "IQ4_XS": (0,), "Q1_0": (0,),
}  # fmt: skip
DECODABLE = [
    kind.name
    for kind in Kind
    if kind.name not in ("F32", "F16", "F64", "I8", "I16", "I32", "I64", "BF16") and kind.name not in ("Q8_1", "Q8_K")
]
# Rows are whole numbers of the largest blocks, 256.
BIG: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "intermediate_size_mlp": 512, "head_dim": 64}
BIG |= {"num_hidden_layers": 2, "num_local_experts": 4, "interleave_moe_layer_step": 2, "no_rope_layers": [1, 0]}

WORDS = {
    "rope_freqs": "rope_freqs", "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "vision_model.class_embedding": "v.class_embd", "vision_model.positional_embedding_vlm": "v.position_embd.weight",
    "vision_model.patch_embedding.linear": "v.patch_embd", "vision_model.layernorm_pre": "v.pre_ln",
    "vision_model.layernorm_post": "v.post_ln", "vision_model.vision_adapter.mlp.fc1": "mm.model.mlp.1",
    "vision_model.vision_adapter.mlp.fc2": "mm.model.mlp.2", "multi_modal_projector.linear_1": "mm.model.fc",
}  # fmt: skip
TEXT = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "feed_forward.router": "ffn_gate_inp", "feed_forward.gate_proj": "ffn_gate", "feed_forward.up_proj": "ffn_up",
    "feed_forward.down_proj": "ffn_down", "feed_forward.shared_expert.gate_proj": "ffn_gate_shexp",
    "feed_forward.shared_expert.up_proj": "ffn_up_shexp", "feed_forward.shared_expert.down_proj": "ffn_down_shexp",
}  # fmt: skip
VISION = {
    "input_layernorm": "ln1", "post_attention_layernorm": "ln2", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_out", "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}  # fmt: skip

KindOf = Callable[[str], str]


def gguf_state(model: torch.nn.Module) -> dict[str, Tensor]:
    """The weights of a model under the names of GGUF, experts split and turned as llama.cpp's converter does."""
    made: dict[str, Tensor] = {}
    for full, tensor in model.state_dict().items():
        name = full.removeprefix("language_model.")
        bank = re.fullmatch(r"model\.layers\.(\d+)\.feed_forward\.experts\.(gate_up|down)_proj", name)
        layer = re.fullmatch(r"(vision_model\.)?model\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if bank:
            parts = tensor.mT.chunk(2, dim=1) if bank[2] == "gate_up" else [tensor.mT]
            for part, own in zip(bank[2].split("_"), parts, strict=True):
                made[f"blk.{bank[1]}.ffn_{part}_exps.weight"] = own.contiguous()
        elif layer:
            short = (VISION if layer[1] else TEXT)[layer[3]]
            made[f"{'v.' if layer[1] else ''}blk.{layer[2]}.{short}.{layer[4]}"] = tensor
        elif name in WORDS:
            made[WORDS[name]] = tensor
        else:
            base, _, end = name.rpartition(".")
            made[f"{WORDS[base]}.{end}"] = tensor
    return made


def random_blocks(shape: tuple[int, ...], kind: str, seed: int = 0) -> np.ndarray:
    """Valid blocks of numbers about 0.15 large; no library encodes these types."""
    number = Kind[kind]
    _, size = gguf.GGML_QUANT_SIZES[number]
    random = np.random.default_rng(seed)
    made = random.integers(0, 256, (*gguf.quant_shape_to_byte_shape(shape, number),), dtype=np.uint8)
    blocks = made.reshape(-1, size)
    for scale in (1.0, None):
        if scale is None:
            scale = 0.15 / gguf.quants.dequantize(blocks, number).std()
        values = (scale * random.uniform(0.5, 1.5, len(blocks))).astype(np.float16)
        if kind == "IQ1_M":  # four bits of the scale at the end of each of four words
            words = blocks[:, -8:].view(np.uint16)
            bits = values.view(np.uint16)[:, None] >> np.array([0, 4, 8, 12], dtype=np.uint16)
            words[:] = words & 0x0FFF | (bits & 0xF) << 12
        elif kind == "NVFP4":
            blocks[:, :4] = random.integers(8, 24, (len(blocks), 4))
        for offset in SCALES.get(kind, ()):
            blocks[:, offset : offset + 2] = values[:, None].view(np.uint8)
    return made


def packed(values: np.ndarray, kind: str) -> np.ndarray:
    """Numbers in a type: encoded by the gguf package, or random ones where it cannot."""
    try:
        return gguf.quants.quantize(values, Kind[kind])
    except NotImplementedError:
        return random_blocks(values.shape, kind, seed=values.size)


def text_metadata(config: Any) -> dict[str, Any]:
    """What llama.cpp's converter writes of a text model."""
    said = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size_mlp,
        "expert_feed_forward_length": config.intermediate_size,
        "expert_count": config.num_local_experts,
        "expert_used_count": config.num_experts_per_tok,
        "interleave_moe_layer_step": config.interleave_moe_layer_step,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "vocab_size": config.vocab_size,
    }
    return {f"llama4.{key}": value for key, value in said.items()}


def vision_metadata(config: Any, width: int) -> dict[str, Any]:
    """What llama.cpp's converter writes of a vision tower."""
    said = {
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "projection_dim": width,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "attention.layer_norm_epsilon": float(config.norm_eps),
        "projector.scale_factor": round(1 / config.pixel_shuffle_ratio),
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    top = {"has_vision_encoder": True, "use_gelu": True, "projector_type": "llama4"}
    return {f"clip.vision.{key}": value for key, value in said.items()} | {f"clip.{k}": v for k, v in top.items()}


def write_file(
    file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], kind_of: KindOf, most: int = 0
) -> None:
    """Writes one GGUF file, or several of at most so many tensors."""
    architecture = "clip" if "clip.projector_type" in metadata else "llama4"
    writer = GGUFWriter(file, architecture, split_max_tensors=most)
    for key, value in metadata.items():
        if key != "general.architecture":
            _add(writer, key, value)
    for name, tensor in tensors.items():
        values, kind = tensor.detach().float().numpy(), kind_of(name)
        values = values.reshape(-1) if name == "rope_freqs.weight" else values
        if kind in PLAIN:
            writer.add_tensor(name, values.astype(PLAIN[kind]))
        else:
            writer.add_tensor(name, packed(np.ascontiguousarray(values), kind), raw_dtype=Kind[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    add[list] = writer.add_array
    add[type(value)](key, value)


def usual_kind(linear: str) -> KindOf:
    """As llama.cpp does: matrices in one type, norms, biases and the router in float32, vision in bfloat16."""

    def kind_of(name: str) -> str:
        if re.search(r"norm|ffn_gate_inp|\.bias$|ln|class_embd|scale", name):
            return "F32"
        return "BF16" if name.startswith(("v.", "mm.")) else linear

    return kind_of


@pytest.fixture(scope="session")
def gguf_saved(new_text_model, tmp_path_factory):
    """Writes a model as `model.gguf`, with vision as `mmproj.gguf` beside it, and the config; gives `model.gguf`."""

    def save(
        model: Any,
        kind_of: KindOf | str = "Q8_0",
        *,
        folder: Path | None = None,
        config: bool = True,
        most: int = 0,
        change: Callable[[dict[str, Tensor]], Any] = lambda state: None,
        **metadata: Any,
    ) -> Path:
        folder = folder or tmp_path_factory.mktemp("gguf")
        kind_of = usual_kind(kind_of) if isinstance(kind_of, str) else kind_of
        state = gguf_state(model)
        change(state)
        whole: Any = model.config
        text: Any = whole.text_config if isinstance(whole, Llama4Config) else whole
        of_vision = ("v.", "mm.") if isinstance(whole, Llama4Config) else ()
        own = {name: each for name, each in state.items() if not name.startswith(of_vision)}
        write_file(folder / "model.gguf", own, text_metadata(text) | metadata, kind_of, most)
        if isinstance(whole, Llama4Config):
            seen = {name: each for name, each in state.items() if name not in own}
            write_file(folder / "mmproj.gguf", seen, vision_metadata(whole.vision_config, text.hidden_size), kind_of)
        if config:
            whole.save_pretrained(folder)
        return next(file for file in sorted(folder.glob("model*.gguf")))

    return save


@pytest.fixture(scope="session", params=DECODABLE)
def kind(request) -> str:
    """Each type of blocks that the gguf package decodes."""
    try:
        gguf.quants.dequantize(
            np.zeros((1, gguf.GGML_QUANT_SIZES[Kind[request.param]][1]), np.uint8), Kind[request.param]
        )
    except NotImplementedError:
        pytest.skip(f"this gguf does not decode {request.param}")
    return request.param


@pytest.fixture(scope="session")
def blocks() -> Callable[..., np.ndarray]:
    """Makes the bytes of random numbers in a type of blocks."""

    def make(kind: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
        values = np.random.default_rng(seed).normal(0, 0.15, shape).astype(np.float32)
        return packed(values, kind)

    return make


@pytest.fixture(scope="session")
def packed_file(gguf_saved, new_text_model) -> Callable[[str], Path]:
    """A checkpoint whose matrices are in one type, with a dense and an MoE layer; `"mixed"` has several types."""
    made: dict[str, Path] = {}

    def save(kind: str) -> Path:
        if kind not in made:
            usual = usual_kind("Q4_K")
            mixed = {"ffn_down_exps": "Q6_K", "ffn_gate_exps": "IQ2_XXS", "token_embd": "Q8_0", "attn_v": "F16"}
            mixed |= {"attn_k": "BF16", "output.": "Q5_0", "ffn_down.": "IQ4_XS", "shexp": "MXFP4"}

            def kind_of(name: str) -> str:
                return next((own for part, own in mixed.items() if part in name), usual(name))

            made[kind] = gguf_saved(new_text_model(**BIG), kind_of if kind == "mixed" else kind)
        return made[kind]

    return save


@pytest.fixture(scope="session")
def sizes() -> dict[str, Any]:
    """Sizes of a model whose rows are whole numbers of the largest blocks; layer 0 is dense, layer 1 has experts."""
    return BIG


@pytest.fixture(scope="session")
def write_gguf() -> Callable[..., None]:
    """Writes one GGUF file of given tensors and settings."""
    return write_file
