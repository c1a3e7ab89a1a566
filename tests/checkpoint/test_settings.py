import json
import warnings
from pathlib import Path

import pytest
from transformers import Llama4Config, Llama4TextConfig

from llama4lab.checkpoint.settings import read_config

TEXT = {
    "_attn_implementation_autoset": True,
    "attention_bias": False,
    "attention_chunk_size": 8192,
    "attention_dropout": 0.0,
    "bos_token_id": 200000,
    "eos_token_id": [200001, 200007, 200008],
    "for_llm_compressor": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "initializer_range": 0.02,
    "interleave_moe_layer_step": 1,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "max_position_embeddings": 262144,
    "model_type": "llama4_text",
    "no_rope_layers": [],
    "num_attention_heads": 40,
    "num_experts_per_tok": 1,
    "num_hidden_layers": 48,
    "num_key_value_heads": 8,
    "num_local_experts": 16,
    "output_router_logits": False,
    "pad_token_id": 200018,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_qk_norm": True,
    "vocab_size": 202048,
}
VISION = {
    "_attn_implementation_autoset": True,
    "attention_dropout": 0.0,
    "hidden_act": "gelu",
    "hidden_size": 1408,
    "image_size": 336,
    "initializer_range": 0.02,
    "intermediate_size": 5632,
    "model_type": "llama4_vision_model",
    "multi_modal_projector_bias": False,
    "norm_eps": 1e-05,
    "num_attention_heads": 16,
    "num_channels": 3,
    "num_hidden_layers": 34,
    "patch_size": 14,
    "pixel_shuffle_ratio": 0.5,
    "projector_dropout": 0.0,
    "projector_input_dim": 4096,
    "projector_output_dim": 4096,
    "rope_theta": 10000,
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
    "vision_output_dim": 4096,
}
WHOLE = {
    "architectures": ["Llama4ForConditionalGeneration"],
    "boi_token_index": 200080,
    "eoi_token_index": 200081,
    "image_token_index": 200092,
    "model_type": "llama4",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
}
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "original_max_position_embeddings": 8192}
SCOUT = {
    "attn_scale": 0.1,
    "attn_temperature_tuning": 4,
    "floor_scale": 8192,
    "moe_layers": list(range(48)),
    "no_rope_layers": [1, 1, 1, 0] * 12,
    "rope_scaling": LLAMA3 | {"factor": 16.0, "high_freq_factor": 1.0},
    "max_position_embeddings": 10485760,
}
MAVERICK = {
    "interleave_moe_layer_step": 2,
    "max_position_embeddings": 1048576,
    "moe_layers": list(range(1, 48, 2)),
    "num_local_experts": 128,
    "use_qk_norm": False,
}
GUARD = {"attention_chunk_size": None, "moe_layers": [], "interleave_moe_layer_step": 0, "num_local_experts": 0}


def written(folder, text, vision=None, **whole):
    document = WHOLE | {"text_config": text, "vision_config": vision or VISION} | whole
    (folder / "config.json").write_text(json.dumps(document))
    return folder


def text_of(folder: Path) -> Llama4TextConfig:
    config = read_config(folder)
    assert isinstance(config, Llama4Config)
    assert isinstance(config.text_config, Llama4TextConfig)
    return config.text_config


@pytest.mark.parametrize("published", [SCOUT, MAVERICK, GUARD], ids=["Scout", "Maverick", "Llama Guard 4"])
def test_published_configs_are_read(tmp_path, published):
    text = text_of(written(tmp_path, TEXT | published))
    assert text.hidden_size == 5120
    assert text.attn_temperature_tuning is True
    assert text.attention_chunk_size == published.get("attention_chunk_size", 8192)
    assert text.moe_layers == published["moe_layers"]
    assert text.no_rope_layers == [1, 1, 1, 0] * 12
    rope = dict(text.rope_parameters or {})
    assert rope["rope_theta"] == 500000.0
    assert rope.get("factor") == (16.0 if published is SCOUT else None)


def test_a_config_without_vision_is_that_of_its_text_model(tmp_path):
    document = {key: value for key, value in WHOLE.items() if key != "vision_config"} | {"text_config": TEXT | SCOUT}
    (tmp_path / "config.json").write_text(json.dumps(document))
    config = read_config(tmp_path)
    assert isinstance(config, Llama4TextConfig)
    assert config.num_local_experts == 16
    (tmp_path / "config.json").write_text(json.dumps(document | {"image_token": 1}))
    with pytest.raises(ValueError, match="image_token"):
        read_config(tmp_path)


