import pytest
from transformers.modeling_outputs import MoeCausalLMOutputWithPast


@pytest.fixture(autouse=True)
def _half_precision_products_as_torch_makes_them(monkeypatch):
    """On CPUs without bfloat16 instructions llama4lab multiplies experts in float32, which is faster and more precise,
    but not to the bit what transformers does. The comparison is made with torch's own products everywhere.
    """
    monkeypatch.setattr("llama4lab.model.experts._fast_half_precision", lambda: True)


@pytest.fixture(autouse=True)
def _outputs_that_transformers_can_read(monkeypatch):
    """In transformers 5.24.0 every pass of `Llama4ForConditionalGeneration` ends in an AttributeError: it reads the
    images' outputs off the output of its text model, which has no such field.
    """
    monkeypatch.setattr(MoeCausalLMOutputWithPast, "image_outputs", None, raising=False)
