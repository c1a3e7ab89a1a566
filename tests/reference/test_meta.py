"""Logits beside those of Meta's own code (the packages of the extra `reference`) on the same random weights.

Whole passes only: with its cache, Meta's code attends across chunks as soon as a pass has one token. It is written for
GPUs and model parallelism; here it runs as one process on a CPU, `.cuda()` being the identity.
"""

import re

import pytest
import torch

REASON = "needs the extra `reference`"
parallel = pytest.importorskip("fairscale.nn.model_parallel.initialize", reason=REASON, exc_type=ImportError)
args = pytest.importorskip("llama_models.llama4.args", reason=REASON, exc_type=ImportError)
meta = pytest.importorskip("llama_models.llama4.model", reason=REASON, exc_type=ImportError)
datatypes = pytest.importorskip("llama_models.llama4.datatypes", reason=REASON, exc_type=ImportError)

# Sizes that Meta's rules for the widths of the MLPs can give: 8 / 3 of the residual stream, rounded up to 8.
SIZES = {"intermediate_size": 88, "intermediate_size_mlp": 176}
SCOUT_ROPE = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 16.0, "low_freq_factor": 1.0}
SCOUT_ROPE |= {"high_freq_factor": 1.0, "original_max_position_embeddings": 8192}
LENGTHS = (1, 5, 8, 9, 40, 130)
CONFIGS = [
    {"attn_temperature_tuning": False},
    {"attn_temperature_tuning": True, "use_qk_norm": False},
    {"attn_temperature_tuning": True, "rope_parameters": SCOUT_ROPE},
    {"attn_temperature_tuning": False, "interleave_moe_layer_step": 1, "num_experts_per_tok": 2},
    {"attn_temperature_tuning": True, "attention_chunk_size": None, "num_key_value_heads": 4},
]
# Where Meta's code can run (with temperature its queries become float32) and adds in the order of transformers:
# two experts it adds one after the other to the shared expert, with a rounding each.
BFLOAT16_CONFIGS = [
    {"attn_temperature_tuning": False, "interleave_moe_layer_step": step, "rope_parameters": rope}
    for step, rope in ((2, SCOUT_ROPE), (1, {"rope_type": "default", "rope_theta": 500000.0}))
]

# Our names -> Meta's.
NAMES = {
    r"model\.embed_tokens\.(.+)": r"tok_embeddings.\1",
    r"model\.norm\.(.+)": r"norm.\1",
    r"lm_head\.(.+)": r"output.\1",
    r"model\.layers\.(\d+)\.self_attn\.(.)_proj\.(.+)": r"layers.\1.attention.w\2.\3",
    r"model\.layers\.(\d+)\.input_layernorm\.(.+)": r"layers.\1.attention_norm.\2",
    r"model\.layers\.(\d+)\.post_attention_layernorm\.(.+)": r"layers.\1.ffn_norm.\2",
    r"model\.layers\.(\d+)\.feed_forward\.(shared_expert\.)?gate_proj\.(.+)": r"layers.\1.feed_forward.\2w1.\3",
    r"model\.layers\.(\d+)\.feed_forward\.(shared_expert\.)?up_proj\.(.+)": r"layers.\1.feed_forward.\2w3.\3",
    r"model\.layers\.(\d+)\.feed_forward\.(shared_expert\.)?down_proj\.(.+)": r"layers.\1.feed_forward.\2w2.\3",
    r"model\.layers\.(\d+)\.feed_forward\.experts\.down_proj": r"layers.\1.feed_forward.experts.w2",
}
VISION = "vision_embeddings.vision_encoder."
VISION_NAMES = {
    r"vision_model\.patch_embedding\.linear\.(.+)": VISION + r"conv1._linear.\1",
    r"vision_model\.(class_embedding|positional_embedding_vlm)": VISION + r"\1",
    r"vision_model\.layernorm_(pre|post)\.(.+)": VISION + r"ln_\1.\2",
    r"vision_model\.model\.layers\.(\d+)\.self_attn\.(.)_proj\.(.+)": VISION + r"transformer.resblocks.\1.attn.w\2.\3",
    r"vision_model\.model\.layers\.(\d+)\.input_layernorm\.(.+)": VISION + r"transformer.resblocks.\1.ln_1.\2",
    r"vision_model\.model\.layers\.(\d+)\.post_attention_layernorm\.(.+)": VISION + r"transformer.resblocks.\1.ln_2.\2",
    r"vision_model\.model\.layers\.(\d+)\.mlp\.fc1\.(.+)": VISION + r"transformer.resblocks.\1.mlp.c_fc.\2",
    r"vision_model\.model\.layers\.(\d+)\.mlp\.fc2\.(.+)": VISION + r"transformer.resblocks.\1.mlp.c_proj.\2",
    r"vision_model\.vision_adapter\.mlp\.fc1\.(.+)": r"vision_embeddings.vision_adapter.mlp.c_fc.\1",
    r"vision_model\.vision_adapter\.mlp\.fc2\.(.+)": r"vision_embeddings.vision_adapter.mlp.c_proj.\1",
    r"multi_modal_projector\.linear_1\.(.+)": r"vision_projection.\1",
}


