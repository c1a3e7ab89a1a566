"""Small models with random weights, alone or beside transformers' own model of the same weights."""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from hypothesis import settings
from transformers import (
    Llama4Config,
    Llama4ForCausalLM,
    Llama4ForConditionalGeneration,
    Llama4TextConfig,
    Llama4VisionConfig,
)

from llama4lab.model.llama4 import HookedLlama4, HookedLlama4ForCausalLM

# The same examples in every run: a test fails for a change of the code, not by chance.
settings.register_profile("steady", derandomize=True, deadline=None, database=None)
settings.load_profile("steady")

IMAGE_TOKEN = 127

TEXT = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 48,
    "intermediate_size_mlp": 80,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 2,
    "attention_chunk_size": 8,
    "floor_scale": 8,
    "attn_scale": 0.5,  # larger than in real models, so that a wrong position shows
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}

# 16 patches and a class token; 4 image tokens a tile. The adapter needs intermediate = hidden / ratio ** 2.
VISION = {
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 6,
    "vision_output_dim": 40,
    "projector_input_dim": 40,
    "projector_output_dim": 40,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}


def text_settings(changes: dict) -> Llama4TextConfig:
    return Llama4TextConfig(**deepcopy(TEXT | changes))


def full_settings(changes: dict, vision: dict) -> Llama4Config:
    return Llama4Config(
        text_config=text_settings(changes),
        vision_config=Llama4VisionConfig(**deepcopy(VISION | vision)),
        image_token_index=IMAGE_TOKEN,
    )


@torch.no_grad()
def fill(model: torch.nn.Module, seed: int) -> None:
    """Gives every parameter normal values of a size that matters, the norms and the biases too."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.copy_(0.15 * noise)
        elif name.endswith("weight"):
            parameter.copy_(1 + 0.2 * noise)
        else:
            parameter.copy_(0.2 * noise)


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Small matrices are faster on one thread, and one thread adds up in one order."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def text_config() -> Callable[..., Llama4TextConfig]:
    """A small text config; keyword arguments change it."""
    return lambda **changes: text_settings(changes)


@pytest.fixture(scope="session")
def full_config() -> Callable[..., Llama4Config]:
    """A small config with vision; keyword arguments change its text part, `vision` its vision part."""
    return lambda vision=None, **changes: full_settings(changes, vision or {})


@pytest.fixture(scope="session")
def new_text_model(text_config) -> Callable[..., HookedLlama4ForCausalLM]:
    """A new random text model in evaluation mode; keyword arguments change the config."""

    def make(*, dtype: torch.dtype = torch.float32, seed: int = 0, **changes) -> HookedLlama4ForCausalLM:
        model = HookedLlama4ForCausalLM._from_config(text_config(**changes), dtype=dtype).eval()
        fill(model, seed)
        return model

    return make


@pytest.fixture(scope="session")
def new_model(full_config) -> Callable[..., HookedLlama4]:
    """A new random model with vision in evaluation mode; keyword arguments change the config."""

    def make(*, dtype: torch.dtype = torch.float32, seed: int = 0, **changes) -> HookedLlama4:
        model = HookedLlama4._from_config(full_config(**changes), dtype=dtype).eval()
        fill(model, seed)
        return model

    return make


@pytest.fixture(scope="session")
def text_twins(new_text_model, text_config) -> Callable[..., tuple[HookedLlama4ForCausalLM, Llama4ForCausalLM]]:
    """A new random text model and transformers' model of the same weights.

    transformers cannot run without a chunk size; there it gets a chunk longer than any sequence of the tests.
    """

    def make(*, dtype: torch.dtype = torch.float32, seed: int = 0, **changes):
        ours = new_text_model(dtype=dtype, seed=seed, **changes)
        config = text_config(**changes)
        config.attention_chunk_size = config.attention_chunk_size or 4096
        theirs = Llama4ForCausalLM._from_config(config, dtype=dtype).eval()
        theirs.load_state_dict(ours.state_dict())
        return ours, theirs

    return make


@pytest.fixture(scope="session")
def twins(new_model, full_config) -> Callable[..., tuple[HookedLlama4, Llama4ForConditionalGeneration]]:
    """A new random model with vision and transformers' model of the same weights."""

    def make(*, dtype: torch.dtype = torch.float32, seed: int = 0, **changes):
        ours = new_model(dtype=dtype, seed=seed, **changes)
        theirs = Llama4ForConditionalGeneration._from_config(full_config(**changes), dtype=dtype).eval()
        theirs.load_state_dict(ours.state_dict())
        return ours, theirs

    return make


@pytest.fixture(scope="session")
def random_ids() -> Callable[..., torch.Tensor]:
    """Random token ids of a shape, without padding and image tokens."""

    def make(*shape: int, seed: int = 0) -> torch.Tensor:
        return torch.randint(1, IMAGE_TOKEN, shape, generator=torch.Generator().manual_seed(seed))

    return make


@pytest.fixture(scope="session")
def image_batch(random_ids) -> Callable[..., dict[str, torch.Tensor]]:
    """Left-padded rows with image tokens in the middle: the inputs of a model with vision.

    `rows` gives for each row the tiles of its images, for example `[[3], [1, 1]]`; row i has i tokens of padding.
    """

    def make(rows: list[list[int]], *, words: int = 5, seed: int = 0) -> dict[str, torch.Tensor]:
        sequences = []
        for row, images in enumerate(rows):
            sequence = [random_ids(words, seed=seed + row)]
            for image, tiles in enumerate(images):
                sequence += [torch.full((4 * tiles,), IMAGE_TOKEN), random_ids(2, seed=seed + 10 * row + image)]
            sequences.append(torch.cat(sequence))
        length = max(len(sequence) for sequence in sequences)
        ids = torch.stack([torch.nn.functional.pad(s, (length - len(s), 0)) for s in sequences])
        tiles = sum(sum(images) for images in rows)
        pixels = torch.randn(tiles, 3, 24, 24, generator=torch.Generator().manual_seed(seed))
        return {"input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": pixels}

    return make
