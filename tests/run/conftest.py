import pytest
from PIL import Image, ImageDraw

import llama4lab as lab


@pytest.fixture(scope="session")
def tiny() -> lab.HookedLlama4:
    """The packaged checkpoint."""
    model = lab.load()
    assert isinstance(model, lab.HookedLlama4)
    return model


@pytest.fixture(scope="session")
def small(new_text_model):
    """Two experts a token, dense layers between, chunks of 8, two query heads for each KV head."""
    return new_text_model(num_experts_per_tok=2, num_hidden_layers=4)


@pytest.fixture(scope="session")
def picture() -> Image.Image:
    """A drawn circle and a square."""
    image = Image.new("RGB", (48, 48), (20, 20, 20))
    draw = ImageDraw.Draw(image)
    draw.ellipse((4, 4, 20, 20), fill=(225, 40, 40))
    draw.rectangle((28, 28, 44, 44), fill=(50, 90, 235))
    return image


@pytest.fixture(scope="session")
def asked(tiny: lab.HookedLlama4, picture: Image.Image) -> lab.Prompt:
    """A question about the picture."""
    message = {
        "role": "user",
        "content": [{"type": "image", "image": picture}, {"type": "text", "text": "Which shape is red?"}],
    }
    return tiny.prompt([message], add_generation_prompt=True)


@pytest.fixture
def no_hooks_left(tiny: lab.HookedLlama4):
    """Fails if the test leaves a hook anywhere in the model."""

    def count() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in tiny.modules())

    before = count()
    yield
    assert count() == before
