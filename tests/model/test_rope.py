"""Rotary embeddings: the very bits of the complex form, in float32 through every copy and cast."""

import copy
import pickle

import pytest
import torch
from transformers.models.llama4 import modeling_llama4 as theirs

from llama4lab.model.rope import PatchRotaryEmbedding, RotaryEmbedding, frequencies, rotated

ROPES = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 16.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"factor": 8.0, "original_max_position_embeddings": 4096},
}


def rope(kind: str) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500000.0, **ROPES[kind]}}


@pytest.mark.parametrize("kind", ROPES)
def test_frequencies_are_those_of_transformers_to_the_bit(kind, text_config):
    config = text_config(**rope(kind))
    reference = theirs.Llama4TextRotaryEmbedding(config)
    table, factor = frequencies(config)
    assert torch.equal(table, reference.inv_freq)
    assert factor == reference.attention_scaling


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("start", [0, 8191, 1_000_000, 10_485_700])
@pytest.mark.parametrize("kind", ROPES)
def test_rotation_has_the_bits_of_the_complex_form(kind, start, dtype, text_config):
    config = text_config(**rope(kind))
    positions = torch.arange(start, start + 30)[None]
    q, k = torch.randn(2, 30, 4, 16).to(dtype), torch.randn(2, 30, 2, 16).to(dtype)
    rotation = RotaryEmbedding(config)(positions)
    complex_form = theirs.Llama4TextRotaryEmbedding(config)(q, positions)
    expected_q, expected_k = theirs.apply_rotary_emb(q, k, complex_form)
    assert torch.equal(rotated(q, rotation), expected_q)
    assert torch.equal(rotated(k, rotation), expected_k)


def test_pairs_are_neighbouring_features(text_config):
    x = torch.zeros(1, 3, 1, 16)
    x[..., 0] = 1.0
    angles = torch.arange(3.0)  # the first pair turns by one radian a position
    turned = rotated(x, RotaryEmbedding(text_config())(torch.arange(3)[None]))
    torch.testing.assert_close(turned[0, :, 0, :2], torch.stack([angles.cos(), angles.sin()], -1))
    assert torch.equal(turned[..., 2:], torch.zeros(1, 3, 1, 14))


def test_a_score_depends_on_the_distance_alone(text_config):
    embedding, x, y = RotaryEmbedding(text_config()), torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)
    scores = [
        (rotated(x, embedding(torch.tensor([[at]]))) * rotated(y, embedding(torch.tensor([[at + 5]])))).sum()
        for at in (0, 3, 100)
    ]
    torch.testing.assert_close(torch.stack(scores), scores[0].expand(3), atol=1e-4, rtol=0)


MOVES = {
    "to(bfloat16)": lambda module: module.to(torch.bfloat16),
    "half()": lambda module: module.half(),
    "double()": lambda module: module.double(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "to(bfloat16) and back": lambda module: module.to(torch.bfloat16).to(torch.float32),
}


@pytest.mark.parametrize("used", [False, True], ids=["before use", "after use"])
@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_tables_stay_float32_through_copies_and_casts(move, used, new_model):
    model = new_model()
    positions = torch.arange(100)[None]
    text, vision = model.text.rotary_emb, model.vision.rotary_embedding
    expected = [text(positions), vision(torch.device("cpu"))] if used else None
    expected = expected or [
        RotaryEmbedding(model.text.config)(positions),
        PatchRotaryEmbedding(model.config.vision_config)(torch.device("cpu")),
    ]
    moved = move(model)
    assert torch.equal(moved.text.rotary_emb(positions), expected[0])
    assert torch.equal(moved.vision.rotary_embedding(torch.device("cpu")), expected[1])
    assert moved.text.rotary_emb(positions).dtype == torch.float32


def test_no_table_is_as_long_as_the_longest_position(new_text_model):
    """A table for the 10,485,760 positions of Scout would take gigabytes (vllm-ascend#693)."""
    model = new_text_model(max_position_embeddings=10_485_760)
    model(torch.tensor([[5]]), position_ids=torch.tensor([[10_485_759]]))
    held = [value for module in model.modules() for value in vars(module).values() if isinstance(value, dict)]
    tensors = [x for table in held for x in table.values() if isinstance(x, torch.Tensor)]
    assert max(x.numel() for x in tensors) < 1_000_000


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_depend_on_the_length_are_refused(kind, text_config):
    config = text_config()
    config.rope_parameters = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(ValueError, match=f"'{kind}'.*default"):
        frequencies(config)


def test_patches_turn_by_column_first_then_by_row(full_config):
    config = full_config().vision_config
    rotation = PatchRotaryEmbedding(config)(torch.device("cpu"))[0]
    angles = torch.atan2(rotation[..., 1], rotation[..., 0])
    # d_head 16: four pairs turn with the column, four with the row; the first of each at full speed, from 1.
    assert angles.shape == (17, 8)
    columns, rows = torch.arange(16) % 4 + 1.0, torch.arange(16) // 4 + 1.0
    wrapped = [torch.atan2(axis.sin(), axis.cos()) for axis in (columns, rows)]
    torch.testing.assert_close(angles[:16, 0], wrapped[0])
    torch.testing.assert_close(angles[:16, 4], wrapped[1])
    assert torch.equal(rotation[16], torch.tensor([1.0, 0.0]).expand(8, 2))  # the class token is not turned


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_patch_rotation_has_the_bits_of_transformers(dtype, full_config):
    config = full_config().vision_config
    q = torch.randn(3, 17, 2, 16).to(dtype)
    complex_form = theirs.Llama4VisionRotaryEmbedding(config)(q)
    expected, _ = theirs.vision_apply_rotary_emb(q, q, freqs_ci=complex_form)
    assert torch.equal(rotated(q, PatchRotaryEmbedding(config)(torch.device("cpu"))), expected)
