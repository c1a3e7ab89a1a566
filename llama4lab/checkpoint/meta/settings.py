"""The config of a checkpoint of Meta's: from params.json, and from the shapes of the tensors what that leaves open.

params.json gives the widths of the MLPs by a formula, so that a misread setting would give another width. Both the
formula and the tensors are asked, and must agree.
"""

from pathlib import Path

from transformers import Llama4Config, Llama4TextConfig, Llama4VisionConfig

from llama4lab.checkpoint.consistency import MOST_LAYERS, check_text, check_together, check_vision
from llama4lab.checkpoint.meta.files import MetaFiles
from llama4lab.checkpoint.meta.params import FILE, Settings, read_params
from llama4lab.checkpoint.meta.widths import Widths
from llama4lab.checkpoint.settings import built

# Meta ships one tokenizer for all of Llama 4 and does not note its ids beside the weights.
BEGIN, ENDS, PAD = 200000, [200001, 200007, 200008], 200018
IMAGE_START, IMAGE_END, IMAGE_PATCH = 200080, 200081, 200092
LONGEST, LONGEST_SCALED = 1048576, 10485760  # for how many tokens Maverick and Scout were published
VISION_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def meta_config(folder: Path) -> Llama4Config | Llama4TextConfig:
    """Gives the config of a checkpoint of Meta's: with vision if params.json has vision_args.

    Raises:
        FileNotFoundError: if there is no params.json, or the file of a rank is not there.
        ValueError: if a file is malformed, or if params.json and the tensors contradict each other.
    """
    params, file = read_params(folder), folder / FILE
    if params["n_layers"] > MOST_LAYERS:
        raise ValueError(f"{file}: n_layers is {params['n_layers']:,}.")
    text = built(Llama4TextConfig, _text(params, Widths(MetaFiles(folder), params)), file)
    check_text(text, file, section="")
    if params["vision_args"] is None:
        return text
    vision = built(Llama4VisionConfig, _vision(params["vision_args"]), file)
    check_vision(vision, file, section="vision_args.")
    ids = {"boi_token_index": IMAGE_START, "eoi_token_index": IMAGE_END, "image_token_index": IMAGE_PATCH}
    config = built(Llama4Config, {"text_config": text, "vision_config": vision, **ids}, file)
    check_together(config, file)
    return config


def _text(params: Settings, widths: Widths) -> Settings:
    moe, layers = params["moe_args"], params["n_layers"]
    step = moe["interleave_moe_layer_step"] if moe else 1
    interval = params["nope_layer_interval"]
    return {
        "vocab_size": widths.vocabulary,
        "hidden_size": params["dim"],
        "intermediate_size": widths.expert,
        "intermediate_size_mlp": widths.dense,
        "num_hidden_layers": layers,
        "num_attention_heads": params["n_heads"],
        "num_key_value_heads": params["n_kv_heads"] or params["n_heads"],
        "head_dim": widths.head,
        "num_local_experts": moe["num_experts"] if moe else 0,
        "num_experts_per_tok": moe["top_k"] if moe else 1,
        "interleave_moe_layer_step": step,
        "moe_layers": list(range(step - 1, layers, step)) if moe else [],
        "rms_norm_eps": params["norm_eps"],
        "attention_chunk_size": params["attention_chunk_size"],
        # A 1 means that the layer uses RoPE, although the list is called no_rope_layers.
        "no_rope_layers": [int(interval is None or (layer + 1) % interval != 0) for layer in range(layers)],
        "no_rope_layer_interval": interval or layers + 1,
        "use_qk_norm": params["use_qk_norm"],
        "attn_temperature_tuning": params["attn_temperature_tuning"],
        "floor_scale": params["floor_scale"],
        "attn_scale": params["attn_scale"],
        "rope_parameters": _rope(params),
        "max_position_embeddings": LONGEST_SCALED if params["use_scaled_rope"] else LONGEST,
        "tie_word_embeddings": False,
        **_ids(widths.vocabulary),
    }


def _rope(params: Settings) -> Settings:
    theta = params["rope_theta"]
    if not params["use_scaled_rope"]:
        return {"rope_type": "default", "rope_theta": theta}
    # Files without the factors are those of Scout, and Meta's code takes these two then; an early conversion of Scout
    # wrote 8 and 4 instead.
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": params["rope_scaling_factor"] or 16.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": params["rope_high_freq_factor"] or 1.0,
        "original_max_position_embeddings": 8192,
    }


def _ids(vocabulary: int) -> Settings:
    """The ids of Meta's tokenizer; another vocabulary has others, which are not known."""
    if vocabulary <= PAD:
        return {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return {"bos_token_id": BEGIN, "eos_token_id": ENDS, "pad_token_id": PAD}


def _vision(args: Settings) -> Settings:
    return {
        "hidden_size": args["dim"],
        "intermediate_size": int(args["mlp_ratio"] * args["dim"]),
        "num_hidden_layers": args["n_layers"],
        "num_attention_heads": args["n_heads"],
        "image_size": args["image_size"],
        "patch_size": args["patch_size"],
        "vision_output_dim": args["output_dim"],
        "projector_input_dim": args["output_dim"],
        "projector_output_dim": args["output_dim"],
        "pixel_shuffle_ratio": args["pixel_shuffle_ratio"],
        "rope_parameters": dict(VISION_ROPE),
    }
