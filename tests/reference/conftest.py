import pytest


@pytest.fixture(autouse=True)
def _half_precision_products_as_torch_makes_them(monkeypatch):
    """On CPUs without bfloat16 instructions llama4lab multiplies experts in float32, which is faster and more precise,
    but not to the bit what transformers does. The comparison is made with torch's own products everywhere.
    """
    monkeypatch.setattr("llama4lab.model.experts._fast_half_precision", lambda: True)
