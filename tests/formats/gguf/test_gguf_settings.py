"""Settings of GGUF checkpoints: what the file says, what llama.cpp takes for granted, and what a config.json adds."""

import json
import math
from typing import Any

import pytest
import torch
from transformers import Llama4TextConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from typer.testing import CliRunner

import llama4lab as lab
from llama4lab.checkpoint.gguf.rope_factors import implied_factors
from llama4lab.checkpoint.gguf.settings import gguf_config
from llama4lab.cli import app

AS_PUBLISHED = {"attention_chunk_size": 8192, "floor_scale": 8192, "attn_scale": 0.1}
SCALED = {"rope_type": "llama3", "rope_theta": 500000.0, "original_max_position_embeddings": 8192}
SCOUT = SCALED | {"factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0}
EARLY = SCALED | {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.fixture
def with_rope(new_text_model, write_gguf, gguf_saved, tmp_path):
    """A checkpoint without config.json, with a tensor of RoPE factors."""

    def save(factors, **options):
        model = new_text_model(head_dim=128, **AS_PUBLISHED, **options)
        model.rope_freqs = torch.nn.Linear(len(factors), 1, bias=False)
        model.rope_freqs.weight.data = torch.tensor(factors)
        return gguf_saved(model, "F32", config=False, folder=tmp_path)

    return save


@pytest.mark.parametrize("changes", [{}, {"num_experts_per_tok": 2}, {"interleave_moe_layer_step": 1}])
def test_the_settings_of_a_published_model_need_no_config(gguf_saved, new_text_model, random_ids, changes):
    model = new_text_model(**AS_PUBLISHED, **changes)
    loaded = lab.load(gguf_saved(model, "F32", config=False))
    told = {"bos_token_id", "pad_token_id", "dtype", "_name_or_path", "architectures", "transformers_version"}
    ours, theirs = ({k: v for k, v in each.config.to_dict().items() if k not in told} for each in (loaded, model))
    assert ours == theirs
    ids = random_ids(2, 30)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_model_of_128_experts_has_no_norms_of_queries(gguf_saved, new_text_model):
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_local_experts": 128}
    config = gguf_config(gguf_saved(new_text_model(**small), "F32", config=False))
    assert isinstance(config, Llama4TextConfig)
    assert config.use_qk_norm is False


def test_settings_of_the_vision_tower_need_no_config(gguf_saved, new_model):
    model = new_model(**AS_PUBLISHED)
    tokens = [f"token{number}" for number in range(128)]
    tokens[100:103] = ["<|image_start|>", "<|image_end|>", "<|patch|>"]
    loaded = lab.load(gguf_saved(model, "F32", config=False, **{"tokenizer.ggml.tokens": tokens}))
    config: Any = loaded.config
    assert config.vision_config.to_dict() == model.config.vision_config.to_dict() | {"dtype": "float32"}
    assert (config.boi_token_index, config.eoi_token_index, config.image_token_index) == (100, 101, 102)


@pytest.mark.parametrize("rope", [SCOUT, EARLY])
def test_factors_of_rope_are_those_of_known_settings(with_rope, rope):
    factors = implied_factors(rope, 128)
    assert min(factors) == 1
    assert max(factors) == rope["factor"]
    assert gguf_config(with_rope(factors)).rope_parameters == rope


def test_factors_of_rope_are_those_of_transformers():
    for rope in (SCOUT, EARLY):
        config = Llama4TextConfig(head_dim=128, hidden_size=512, num_attention_heads=4, rope_parameters=rope)
        scaled = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0]
        plain = 500000.0 ** -(torch.arange(0, 128, 2) / 128)
        torch.testing.assert_close(plain / scaled, torch.tensor(implied_factors(rope, 128)), rtol=1e-5, atol=0)


def test_factors_of_rope_that_follow_from_no_settings_are_refused(with_rope):
    factors = implied_factors(SCOUT, 128)
    factors[40] = 3.5
    with pytest.raises(
        ValueError, match=r"model.gguf: rope_freqs.weight cannot be understood: they differ by .*factor 16"
    ):
        gguf_config(with_rope(factors))


def test_factors_of_rope_must_be_those_of_config_json(with_rope, text_config):
    file = with_rope(implied_factors(SCOUT, 128))
    text_config(head_dim=128, rope_parameters=SCOUT).save_pretrained(file.parent)
    assert gguf_config(file).rope_parameters == SCOUT
    text_config(head_dim=128).save_pretrained(file.parent)
    with pytest.raises(ValueError, match=r"factors of RoPE differ by 15 from those that config\.json"):
        gguf_config(file)


def test_factors_of_rope_that_are_missing_contradict_a_scaled_config(gguf_saved, new_text_model, text_config):
    file = gguf_saved(new_text_model(), "F32", config=False)
    text_config(rope_parameters=SCOUT).save_pretrained(file.parent)
    with pytest.raises(ValueError, match="factors of RoPE differ"):
        gguf_config(file)


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_key_value_heads", 4), ("rms_norm_eps", 1e-6), ("num_experts_per_tok", 3), ("num_local_experts", 8)],
)
def test_a_config_that_says_something_else_is_refused(gguf_saved, new_text_model, key, value):
    file = gguf_saved(new_text_model(), "F32")
    document = json.loads((file.parent / "config.json").read_text()) | {key: value}
    (file.parent / "config.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=rf"model.gguf says {key} .* config.json beside it says"):
        lab.load(file)


def test_a_config_with_another_base_of_rope_is_refused(gguf_saved, new_text_model, text_config):
    file = gguf_saved(new_text_model(), "F32")
    text_config(rope_parameters={"rope_type": "default", "rope_theta": 10000.0}).save_pretrained(file.parent)
    with pytest.raises(ValueError, match=r"base of RoPE is 500000; config.json says 10000"):
        lab.load(file)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("llama4.nextn_predict_layers", 1, "computes only 0"),
        ("llama4.attention.sliding_window", 0, "computes only 8192"),
        ("llama4.attention.sliding_window_pattern", 2, "computes only 4"),
        ("llama4.expert_gating_func", 1, "computes only 2"),
        ("llama4.expert_weights_norm", True, "computes only False"),
        ("llama4.rope.scaling.type", "yarn", "computes only 'none'"),
        ("llama4.logit_scale", 2.0, "settings that llama4lab does not know: llama4.logit_scale"),
        ("llama4.attention.value_length", 8, "heads are 16 wide"),
        ("llama4.rope.freq_base_swa", 10000.0, "is another than"),
        ("llama4.block_count", "five", "expected int"),
        ("llama4.block_count", 3, "tensors that the model does not have"),
        ("llama4.block_count", 2**31, "num_hidden_layers is 2147483648"),
        ("llama4.embedding_length", 0, "hidden_size is 0"),
        ("llama4.attention.layer_norm_rms_epsilon", 2.0, "rms_norm_eps is 2.0"),
        ("llama4.attention.layer_norm_rms_epsilon", math.nan, "rms_norm_eps is nan"),
        ("llama4.expert_used_count", 9, "num_experts_per_tok is 9"),
        ("llama4.attention.head_count", 3, "num_key_value_heads is 2"),
        ("llama4.attention.head_count", 0, "num_attention_heads is 0"),
        ("llama4.attention.head_count", [4, 4], "expected int"),
        ("llama4.expert_shared_feed_forward_length", 7, "is another than that of experts"),
    ],
)
def test_settings_that_are_wrong_are_refused(gguf_saved, new_text_model, key, value, message):
    file = gguf_saved(new_text_model(), "F32", config=False, **{key: value})
    with pytest.raises(ValueError, match=message) as error:
        lab.load(file)
    assert str(file) in str(error.value)
    assert len(str(error.value).splitlines()) <= 3


