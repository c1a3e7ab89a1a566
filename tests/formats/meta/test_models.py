"""Whole checkpoints in Meta's format: the loaded model is the one that was written."""

import pytest
import torch

import llama4lab as lab

SCOUT_ROPE = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 16.0, "low_freq_factor": 1.0}
SCOUT_ROPE |= {"high_freq_factor": 1.0, "original_max_position_embeddings": 8192}
CONFIGS = [
    (1, {}),
    (2, {"num_experts_per_tok": 2, "interleave_moe_layer_step": 1}),
    (2, {"use_qk_norm": False, "num_local_experts": 8, "attn_temperature_tuning": False}),
    (4, {"rope_parameters": SCOUT_ROPE, "attention_chunk_size": None}),
    (4, {"moe_layers": []}),
]


@torch.no_grad()
@pytest.mark.parametrize(("ranks", "changes"), CONFIGS, ids=str)
def test_text_logits_are_those_of_the_model_to_the_bit(write, small_text_model, changes, ranks, random_ids):
    model = small_text_model(num_key_value_heads=4, **changes)
    loaded = lab.load(write(model, ranks))
    for length in (1, 9, 40):
        ids = random_ids(2, length, seed=length)
        assert loaded(ids).logits.equal(model(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize(("ranks", "dtype"), [(1, torch.bfloat16), (2, torch.float32), (4, torch.bfloat16)], ids=str)
def test_logits_of_text_and_images_are_those_of_the_model_to_the_bit(write, small_model, ranks, dtype, image_batch):
    model = small_model(num_key_value_heads=4, dtype=dtype)
    loaded = lab.load(write(model, ranks), dtype="auto")
    assert loaded.dtype == dtype
    batch = image_batch([[2], [1, 1]])
    assert loaded(**batch).logits.equal(model(**batch).logits)
