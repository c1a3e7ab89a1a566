"""Settings that make no sense, or that the tensors contradict."""

import json
from pathlib import Path
from typing import Any

import pytest

import llama4lab as lab
from llama4lab.checkpoint.opening import settings_of


def told(folder: Path, **changes: Any) -> None:
    document = json.loads((folder / "params.json").read_text())
    for key, value in changes.items():
        document.pop(key, None) if value is ... else document.update({key: value})
    (folder / "params.json").write_text(json.dumps(document))


MOE = {"num_experts": 4, "auto_scale_F": False, "interleave_moe_layer_step": 2}
VISION = {"dim": 32, "n_layers": 2, "n_heads": 2, "mlp_ratio": 4.0, "output_dim": 40, "pixel_shuffle_ratio": 0.5}
VISION |= {"image_size": {"height": 24, "width": 20}, "patch_size": {"height": 6, "width": 6}}
PARAMS: dict[str, tuple[dict[str, Any], str]] = {
    "a misspelt key": (
        {"nope_layer_intervall": 4},
        r"nope_layer_intervall is not .*; near misses: nope_layer_interval",
    ),
    "a misspelt key inside": ({"moe_args": MOE | {"topk": 1}}, r"moe_args\.topk is not .*; near misses: top_k"),
    "no width": ({"dim": ...}, "does not say dim"),
    "a word": ({"n_heads": "four"}, "n_heads is 'four'; a positive whole number was expected"),
    "a negative number": ({"norm_eps": -1e-5}, "norm_eps is -1e-05; a positive number was expected"),
    "a fraction": ({"n_layers": 2.5}, "n_layers is 2.5; a positive whole number"),
    "a number for a flag": ({"use_qk_norm": 1}, "use_qk_norm is 1; true or false was expected"),
    "a list for an object": ({"moe_args": [1]}, "moe_args is .1.; an object of settings"),
    "too many layers": ({"n_layers": 2000000}, "n_layers is 2,000,000"),
    "a layer too many": ({"n_layers": 3}, "lacks .* tensors of the model"),
    "another vocabulary": ({"vocab_size": 130}, r"embed_tokens\.weight has 128 rows in 2 files; params\.json says 130"),
    "other heads": ({"n_kv_heads": 4}, r"k_proj\.weight has 32 rows in 2 files; params\.json says 64"),
    "heads that share nothing": ({"n_kv_heads": 3}, r"k_proj\.weight has 32 rows"),
    "wider heads": ({"head_dim": 32}, r"q_proj\.weight has 64 rows in 2 files; params\.json says 128"),
    "other experts": ({"moe_args": MOE | {"num_experts": 8}}, r"router\.weight has shape \[4, 64\]|lacks"),
    "wider experts": ({"ffn_exp": 4.0}, "its experts are 176 wide by its formula, and 88 in the files"),
    "wider MLPs": ({"ffn_dim_multiplier": 1.5}, "its MLPs are 256 wide by its formula, and 176 in the files"),
    "experts that share their width": ({"moe_args": MOE | {"auto_scale_F": True}}, "its experts are 48 wide"),
    "no shared expert": ({"moe_args": MOE | {"use_shared_expert": False}}, "use_shared_expert is false"),
    "adapters": ({"lora_args": {"rank": 8, "scale": 2.0}}, "lora_args is given"),
    "rotated weights": ({"quantization_args": {"spinquant": True}}, r"quantization_args\.spinquant is True"),
    "vision that is not there": ({"vision_args": VISION | {"image_size": {"height": 24, "width": 24}}}, "lacks"),
    "tiles that are no squares": ({"vision_args": VISION}, r"vision_args\.image_size is 24 x 20"),
}


@pytest.mark.parametrize("kind", PARAMS)
def test_settings_that_contradict_the_tensors_or_make_no_sense_are_refused(folder, kind):
    changes, expected = PARAMS[kind]
    told(folder, **changes)
    with pytest.raises(ValueError, match=expected):
        lab.load(folder)


def test_without_settings_there_is_no_model(folder):
    (folder / "params.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"params\.json does not exist"):
        lab.load(folder)


def test_factors_of_rope_that_are_not_said_are_those_of_scout(folder):
    told(folder, use_scaled_rope=True)
    rope = dict(settings_of(folder).rope_parameters or {})
    assert (rope["rope_type"], rope["factor"], rope["high_freq_factor"]) == ("llama3", 16.0, 1.0)
    told(folder, rope_scaling_factor=8.0, rope_high_freq_factor=4.0)
    rope = dict(settings_of(folder).rope_parameters or {})
    assert (rope["factor"], rope["high_freq_factor"]) == (8.0, 4.0)
