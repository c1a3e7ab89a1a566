"""Known faults of other Llama 4 code about chunks, padding, packing, temperature and rotation, absent here.

Each docstring says where it went wrong. The reference is the definition, or the same tokens in a simpler pass.
"""

import math

import pytest
import torch

from llama4lab.model.rope import frequencies

KERNELS = ["auto", "eager", "sdpa"]
ROPE = {"rope_type": "llama3", "rope_theta": 500000.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192}


@pytest.fixture(scope="module")
def model(new_text_model):
    return new_text_model()


@pytest.fixture(params=KERNELS)
def kernel(request, model):
    model.attn = request.param
    yield request.param
    model.attn = "auto"


@torch.no_grad()
def logits(model, ids, **options) -> torch.Tensor:
    return model(ids, **options).logits


@torch.no_grad()
def seen(model, name: str, ids, **options) -> torch.Tensor:
    store = []
    with model.hook_points().module(name).register_forward_hook(lambda module, args, x: store.append(x)):
        model(ids, **options)
    return store[0]


@pytest.mark.parametrize("length", [7, 8, 9, 16, 17])
def test_attention_ends_at_chunk_borders_and_nowhere_else(length, model, random_ids):
    """transformers#37351: chunked attention went wrong from the second chunk on."""
    pattern = seen(model, "layers.0.self_attn.pattern", random_ids(1, length))[0, 0]
    for query in range(length):
        assert pattern[query].nonzero().flatten().tolist() == list(range(query // 8 * 8, query + 1))


def test_nope_layers_attend_across_chunks(model, random_ids):
    pattern = seen(model, "layers.3.self_attn.pattern", random_ids(1, 30))[0, 0]
    assert (pattern > 0).equal(torch.ones(30, 30).tril().bool())


def test_batches_of_several_rows_work_without_the_fused_kernel(model, random_ids, kernel):
    """transformers#37322: the eager mask of a batch was two to four times too wide."""
    ids = random_ids(4, 19)
    alone = torch.cat([logits(model, row[None]) for row in ids])
    torch.testing.assert_close(logits(model, ids), alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("padding", [1, 3, 8, 11])
def test_left_padding_does_not_shift_the_chunks(padding, model, random_ids, kernel):
    """transformers#40214: chunks were counted from the start of the padding."""
    ids = random_ids(1, 20)
    padded = torch.nn.functional.pad(ids, (padding, 0))
    shifted = logits(model, padded, attention_mask=(padded != 0).long())[:, padding:]
    torch.testing.assert_close(shifted, logits(model, ids), atol=1e-5, rtol=0)


@pytest.mark.parametrize("padding", [1, 5, 8])
def test_temperature_does_not_count_padding(padding, model, random_ids):
    """N2: transformers counts it; a padded prompt then differs from the prompt alone by up to 0.97."""
    ids = random_ids(1, 20)
    padded = torch.nn.functional.pad(ids, (padding, 0))
    q = seen(model, "layers.3.self_attn.q_rot", padded, attention_mask=(padded != 0).long())[:, padding:]
    torch.testing.assert_close(q, seen(model, "layers.3.self_attn.q_rot", ids), atol=1e-5, rtol=0)


def test_temperature_counts_positions_from_zero_and_adds_one(model, random_ids):
    """Position floor_scale - 1 = 7 is the first that is sharpened."""
    ids = random_ids(1, 30)
    q, q_rot = (seen(model, f"layers.3.self_attn.{name}", ids)[0] for name in ("q", "q_rot"))
    for position in range(30):
        factor = 1 + 0.5 * math.log1p((position + 1) // 8)
        torch.testing.assert_close(q_rot[position], q[position] * factor)
    assert torch.equal(q_rot[:7], q[:7])


@pytest.mark.parametrize("setting", [True, False])
def test_temperature_obeys_the_config_in_nope_layers_alone(setting, new_text_model, random_ids):
    """vllm#16439, #16216: on or off by a default of the program instead of the config."""
    model, ids = new_text_model(attn_temperature_tuning=setting, use_qk_norm=False), random_ids(1, 30)
    q, q_rot = (seen(model, f"layers.3.self_attn.{name}", ids) for name in ("q", "q_rot"))
    assert torch.equal(q, q_rot) != setting
    norms = [seen(model, f"layers.0.self_attn.{name}", ids).norm(dim=-1) for name in ("q", "q_rot")]
    torch.testing.assert_close(*norms)  # a rotation, and nothing else


@torch.no_grad()
def test_temperature_works_in_bfloat16_and_keeps_the_dtype(new_text_model, random_ids):
    """D2: Meta's code promotes the queries to float32 and stops."""
    model = new_text_model(dtype=torch.bfloat16)
    ids = random_ids(1, 30)
    assert seen(model, "layers.3.self_attn.q_rot", ids).dtype == torch.bfloat16
    cache = model(ids[:, :20], use_cache=True).cache
    assert model(ids[:, 20:], cache=cache).logits.isfinite().all()
    assert cache.layers[3].keys.dtype == torch.bfloat16


@pytest.mark.parametrize("use_cache", [True, False])
def test_packed_documents_do_not_see_each_other(use_cache, model, random_ids, kernel):
    """N3: with its default cache, transformers attends across documents whose positions restart; off by up to 8.6."""
    lengths, ids = [5, 1, 11, 13], random_ids(1, 30)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    packed = logits(model, ids, position_ids=positions, use_cache=use_cache)
    apart = torch.cat([logits(model, document) for document in ids.split(lengths, 1)], 1)
    torch.testing.assert_close(packed, apart, atol=1e-5, rtol=0)


def test_packed_documents_may_differ_from_row_to_row_and_be_padded(model, random_ids, kernel):
    ids = random_ids(2, 20)
    ids[1, :4] = 0
    positions = torch.stack([torch.cat([torch.arange(7), torch.arange(13)]), torch.arange(20) - 4])
    positions[1, 12:] = torch.arange(8)
    mask = (ids != 0).long()
    packed = logits(model, ids, position_ids=positions.clamp(min=0), attention_mask=mask)
    for row, start, stop in ((0, 0, 7), (0, 7, 20), (1, 4, 12), (1, 12, 20)):
        alone = logits(model, ids[row : row + 1, start:stop])
        torch.testing.assert_close(packed[row : row + 1, start:stop], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["boolean", "additive", "of each head"])
def test_a_mask_of_four_dimensions_keeps_the_chunks(kind, model, random_ids, kernel):
    """N4: transformers uses it for both kinds of layers and loses the chunks; off by 8.3."""
    ids = random_ids(2, 20)
    mask = torch.ones(20, 20).tril().bool().expand(2, 1, 20, 20)
    if kind == "additive":
        mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    if kind == "of each head":
        mask = mask.expand(2, 4, 20, 20)
    torch.testing.assert_close(logits(model, ids, attention_mask=mask), logits(model, ids), atol=1e-5, rtol=0)


def test_a_mask_of_four_dimensions_hides_what_it_hides(model, random_ids, kernel):
    ids = random_ids(1, 20)
    mask = torch.ones(20, 20).tril().bool()
    mask[:, 2] = False
    mask[2, 2] = True  # the token itself sees itself
    pattern = seen(model, "layers.3.self_attn.pattern", ids, attention_mask=mask[None, None])[0]
    assert (pattern[:, 3:, 2] == 0).all()
    assert (pattern[:, 3:, 1] > 0).all()


def test_masks_of_each_kind_of_layer_are_used_in_theirs(model, random_ids, kernel):
    ids = random_ids(1, 20)
    causal, narrow = torch.ones(20, 20).tril().bool(), torch.ones(20, 20).tril().triu(-2).bool()
    masks = {"full_attention": narrow[None, None], "chunked_attention": causal[None, None]}
    assert (seen(model, "layers.3.self_attn.pattern", ids, attention_mask=masks)[0, 0] > 0).equal(narrow)
    border = torch.arange(20) // 8
    chunks = causal & (border[:, None] == border)
    assert (seen(model, "layers.0.self_attn.pattern", ids, attention_mask=masks)[0, 0] > 0).equal(chunks)


def test_without_a_chunk_size_every_layer_attends_to_everything(new_text_model, random_ids):
    """D7, llama-models#383, transformers#45002: null in the config of Llama-Guard-4 is an error there."""
    model, ids = new_text_model(attention_chunk_size=None), random_ids(2, 30)
    huge = new_text_model(attention_chunk_size=10_000)
    assert torch.equal(logits(model, ids), logits(huge, ids))
    pattern = seen(model, "layers.0.self_attn.pattern", ids)[0, 0]
    assert (pattern > 0).equal(torch.ones(30, 30).tril().bool())
    generated = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    assert generated.shape == (2, 35)


def test_layers_that_the_config_calls_full_are_not_chunked(new_text_model, random_ids):
    model = new_text_model(layer_types=["full_attention"] * 5)
    pattern = seen(model, "layers.0.self_attn.pattern", random_ids(1, 30))[0, 0]
    assert (pattern > 0).equal(torch.ones(30, 30).tril().bool())
    q, q_rot = (seen(model, f"layers.0.self_attn.{name}", random_ids(1, 30)) for name in ("q", "q_rot"))
    assert not torch.equal(q, q_rot)  # RoPE and chunks are two settings


def test_the_scaling_of_rope_is_that_of_the_config(text_config):
    """D6, llama-models#322: converted checkpoints had factor 8 and 4 for 16 and 1; 35 of 64 frequencies differ."""
    scout, other = (
        frequencies(text_config(head_dim=128, rope_parameters=ROPE | {"factor": factor, "high_freq_factor": high}))[0]
        for factor, high in ((16.0, 1.0), (8.0, 4.0))
    )
    plain = frequencies(text_config(head_dim=128))[0]
    turns = 8192 * plain / (2 * math.pi)
    torch.testing.assert_close(scout, torch.where(turns < 1, plain / 16, plain))
    assert (scout != other).sum() == 35


@pytest.mark.parametrize("start", [70_000, 1_000_000])
def test_far_positions_attend_and_rotate_as_near_ones(start, new_text_model, random_ids):
    """ik_llama.cpp#335: garbage from 64k on. RoPE sees distances, so a shift by whole chunks changes nothing."""
    model, ids = new_text_model(attn_temperature_tuning=False), random_ids(1, 20)
    near, far = torch.arange(20)[None], torch.arange(start, start + 20)[None]
    assert start % 8 == 0
    near, far = (logits(model, ids, position_ids=positions) for positions in (near, far))
    torch.testing.assert_close(far, near, atol=0.2 if start > 100_000 else 0.02, rtol=0)  # float32 phases


@pytest.mark.parametrize("start", [3, 6, 13])
def test_positions_that_start_inside_a_chunk_end_at_its_border(start, model, random_ids, kernel):
    ids, positions = random_ids(1, 12), torch.arange(start, start + 12)
    whole = torch.cat([random_ids(1, start, seed=2), ids], 1)
    pattern = seen(model, "layers.0.self_attn.pattern", ids, position_ids=positions[None])[0, 0]
    chunks = torch.ones(12, 12).tril().bool() & (positions[:, None] // 8 == positions // 8)
    assert (pattern > 0).equal(chunks)
    border = 8 - start % 8  # from there on, nothing before the pass is in the chunk
    z = seen(model, "layers.0.self_attn.z", ids, position_ids=positions[None])[:, border:]
    torch.testing.assert_close(z, seen(model, "layers.0.self_attn.z", whole)[:, start + border :], atol=1e-5, rtol=0)


def test_query_and_key_are_normed_head_by_head(model, random_ids):
    """vllm#16311: over all heads together; MMLU-Pro 0.686 for 0.715."""
    ids = random_ids(1, 20)
    for name in ("q_rot", "k_rot"):
        x = seen(model, f"layers.0.self_attn.{name}", ids)
        torch.testing.assert_close(x.pow(2).mean(-1), torch.ones(x.shape[:-1]), atol=1e-3, rtol=0)


def test_nope_layers_have_no_query_and_key_norm(model, random_ids):
    ids = random_ids(1, 20)
    k, k_rot = (seen(model, f"layers.3.self_attn.{name}", ids) for name in ("k", "k_rot"))
    assert torch.equal(k, k_rot)


@torch.no_grad()
def test_inputs_are_left_as_they_were(model, random_ids, kernel):
    """transformers#47741: models that write into a caller's tensors."""
    ids, positions, mask = random_ids(2, 20), torch.arange(20).repeat(2, 1), torch.ones(2, 20, dtype=torch.long)
    mask[1, :5] = 0
    before = [x.clone() for x in (ids, positions, mask)]
    model(ids, position_ids=positions, attention_mask=mask, labels=ids)
    assert all(torch.equal(x, y) for x, y in zip((ids, positions, mask), before, strict=True))
