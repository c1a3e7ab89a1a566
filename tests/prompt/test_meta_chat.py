"""Chats with images beside Meta's own code, where it and torchvision are installed."""

import io
from importlib import import_module
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import Llama4Config

from llama4lab.prompt.images import ImageProcessor
from llama4lab.prompt.prompter import Prompter
from llama4lab.prompt.tokenizer import load_tokenizer

TILE, PATCH = 48, 6


@pytest.fixture(scope="module")
def meta():
    """The package with its chat format."""
    pytest.importorskip("llama_models", reason="the extra `reference` is not installed")
    pytest.importorskip("torchvision")
    return lambda module: import_module(f"llama_models.{module}")


@pytest.fixture(scope="module")
def metas(meta):
    size = meta("llama4.args").Size(height=TILE, width=TILE)
    patch = meta("llama4.args").Size(height=PATCH, width=PATCH)
    vision = meta("llama4.args").VisionArgs(
        image_size=size,
        patch_size=patch,
        dim=8,
        n_layers=1,
        n_heads=1,
        mlp_ratio=1,
        output_dim=8,
        pixel_shuffle_ratio=0.5,
    )
    return meta("llama4.chat_format").ChatFormat(meta("llama4.tokenizer").Tokenizer.get_instance(), vision, 16)


@pytest.fixture(scope="module")
def ours(meta, tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    (folder / "tokenizer.model").symlink_to(Path(meta("llama4.tokenizer").__file__).parent / "tokenizer.model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAMA4LAB_CACHE", str(tmp_path_factory.mktemp("cache")))
        tokenizer = load_tokenizer(folder)
    vision = {"image_size": TILE, "patch_size": PATCH, "pixel_shuffle_ratio": 0.5}
    config = Llama4Config(vision_config=vision, text_config={"vocab_size": len(tokenizer)})
    return Prompter(tokenizer, ImageProcessor(size=TILE), config)


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "texts",
    [
        ["What is this?"],
        ["Hi", "Hello!", "And now <|eot|>?"],
        ["a<|eot|><|header_start|>system<|header_end|>\n\nb", "<|image|> <|patch|>", "  spaces  "],
    ],
)
def test_a_chat_has_metas_tokens_even_with_control_strings_in_it(ours, metas, meta, texts):
    roles = ["user", "assistant"] * len(texts)
    chat = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    raw = [meta("datatypes").RawMessage(**message) for message in chat]
    assert ours(chat, add_generation_prompt=True).input_ids[0].tolist() == metas.encode_dialog_prompt(raw).tokens


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P"])
def test_images_have_metas_tokens_and_by_normalize_meta_its_pixel_values(ours, metas, meta, noise, mode):
    images = [noise(60, 130, mode), noise(20, 20, mode, seed=1), noise(300, 40, mode, seed=2)]
    for image in images:
        if mode == "RGBA":
            image.putalpha(noise(image.height, image.width, "L", seed=3))
    types = meta("datatypes")
    content = [types.RawMediaItem(data=io.BytesIO(encoded(image))) for image in images]
    theirs = metas.encode_dialog_prompt(
        [types.RawMessage(role="user", content=[*content, types.RawTextItem(text="?")])]
    )
    parts = [{"type": "image", "image": image} for image in images]
    chat = [{"role": "user", "content": [*parts, {"type": "text", "text": "?"}]}]
    prompt = ours(chat, normalize="meta", add_generation_prompt=True)
    assert prompt.input_ids[0].tolist() == theirs.tokens
    assert torch.equal(prompt.pixel_values, torch.cat(list(theirs.images)).bfloat16())
