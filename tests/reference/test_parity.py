"""Logits beside those of transformers on the same random weights: 24 configs x 6 lengths, batches, padding.

In float32 the two differ by the order of sums: transformers multiplies every token with every expert and puts a mask
over all keys. In bfloat16 a difference of one bit in the residual stream can flip a routing choice, so a tolerance
would say nothing. But with `model.attn = "sdpa"` llama4lab makes the very attention calls of transformers, its sparse
experts keep the bits (a row of a matrix product does not depend on the other rows), and the logits are bit for bit
those of transformers.
"""

import random
from itertools import combinations, count, product

import pytest
import torch

LENGTHS = (1, 7, 8, 9, 40, 130)  # the chunk is 8: one token, around one chunk, several chunks
SCOUT_ROPE = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 16.0, "low_freq_factor": 1.0}
SCOUT_ROPE |= {"high_freq_factor": 1.0, "original_max_position_embeddings": 8192}
CHOICES = {
    "use_qk_norm": (True, False),
    "interleave_moe_layer_step": (1, 2),
    "attention_chunk_size": (8, None),
    "attn_temperature_tuning": (True, False),
    "rope_parameters": ({"rope_type": "default", "rope_theta": 500000.0}, SCOUT_ROPE),
    "num_experts_per_tok": (1, 2),
    "no_rope_layer_interval": (4, 100),  # every 4th layer is NoPE, or none is
    "attention_bias": (False, True),
    "num_key_value_heads": (2, 4, 1),
}


def sample(number: int) -> list[dict]:
    """24 random settings for each choice, as indices."""
    draw = random.Random(number)
    return [{name: draw.randrange(len(values)) for name, values in CHOICES.items()} for _ in range(24)]


def pairs_missing(rows: list[dict]) -> list:
    """The pairs of settings that occur in no row together."""
    return [
        (one, i, other, j)
        for one, other in combinations(CHOICES, 2)
        for i, j in product(range(len(CHOICES[one])), range(len(CHOICES[other])))
        if not any(row[one] == i and row[other] == j for row in rows)
    ]


CONFIGS = next(rows for rows in map(sample, count()) if not pairs_missing(rows))
EVERY_CONFIG = [
    dict(zip(CHOICES, row, strict=True)) for row in product(*(range(len(values)) for values in CHOICES.values()))
]


def settings(row: dict) -> dict:
    return {name: CHOICES[name][index] for name, index in row.items()}


def label(row: dict) -> str:
    return "".join(map(str, row.values()))


@torch.no_grad()
def assert_same_text_logits(ours, theirs, random_ids, length: int):
    ids = random_ids(2, length, seed=length)
    expected = theirs(ids, use_cache=False).logits
    if ours.dtype == torch.bfloat16:
        ours.attn = "sdpa"
        assert torch.equal(ours(ids).logits, expected)
        return
    for kernel in ("auto", "sdpa", "eager"):
        ours.attn = kernel
        if kernel == "eager":  # like with like: transformers' own two kernels differ by up to 2.2e-5 in these configs
            theirs.set_attn_implementation("eager")
            expected = theirs(ids, use_cache=False).logits
            theirs.set_attn_implementation("sdpa")
        logits = ours(ids).logits
        torch.testing.assert_close(logits, expected, atol=2e-5, rtol=0)
        assert torch.equal(logits.argmax(-1), expected.argmax(-1))


@pytest.fixture(scope="module")
def pair_of(text_twins):
    """The twins of a config and dtype, made once for all lengths."""
    made = {}

    def get(row: dict, dtype: torch.dtype):
        key = (label(row), dtype)
        if key not in made:
            made.clear()
            made[key] = text_twins(dtype=dtype, **settings(row))
        return made[key]

    return get


@pytest.mark.parametrize("row", CONFIGS, ids=label)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_text_logits_equal_those_of_transformers_at_every_length(dtype, row, pair_of, random_ids):
    ours, theirs = pair_of(row, dtype)
    for length in LENGTHS:
        assert_same_text_logits(ours, theirs, random_ids, length)


@pytest.mark.slow
@pytest.mark.parametrize("row", EVERY_CONFIG, ids=label)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_text_logits_equal_those_of_transformers_in_every_config(dtype, row, pair_of, random_ids):
    ours, theirs = pair_of(row, dtype)
    for length in LENGTHS:
        assert_same_text_logits(ours, theirs, random_ids, length)


def test_the_24_configs_hold_every_pair_of_settings():
    assert pairs_missing(CONFIGS) == []
    assert pairs_missing(CONFIGS[:3]) != []


@pytest.fixture(scope="module")
def text(text_twins):
    return text_twins()


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("length", [8, 25])
def test_a_batch_gives_each_row_the_logits_it_has_alone(batch, length, text, random_ids):
    ours, theirs = text
    ids = random_ids(batch, length)
    together = ours(ids).logits
    alone = torch.cat([theirs(row[None]).logits for row in ids])
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["auto", "eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("padding", [1, 3, 8, 11, 23])
def test_a_padded_row_has_the_logits_it_has_alone(padding, side, kernel, text, random_ids):
    """The temperature of NoPE layers too, which transformers counts from the start of the padding."""
    ours, theirs = text
    ours.attn = kernel
    long, short = random_ids(1, 30), random_ids(1, 30 - padding, seed=1)
    zeros = torch.zeros(1, padding, dtype=torch.long)
    row = torch.cat([zeros, short] if side == "left" else [short, zeros], dim=1)
    mask = torch.cat([torch.ones_like(long), (row != 0).long()])
    logits = ours(torch.cat([long, row]), attention_mask=mask).logits
    kept = slice(padding, None) if side == "left" else slice(0, 30 - padding)
    torch.testing.assert_close(logits[1:, kept], theirs(short).logits, atol=2e-5, rtol=0)
    torch.testing.assert_close(logits[:1], theirs(long).logits, atol=2e-5, rtol=0)
    assert logits.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("start", [8180, 65_536, 1_000_000, 10_485_748])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_far_positions_give_the_logits_of_transformers(dtype, start, text_twins, random_ids):
    """Inside a chunk and without temperature: transformers counts both from the start of the row."""
    ours, theirs = text_twins(dtype=dtype, attention_chunk_size=8192, attn_temperature_tuning=False)
    ours.attn = "sdpa" if dtype == torch.bfloat16 else "auto"
    ids, positions = random_ids(1, 12), torch.arange(start, start + 12)[None]
    logits = ours(ids, position_ids=positions).logits
    expected = theirs(ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(logits, expected, atol=0 if dtype == torch.bfloat16 else 2e-5, rtol=0)
