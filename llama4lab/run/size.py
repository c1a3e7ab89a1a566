"""How many bytes a recording will take, before anything runs."""

from math import prod

import psutil
import torch

from llama4lab.model.config_parts import patch_side, text_part, tile_side
from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.model.vision import VisionModel
from llama4lab.prompt.prompt import Prompt
from llama4lab.run.hook_names import is_pattern
from llama4lab.run.selection import Selector, selected


def recorded_nbytes(model: HookedPreTrainedModel, prompt: Prompt, at: Selector) -> int:
    """Gives the size, in bytes, of the tensors that `record` would keep, the logits included.

    Args:
        model: The model.
        prompt: What would be run.
        at: Names or globs of hook points.
    """
    points = model.hook_points()
    names = {*selected(points, at), "logits"}
    return sum(prod(shape(model, prompt, name, points[name])) * _itemsize(model, name) for name in names)


def shape(model: HookedPreTrainedModel, prompt: Prompt, name: str, words: str | None = None) -> tuple[int, ...]:
    """The shape of a hook point's tensor when the model runs a prompt.

    Args:
        model: The model.
        prompt: The prompt.
        name: The hook point.
        words: Its shape in words, where the caller has it at hand: to look for it takes longer than all the rest.
    """
    vision: VisionModel | None = model.vision
    config, parts = text_part(model.config), name.split(".")
    batch, seq = prompt.input_ids.shape
    sizes = {
        "batch": batch,
        "seq": seq,
        "query": seq,
        "key": seq,
        "head": config.num_attention_heads,
        "kv_head": config.num_key_value_heads,
        "d_head": config.head_dim,
        "d_model": config.hidden_size,
        "expert": config.num_local_experts,
        "slot": config.num_experts_per_tok,
        "vocab": config.vocab_size,
        "d_ff": config.intermediate_size if {"experts", "shared_expert"} & set(parts) else config.intermediate_size_mlp,
    }
    if vision is not None and (parts[0] == "vision_model" or name == "image_features"):
        sizes |= _vision_sizes(vision.config, prompt, with_class="patch_embed" not in parts)
    return tuple(sizes[word] for word in (words or model.hook_points()[name]).split())


def _vision_sizes(config, prompt: Prompt, *, with_class: bool) -> dict[str, int]:
    patches = (tile_side(config) // patch_side(config)) ** 2
    places = patches + with_class
    return {
        "tile": 0 if prompt.pixel_values is None else prompt.pixel_values.shape[0],
        "patch": places,
        "query": places,
        "key": places,
        "image_token": round(patches * config.pixel_shuffle_ratio**2),
        "head": config.num_attention_heads,
        "d_head": config.hidden_size // config.num_attention_heads,
        "d_vision": config.hidden_size,
        "d_ff": config.intermediate_size,
        "d_shuffled": round(config.hidden_size / config.pixel_shuffle_ratio**2),
        "d_adapter": config.projector_output_dim,
    }


def _itemsize(model: HookedPreTrainedModel, name: str) -> int:
    if is_pattern(name):
        return torch.float32.itemsize
    return torch.int64.itemsize if name.endswith(".indices") else model.dtype.itemsize


def free_nbytes(device: torch.device) -> int:
    """The bytes free on a device, or in RAM for the CPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
