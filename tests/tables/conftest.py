"""Prompts and runs made by hand, so that every column of a table can be checked against what was planted."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from llama4lab.model.loading import load
from llama4lab.prompt.image_layout import ImageLayout
from llama4lab.prompt.prompt import Prompt
from llama4lab.run.recording import record
from llama4lab.run.run import Run

META = {
    "num_layers": 4,
    "num_experts": 3,
    "moe_layers": [1, 3],
    "chunk_size": 2,
    "chunked_layers": [0, 1, 2],
    "rope_layers": [0, 1, 2],
}


def words(name: str) -> str:
    if name.endswith(("pattern", "scores")):
        return "batch head query key"
    return "tile image_token d_model" if name == "image_features" else "batch seq x"


@pytest.fixture(scope="session")
def make_prompt() -> Callable[..., Prompt]:
    """A prompt of words; rows are padded on the left. Words that begin with "<" are image tokens."""

    def make(*rows: str, images: list[ImageLayout] | None = None) -> Prompt:
        length = max(len(row.split()) for row in rows)
        tokens = [[""] * (length - len(row.split())) + row.split() for row in rows]
        modality = [["image" if t.startswith("<") else "text" if t else "pad" for t in row] for row in tokens]
        mask = torch.tensor([[int(token != "") for token in row] for row in tokens])
        return Prompt(mask * 5, mask, None, tokens, modality, images or [])

    return make


@pytest.fixture(scope="session")
def make_run() -> Callable[..., Run]:
    """A run of given tensors; keyword arguments change the facts about the model."""

    def make(prompt: Prompt, tensors: dict[str, Tensor], logits: Tensor | None = None, **meta: Any) -> Run:
        if logits is None:
            logits = torch.zeros(*prompt.input_ids.shape, 6)
        return Run(tensors, {name: words(name) for name in tensors}, logits, prompt, META | meta)

    return make


@pytest.fixture(scope="session")
def tiny_run() -> Run:
    """The packaged checkpoint, asked about a wide picture of several tiles."""
    pixels = np.random.default_rng(0).integers(0, 256, (60, 110, 3), dtype=np.uint8)
    model = load()
    prompt = model.prompt("<|image|> What is it?", images=[Image.fromarray(pixels)])
    return record(model, prompt, at=["image_features", "embed_merged", "layers.*.feed_forward.router.*"])