def test_a_file_of_another_architecture_is_refused(tmp_path, write_gguf):
    write_gguf(tmp_path / "mmproj.gguf", {"a": torch.ones(4)}, {"clip.projector_type": "llama4"}, lambda name: "F32")
    (tmp_path / "mmproj.gguf").rename(tmp_path / "model.gguf")
    with pytest.raises(ValueError, match=r"general\.architecture is 'clip'; llama4lab opens 'llama4' only"):
        lab.load(tmp_path / "model.gguf")


def test_the_vision_tower_of_another_model_is_refused(gguf_saved, new_text_model, write_gguf):
    file = gguf_saved(new_text_model(), "F32", config=False)
    metadata = {"clip.projector_type": "pixtral"}
    write_gguf(file.parent / "mmproj-x.gguf", {"a": torch.ones(4)}, metadata, lambda name: "F32")
    with pytest.raises(ValueError, match=r"mmproj-x.gguf is no vision tower of a Llama 4: its projector is 'pixtral'"):
        lab.load(file)


def test_info_tells_what_a_file_is_made_of(packed_file):
    told = CliRunner().invoke(app, ["info", str(packed_file("mixed"))])
    assert told.exit_code == 0
    for kind in ("Q4_K", "Q6_K", "IQ2_XXS", "Q5_0", "IQ4_XS", "MXFP4"):
        assert f"GGUF {kind}" in told.output
    assert "stacked experts, in 1 file" in told.output
