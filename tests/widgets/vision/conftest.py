"""A prompt with two pictures: one of several tiles, not square, and one of a single tile."""

import random

import pytest
from PIL import Image

import llama4lab as lab
from llama4lab.tiny import drawing


@pytest.fixture(scope="session")
def tiny() -> lab.HookedLlama4:
    loaded = lab.load()
    assert isinstance(loaded, lab.HookedLlama4)
    return loaded


@pytest.fixture(scope="session")
def prompt(tiny):
    one = drawing.picture(drawing.draw_scene(random.Random(5), 4))
    wide = Image.new("RGB", (130, 60), (20, 20, 20))
    wide.paste(one, (5, 6))
    images = [{"type": "image", "image": image} for image in (wide, one)]
    return tiny.prompt([{"role": "user", "content": [*images, {"type": "text", "text": "What colour is it?"}]}])


@pytest.fixture(scope="session")
def recorded(tiny, prompt) -> lab.Run:
    """What both views need, once for all tests."""
    names = ["image_features", "layers.*.resid_post", "layers.*.feed_forward.router.*", "layers.*.self_attn.[qk]_rot"]
    tower = ["vision_model.layers.*.resid_post", "vision_model.layers.*.self_attn.[qk]_rot"]
    return lab.record(tiny, prompt, at=names + tower)
