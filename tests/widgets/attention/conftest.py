"""Runs that the views of attention show."""

import pytest

import llama4lab as lab

ATTENTION = [f"layers.*.self_attn.{name}" for name in ("pattern", "v", "q_rot", "k_rot")]
LONG = "When Mary and John went to the store, John gave a drink to Mary.\n" * 5
TEXTS = [LONG, "The capital of Indonesia is"]


@pytest.fixture(scope="session")
def tiny() -> lab.HookedLlama4:
    loaded = lab.load()
    assert isinstance(loaded, lab.HookedLlama4)
    return loaded


@pytest.fixture(scope="session")
def run(tiny) -> lab.Run:
    """Two rows, the first over a border of chunks, the second behind padding."""
    return lab.record(tiny, TEXTS, at=ATTENTION)


@pytest.fixture(scope="session")
def stream(tiny):
    """Four chunks and a bit."""
    return lab.attention_stream(tiny, lab.repeated_tokens(tiny, 2, length=140))


@pytest.fixture(scope="session")
def control():
    """The control of a trait."""

    def find(view, name: str):
        for child in view.children[0].children:
            if f"l4-{name}" in child._dom_classes:
                return child
        raise AssertionError(f"no control of {name}")

    return find