def test_the_scaling_of_early_scout_conversions_is_used_with_a_warning(tmp_path):
    text = TEXT | SCOUT | {"rope_scaling": LLAMA3 | {"factor": 8.0, "high_freq_factor": 4.0}}
    with pytest.warns(UserWarning, match="rope_scaling is 8 / 4 .* with 16 experts"):
        config = text_of(written(tmp_path, text))
    assert dict(config.rope_parameters or {})["factor"] == 8.0


def test_the_same_scaling_with_other_experts_does_not_warn(tmp_path):
    text = TEXT | MAVERICK | {"rope_scaling": LLAMA3 | {"factor": 8.0, "high_freq_factor": 4.0}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_config(written(tmp_path, text))


def test_a_text_only_config_is_a_text_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TEXT | {"architectures": ["Llama4ForCausalLM"]}))
    config = read_config(tmp_path)
    assert isinstance(config, Llama4TextConfig)
    assert config.num_hidden_layers == 48


def test_what_transformers_saves_is_read_back_equal(tmp_path, multimodal, text_only):
    for each in (multimodal, text_only):
        each.save_pretrained(tmp_path)
        assert read_config(tmp_path).to_dict() == each.to_dict()


def test_zero_and_one_are_taken_for_temperature_tuning_off_and_on(tmp_path):
    for number, meaning in ((0, False), (1, True), (4, True)):
        text = TEXT | {"attn_temperature_tuning": number}
        assert text_of(written(tmp_path, text)).attn_temperature_tuning is meaning


def test_a_whole_number_is_taken_where_transformers_insists_on_a_decimal_point(tmp_path):
    assert text_of(written(tmp_path, TEXT | {"attn_scale": 0})).attn_scale == 0.0


def test_null_heads_follow_from_the_other_sizes(tmp_path):
    text = TEXT | {"head_dim": None, "num_key_value_heads": None}
    config = text_of(written(tmp_path, text))
    assert config.head_dim == 128
    assert config.num_key_value_heads == 40


