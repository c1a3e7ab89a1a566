"""The packaged tokenizer and image settings with the config of a small model: prompts need no weights."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import Llama4Config, PreTrainedTokenizerFast

import llama4lab
from llama4lab.prompt.checkpoint_prompter import load_image_processor
from llama4lab.prompt.images import ImageProcessor
from llama4lab.prompt.prompter import Prompter
from llama4lab.prompt.tokenizer import load_tokenizer

TINY = Path(llama4lab.__file__).parent / "tiny"
TILE, PATCH = 48, 6


@pytest.fixture(scope="session")
def tiny_folder() -> Path:
    return TINY


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return load_tokenizer(TINY)


@pytest.fixture(scope="session")
def image_processor() -> ImageProcessor:
    """Tiles of 48 pixels, at most 4 of them."""
    processor = load_image_processor(TINY)
    assert processor is not None
    return processor


@pytest.fixture(scope="session")
def config(tokenizer) -> Llama4Config:
    return Llama4Config(
        vision_config={"image_size": TILE, "patch_size": PATCH, "pixel_shuffle_ratio": 0.5},
        text_config={"vocab_size": len(tokenizer)},
        image_token_index=tokenizer.convert_tokens_to_ids("<|patch|>"),
    )


@pytest.fixture(scope="session")
def prompter(tokenizer, image_processor, config) -> Prompter:
    return Prompter(tokenizer, image_processor, config, folder=TINY)


@pytest.fixture(scope="session")
def noise() -> Callable[..., Image.Image]:
    """A PIL image of random pixels."""

    def make(height: int, width: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
        values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        return Image.fromarray(values).convert(mode)

    return make
