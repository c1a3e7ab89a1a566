"""Runs that the views of routing show."""

import pytest

import llama4lab as lab

ROUTER = "layers.*.feed_forward.router.*"
TEXTS = ["The capital of France is Paris.\nWhen Mary and John went to the store", "The capital of Indonesia is"]


@pytest.fixture(scope="session")
def tiny() -> lab.HookedLlama4:
    loaded = lab.load()
    assert isinstance(loaded, lab.HookedLlama4)
    return loaded


@pytest.fixture(scope="session")
def run(tiny) -> lab.Run:
    """Two rows, the second behind padding."""
    return lab.record(tiny, TEXTS, at=ROUTER)


@pytest.fixture(scope="session")
def wide_run(new_text_model, random_ids) -> lab.Run:
    """Two slots and 128 experts."""
    model = new_text_model(num_local_experts=128, num_experts_per_tok=2, interleave_moe_layer_step=1)
    return lab.record(model, random_ids(1, 30), at=ROUTER)


@pytest.fixture(scope="session")
def control():
    """The control of a trait."""

    def find(view, name: str):
        for box in view.children:
            for child in getattr(box, "children", ()):
                if f"l4-{name}" in child._dom_classes:
                    return child
        raise AssertionError(f"no control of {name}")

    return find