# Each: where, the change, and what the error must say.
CONTRADICTIONS = {
    "unknown key": ("text", {"num_expert_per_tok": 1}, r"num_expert_per_tok is not a setting.*num_experts_per_tok"),
    "unknown key outside": ("whole", {"image_tokn_index": 3}, r"image_tokn_index.*near misses: image_token_index"),
    "unknown vision key": ("vision", {"patchsize": 3}, r"vision_config\.patchsize.*patch_size"),
    "zero layers": ("text", {"num_hidden_layers": 0}, r"num_hidden_layers is 0; a positive whole number"),
    "negative size": ("text", {"hidden_size": -5120}, r"hidden_size is -5120"),
    "huge size": ("text", {"vocab_size": 2**62}, r"vocab_size is 4611686018427387904"),
    "endless layers": ("text", {"num_hidden_layers": 10**9}, r"num_hidden_layers is 1,000,000,000"),
    "size as text": ("text", {"hidden_size": "5120"}, r"hidden_size is '5120'"),
    "size as fraction": ("text", {"hidden_size": 5120.5}, r"hidden_size is 5120\.5"),
    "size as truth value": ("text", {"num_key_value_heads": True}, r"num_key_value_heads is True"),
    "zero chunk": ("text", {"attention_chunk_size": 0}, r"attention_chunk_size is 0"),
    "zero floor": ("text", {"floor_scale": 0}, r"floor_scale is 0"),
    "heads that do not divide": ("text", {"num_key_value_heads": 7}, r"num_key_value_heads is 7; expected a divisor"),
    "head size underivable": ("text", {"head_dim": None, "hidden_size": 5121}, r"head_dim"),
    "odd head size": ("text", {"head_dim": 127}, r"head_dim.*127"),
    "more choices than experts": ("text", {"num_experts_per_tok": 17}, r"num_experts_per_tok is 17; expected 1 to 16"),
    "no choice": ("text", {"num_experts_per_tok": 0}, r"num_experts_per_tok is 0"),
    "layers without experts": ("text", {"num_local_experts": 0}, r"num_local_experts is 0"),
    "layer beyond the last": ("text", {"moe_layers": [48]}, r"moe_layers is \[48\]; expected layer numbers below 48"),
    "layer twice": ("text", {"moe_layers": [1, 1]}, r"moe_layers is \[1, 1\]; expected every layer once"),
    "step of zero": ("text", {"interleave_moe_layer_step": 0}, r"interleave_moe_layer_step is 0.*\n.*moe_layers: \[\]"),
    "interval of zero": ("text", {"no_rope_layer_interval": 0}, r"no_rope_layer_interval is 0"),
    "too few RoPE flags": ("text", {"no_rope_layers": [1, 0]}, r"text_config.*not valid.*num_hidden_layers"),
    "RoPE flag of two": ("text", {"no_rope_layers": [2] * 48}, r"no_rope_layers is .*nothing but 0 and 1"),
    "RoPE flags as number": ("text", {"no_rope_layers": 4}, r"text_config is not valid"),
    "foreign layer kind": ("text", {"layer_types": ["sliding_attention"] * 48}, r"layer_types.*chunked_attention"),
    "too few layer kinds": ("text", {"layer_types": ["full_attention"]}, r"text_config.*layer_types"),
    "unknown activation": ("text", {"hidden_act": "sillu"}, r"hidden_act is 'sillu'.*silu"),
    "dynamic RoPE": ("text", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, r"rope_type is 'dynamic'"),
    "unknown RoPE": ("text", {"rope_scaling": {"rope_type": "lama3", "factor": 2.0}}, r"lama3"),
    "RoPE without its factor": ("text", {"rope_scaling": {"rope_type": "llama3"}}, r"factor"),
    "misspelt RoPE factor": (
        "text",
        {"rope_scaling": LLAMA3 | {"factor": 16.0, "high_freq_factor": 1.0, "low_freq_facter": 1.0}},
        r"rope_parameters\.low_freq_facter is not a setting.*low_freq_factor",
    ),
    "negative theta": ("text", {"rope_theta": -1.0}, r"rope_parameters\.rope_theta is -1\.0"),
    "theta as text": ("text", {"rope_theta": "5e5"}, r"rope_theta"),
    "theta beyond all numbers": ("text", {"rope_theta": 10**400}, r"rope_theta"),
    "two thetas": (
        "text",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        r"rope_theta is 500000\.0, yet rope_parameters says 10000\.0",
    ),
    "two dtypes": ("text", {"dtype": "float16"}, r"dtype is 'float16', yet text_config\.torch_dtype is 'bfloat16'"),
    "unknown dtype": ("text", {"torch_dtype": "bfloat"}, r"text_config is not valid.*bfloat"),
    "two ids of one token": ("whole", {"image_token_id": 7}, r"image_token_id is 7, yet image_token_index is 200092"),
    "image token beyond the vocabulary": ("whole", {"image_token_index": 202048}, r"image_token_index is 202048"),
    "padding beyond the vocabulary": ("text", {"pad_token_id": 202048}, r"pad_token_id is 202048"),
    "eps of zero": ("text", {"rms_norm_eps": 0}, r"rms_norm_eps is 0\.0"),
    "scale beyond all numbers": ("text", {"attn_scale": 10**400}, r"text_config is not valid"),
    "text config of another model": ("text", {"model_type": "llama"}, r"text_config\.model_type is 'llama'"),
    "text config that is a list": ("whole", {"text_config": []}, r"text_config is \[\]; an object"),
    "no vision config": ("whole", {"vision_config": None}, r"vision_config is None; an object"),
    "feature layer": ("vision", {"vision_feature_layer": -2}, r"vision_feature_layer is -2; .* only -1"),
    "projector bias": ("vision", {"multi_modal_projector_bias": True}, r"multi_modal_projector_bias is True"),
    "image not of whole patches": (
        "vision",
        {"image_size": 335},
        r"image_size is 335; expected a multiple of patch_size",
    ),
    "odd number of patches": ("vision", {"image_size": 350}, r"image_size is 350; expected a multiple of 2 patches"),
    "image of two sizes": ("vision", {"image_size": [336, 336]}, r"image_size is \[336, 336\]"),
    "shuffle ratio": ("vision", {"pixel_shuffle_ratio": 0.4}, r"pixel_shuffle_ratio is 0\.4"),
    "width after shuffle": ("vision", {"intermediate_size": 5631}, r"intermediate_size is 5631; expected 5632"),
    "projector width": ("vision", {"vision_output_dim": 7680}, r"vision_output_dim is 7680; expected .* 4096"),
    "vision heads": ("vision", {"num_attention_heads": 15}, r"hidden_size is 1408; expected a multiple of 4 x 15"),
    "other model": ("whole", {"model_type": "llama"}, r'model_type is \'llama\'; .*"llama4_text"'),
    "no model type": ("whole", {"model_type": None}, r"model_type is None"),
}


@pytest.mark.parametrize(("part", "change", "message"), CONTRADICTIONS.values(), ids=CONTRADICTIONS.keys())
def test_a_config_that_contradicts_itself_is_an_error_that_names_file_and_key(tmp_path, part, change, message):
    text = TEXT | (change if part == "text" else {})
    vision = VISION | (change if part == "vision" else {})
    whole = change if part == "whole" else {}
    with pytest.raises(ValueError, match=message) as error:
        read_config(written(tmp_path, text, vision, **whole))
    assert str(tmp_path / "config.json") in str(error.value)
    assert len(str(error.value).splitlines()) <= 3