def renamed(name: str) -> str:
    name = name.removeprefix("language_model.")
    for pattern, other in (NAMES | VISION_NAMES).items():
        if re.fullmatch(pattern, name):
            return re.sub(pattern, other, name)
    raise KeyError(name)


def converted(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    result = {}
    for name, value in weights.items():
        start, found, _ = name.removeprefix("language_model.model.").removeprefix("model.").partition("feed_forward.")
        if name.endswith("router.weight"):
            result[start + found + "router_DE"] = value.T
        elif name.endswith("experts.gate_up_proj"):
            gate, up = value.chunk(2, dim=-1)
            result |= {start + found + "experts.w1": gate, start + found + "experts.w3": up}
        else:
            result[renamed(name)] = value
    return result


def arguments(config, vision) -> dict:
    """The settings of Meta's model for a text config and a vision config of ours."""
    rope = config.rope_parameters
    settings = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
        "multiple_of": 8,
        "ffn_dim_multiplier": 1.0,
        "ffn_exp": 2.0,
        "attention_chunk_size": config.attention_chunk_size,
        "rope_theta": rope["rope_theta"],
        "use_scaled_rope": rope["rope_type"] == "llama3",
        "rope_scaling_factor": rope.get("factor"),
        "rope_high_freq_factor": rope.get("high_freq_factor"),
        "nope_layer_interval": 4,
        "use_qk_norm": config.use_qk_norm,
        "attn_temperature_tuning": config.attn_temperature_tuning,
        "floor_scale": config.floor_scale,
        "attn_scale": config.attn_scale,
        "max_batch_size": 4,
        "max_seq_len": 160,
        "moe_args": {
            "num_experts": config.num_local_experts,
            "top_k": config.num_experts_per_tok,
            "interleave_moe_layer_step": config.interleave_moe_layer_step,
            "auto_scale_F": False,
        },
    }
    if vision is not None:
        settings["vision_args"] = {
            "image_size": {"height": vision.image_size, "width": vision.image_size},
            "patch_size": {"height": vision.patch_size, "width": vision.patch_size},
            "dim": vision.hidden_size,
            "n_layers": vision.num_hidden_layers,
            "n_heads": vision.num_attention_heads,
            "mlp_ratio": vision.intermediate_size / vision.hidden_size,
            "output_dim": vision.vision_output_dim,
            "pixel_shuffle_ratio": vision.pixel_shuffle_ratio,
        }
    return settings


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """A process group of this process alone."""
    store = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    parallel.initialize_model_parallel(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "cuda", lambda self, *_, **__: self)
        yield
    parallel.destroy_model_parallel()
    torch.distributed.destroy_process_group()


