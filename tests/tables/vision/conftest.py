"""Features made by hand at the places of pictures, and prompts with several images, tiles and rows."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image

import llama4lab as lab
from llama4lab.prompt.image_layout import ImageLayout
from llama4lab.prompt.tiling import Tiling
from llama4lab.tables.vision import Features, patch_places, token_places

IMAGE_TOKEN = 127
TILINGS = {1: Tiling((24, 24), 24, 1, 1, (24, 24)), 3: Tiling((24, 40), 24, 1, 2, (24, 40))}


@pytest.fixture(scope="session")
def make_features(make_prompt) -> Callable[..., Features]:
    """Features of two pictures: one of one tile, half of it filling, and one of two tiles and the global one.

    A tile has 4 x 4 patches, 2 x 2 image tokens. Of `values` [place, feature] each line is for one place.
    """
    text = "a" + " <p>" * 4 + " b" * 19, "c" + " <p>" * 4 + " x" + " <p>" * 4 + " y z" + " <p>" * 4
    small = ImageLayout.of(Tiling((10, 20), 8, 1, 1, (4, 8)), 2, 0, 0, [1, 2, 3, 4], None)
    positions = [9, 10, 11, 12, 14, 15, 16, 17, 20, 21, 22, 23]
    wide = ImageLayout.of(Tiling((8, 16), 8, 1, 2, (8, 16)), 2, 1, 1, positions, None)
    prompt = make_prompt(*text, images=[small, wide])

    def make(values: torch.Tensor, at: str = "vision_model.layers.0.resid_post") -> Features:
        side = 2 if len(values) == 16 else 4
        places = token_places(prompt) if side == 2 else patch_places(prompt)
        return Features(at, values.reshape(4, side, side, -1), places)

    return make


@pytest.fixture(scope="session")
def tiny() -> lab.HookedLlama4:
    """The packaged checkpoint."""
    model = lab.load()
    assert isinstance(model, lab.HookedLlama4)
    return model


@pytest.fixture(scope="session")
def two_rows(tiny) -> lab.Prompt:
    """Row 0 has a wide image of several tiles; row 1 a small one and a tall one of several tiles."""

    def noise(height: int, width: int) -> Image.Image:
        values = np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)
        return Image.fromarray(values)

    images = [[noise(60, 110)], [noise(40, 40), noise(100, 50)]]
    return tiny.prompt(["<|image|> What is it?", "<|image|>Hello <|image|> there you are"], images=images)


@pytest.fixture(scope="session")
def small_prompt(image_batch) -> lab.Prompt:
    """For models of `new_model`: row 0 has an image of three tiles, row 1 two of one tile, behind padding."""
    inputs = image_batch([[3], [1, 1]])
    ids, layouts, tile = inputs["input_ids"], [], 0
    for row, images in enumerate([[3], [1, 1]]):
        positions = torch.nonzero(ids[row] == IMAGE_TOKEN).flatten().split([4 * tiles for tiles in images])
        for tiles, own in zip(images, positions, strict=True):
            layouts.append(ImageLayout.of(TILINGS[tiles], 2, row, tile, own.tolist(), None))
            tile += tiles
    kinds = [["pad" if i == 0 else "image" if i == IMAGE_TOKEN else "text" for i in row] for row in ids.tolist()]
    tokens = [["" if i == 0 else f"<{i}>" for i in row] for row in ids.tolist()]
    return lab.Prompt(ids, inputs["attention_mask"], inputs["pixel_values"], tokens, kinds, layouts)
