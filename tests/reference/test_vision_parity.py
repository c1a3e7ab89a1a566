"""Features by place beside transformers' vision tower of the same weights, at every layer."""

from collections.abc import Iterator
from copy import deepcopy

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.llama4.modeling_llama4 import Llama4MultiModalProjector, Llama4VisionModel

import llama4lab as lab
from llama4lab.tables.vision import features

SIZES = {"one tile": [(40, 30)], "several tiles": [(60, 150)], "two pictures": [(60, 150), (30, 30)]}


def places(layers: int) -> dict[str, tuple[str, bool]]:
    """Our hook point -> transformers' module, and whether its input is meant rather than its output."""
    whole = {
        "vision_model.patch_embed": ("patch_embedding", False),
        "vision_model.embed": ("layernorm_pre", True),
        "vision_model.final_norm": ("layernorm_post", False),
        "vision_model.shuffled": ("vision_adapter.mlp", True),
        "vision_model.adapter": ("vision_adapter", False),
    }
    for layer in range(layers):
        ours, theirs = f"vision_model.layers.{layer}.", f"model.layers.{layer}"
        whole |= {
            f"{ours}resid_pre": (theirs, True),
            f"{ours}resid_mid": (f"{theirs}.post_attention_layernorm", True),
            f"{ours}resid_post": (theirs, False),
            f"{ours}self_attn.q": (f"{theirs}.self_attn.q_proj", False),
            f"{ours}self_attn.k": (f"{theirs}.self_attn.k_proj", False),
            f"{ours}self_attn.v": (f"{theirs}.self_attn.v_proj", False),
            f"{ours}self_attn.z": (f"{theirs}.self_attn.o_proj", True),
            f"{ours}self_attn.out": (f"{theirs}.self_attn", False),
            f"{ours}mlp.hidden": (f"{theirs}.mlp.fc2", True),
            f"{ours}mlp.out": (f"{theirs}.mlp", False),
        }
    return whole


@pytest.fixture(scope="module")
def tiny() -> lab.HookedLlama4:
    model = lab.load()
    assert isinstance(model, lab.HookedLlama4)
    return model


@pytest.fixture(scope="module")
def random(tiny) -> lab.HookedLlama4:
    """Random weights of a size that matters, and heads of 16 features."""
    config = deepcopy(tiny.config)
    config.vision_config.num_attention_heads = config.vision_config.hidden_size // 16
    model = lab.HookedLlama4._from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 0.15 * noise if parameter.ndim > 1 else name.endswith("weight") + 0.2 * noise
    return model


def tower_of(model: lab.HookedLlama4) -> tuple[Llama4VisionModel, Llama4MultiModalProjector]:
    """transformers' tower and projector with our weights."""
    tower = Llama4VisionModel._from_config(model.config.vision_config, dtype=torch.float32).eval()
    tower.load_state_dict(model.vision_model.state_dict())
    projector = Llama4MultiModalProjector(model.config).eval()
    projector.load_state_dict(model.multi_modal_projector.state_dict())
    return tower, projector


@torch.no_grad()
def seen_by(model: lab.HookedLlama4, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
    """What transformers' modules take or give in one pass with our weights."""
    tower, projector = tower_of(model)
    seen = {}
    for name, (path, of_input) in places(len(tower.model.layers)).items():

        def keep(module, args, kwargs, x, name=name, of_input=of_input):
            value = (args[0] if args else kwargs["hidden_state"]) if of_input else x
            value = value[0] if isinstance(value, tuple) else value
            seen[name] = value.reshape(len(pixel_values), -1, value.shape[-1])

        tower.get_submodule(path).register_forward_hook(keep, with_kwargs=True)
    features = tower(pixel_values.float()).last_hidden_state
    projected = projector(features)
    return seen | {"image_features": projected.reshape(len(pixel_values), -1, projected.shape[-1])}


def pictures(model: lab.HookedLlama4, sizes: list[tuple[int, int]], normalize: str) -> lab.Prompt:
    """A padded row with pictures of noise, and a longer one without."""
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]
    texts = ["<|image|>" * len(images) + " What is it?", "a longer row without image " * 20]
    return model.prompt(texts, images=[images, []], normalize=normalize)


def compared(model: lab.HookedLlama4, prompt: lab.Prompt) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Name, our features and transformers' vectors, in the same order; the class token's come after the others."""
    assert prompt.pixel_values is not None
    expected = seen_by(model, prompt.pixel_values)
    run = lab.record(model, prompt, at=list(expected))
    for name, wanted in expected.items():
        found = features(run, name)
        ours = [found.values.flatten(1, 2)]
        if found.class_token is not None:
            ours.append(found.class_token[:, None])
        yield name, torch.cat(ours, 1), wanted


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("normalize", ["hf", "meta"])
def test_features_at_every_layer_equal_those_of_transformers_to_the_bit(tiny, random, sizes, normalize):
    pairs = list(compared(random, pictures(tiny, sizes, normalize)))
    assert len(pairs) == 6 + 10 * 4
    assert [name for name, ours, theirs in pairs if not torch.equal(ours, theirs)] == []


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_features_of_the_packaged_checkpoint_are_those_of_transformers(tiny, sizes):
    """Its heads have 24 features, which torch rotates as complex numbers with other roundings than as pairs."""
    for name, ours, theirs in compared(tiny, pictures(tiny, sizes, "hf")):
        torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=0, msg=name)