@pytest.fixture
def of_meta(one_process):
    """Gives Meta's model with the weights and settings of one of ours."""

    def make(model):
        vision = getattr(model.config, "vision_config", None)
        settings = args.ModelArgs(**arguments(model.text.config, vision))
        # Its vision encoder is bfloat16 whatever was asked for.
        other = meta.Transformer(settings).to(model.dtype).eval()
        other.load_state_dict(converted(model.state_dict()), strict=True)
        return other

    return make


def logits_of(model, ids: torch.Tensor, image=None) -> torch.Tensor:
    return model(datatypes.TransformerInput(tokens=ids, tokens_position=0, image_embedding=image)).logits


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["auto", "eager", "sdpa"])
@pytest.mark.parametrize("changes", CONFIGS, ids=str)
def test_text_logits_equal_those_of_meta(changes, kernel, of_meta, new_text_model, random_ids):
    ours = new_text_model(**SIZES, **changes)
    theirs = of_meta(ours)
    ours.attn = kernel
    for length in LENGTHS:
        ids = random_ids(2, length, seed=length)
        expected, logits = logits_of(theirs, ids), ours(ids).logits
        torch.testing.assert_close(logits, expected, atol=2e-5, rtol=0)
        assert torch.equal(logits.argmax(-1), expected.argmax(-1))


@torch.no_grad()
@pytest.mark.parametrize("changes", BFLOAT16_CONFIGS, ids=str)
def test_bfloat16_text_logits_equal_those_of_meta_to_the_bit(changes, of_meta, new_text_model, random_ids):
    ours = new_text_model(dtype=torch.bfloat16, **SIZES, **changes)
    theirs = of_meta(ours)
    ours.attn = "sdpa"
    for length in LENGTHS:
        ids = random_ids(2, length, seed=length)
        assert torch.equal(ours(ids).logits.float(), logits_of(theirs, ids))


@torch.no_grad()
@pytest.mark.parametrize("rows", [[[1]], [[3], [1, 2]], [[2, 1], [3]]], ids=str)
def test_logits_of_text_and_images_equal_those_of_meta(rows, of_meta, new_model, image_batch):
    ours = new_model(**SIZES)
    theirs = of_meta(ours)
    batch = image_batch(rows)
    batch["input_ids"][batch["attention_mask"] == 0] = 5  # Meta's code knows no padding
    batch["attention_mask"][:] = 1
    ids, tiles = batch["input_ids"], iter(batch["pixel_values"].split([n for row in rows for n in row]))
    images = [[next(tiles) for _ in row] for row in rows]
    mask = (ids == 127).unsqueeze(-1)
    embedded = theirs.vision_embeddings(images, mask, torch.zeros(*ids.shape, 40))
    image = datatypes.MaskedEmbedding(embedding=embedded, mask=mask)
    torch.testing.assert_close(ours(**batch).logits, logits_of(theirs, ids, image), atol=2e-5, rtol=0)


@torch.no_grad()
def test_the_vision_tower_equals_that_of_meta(of_meta, new_model):
    ours = new_model(**SIZES)
    theirs = of_meta(ours)
    pixels = torch.randn(3, 3, 24, 24)
    encoder, adapter = theirs.vision_embeddings.vision_encoder, theirs.vision_embeddings.vision_adapter
    torch.testing.assert_close(
        ours.vision(pixels), adapter(encoder(pixels.unsqueeze(1).unsqueeze(1))), atol=1e-5, rtol=0
    )


@torch.no_grad()
def test_decoding_with_our_cache_equals_the_whole_pass_of_meta(of_meta, new_text_model, random_ids):
    """D1: not Meta's own decoding, which is wrong behind the first chunk."""
    ours = new_text_model(**SIZES)
    theirs = of_meta(ours)
    ids = random_ids(2, 30)
    cache = ours(ids[:, :5], use_cache=True).cache
    steps = [ours(ids[:, at : at + 1], cache=cache).logits for at in range(5, 30)]
    torch.testing.assert_close(torch.cat(steps, 1), logits_of(theirs, ids)[:, 5:], atol=2e-5, rtol=0)
