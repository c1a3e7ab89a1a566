"""Images beside transformers: several tiles, ragged batches, every stage of the vision tower."""

import pytest
import torch

BATCHES = {
    "one image of one tile": [[1]],
    "one image of three tiles": [[3]],
    "two images in a row": [[2, 3]],
    "rows alike": [[2], [2]],
    "ragged tiles": [[3], [1, 1]],
    "a row without image": [[2], []],
    "three rows": [[1], [5], [2, 1, 1]],
}
STAGES = {  # our hook point -> transformers' module
    "vision_model.patch_embed": "vision_model.patch_embedding",
    "vision_model.layers.0.self_attn.out": "vision_model.model.layers.0.self_attn",
    "vision_model.layers.0.resid_post": "vision_model.model.layers.0",
    "vision_model.layers.0.mlp.out": "vision_model.model.layers.0.mlp",
    "vision_model.layers.1.self_attn.out": "vision_model.model.layers.1.self_attn",
    "vision_model.layers.1.resid_post": "vision_model.model.layers.1",
    "vision_model.final_norm": "vision_model.layernorm_post",
    "vision_model.adapter": "vision_model.vision_adapter",
    "image_features": "multi_modal_projector",
}


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def pair(request, twins):
    ours, theirs = twins(dtype=request.param)
    ours.attn = "sdpa" if request.param == torch.bfloat16 else "auto"
    return ours, theirs


@torch.no_grad()
@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES)
def test_logits_of_text_and_images_equal_those_of_transformers(rows, twins_without_temperature, image_batch):
    """Without temperature, which transformers miscounts under padding; the next test has it."""
    ours, theirs = twins_without_temperature
    batch = image_batch(rows)
    logits, expected = (model(**batch).logits[batch["attention_mask"].bool()] for model in (ours, theirs))
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=0)
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))


@pytest.fixture(scope="module")
def twins_without_temperature(twins):
    return twins(attn_temperature_tuning=False)


@torch.no_grad()
@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES)
def test_each_row_of_a_batch_with_images_has_the_logits_it_has_alone_in_transformers(rows, twins, image_batch):
    ours, theirs = twins()
    batch = image_batch(rows)
    logits, tile = ours(**batch).logits, 0
    for row, images in enumerate(rows):
        kept = batch["attention_mask"][row].bool()
        pixels = batch["pixel_values"][tile : tile + sum(images)] if images else None
        tile += sum(images)
        alone = theirs(input_ids=batch["input_ids"][row : row + 1, kept], pixel_values=pixels).logits
        torch.testing.assert_close(logits[row, kept], alone[0], atol=2e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("tiles", [1, 3])
def test_bfloat16_logits_of_text_and_images_equal_those_of_transformers_to_the_bit(tiles, twins, image_batch):
    ours, theirs = twins(dtype=torch.bfloat16)
    ours.attn = "sdpa"
    batch = image_batch([[tiles]])
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    assert torch.equal(ours(**batch).logits, theirs(**batch).logits)


@torch.no_grad()
def test_every_stage_of_the_vision_tower_equals_transformers_to_the_bit(pair, image_batch):
    ours, theirs = pair
    batch, seen, expected = image_batch([[3]]), {}, {}
    batch["pixel_values"] = batch["pixel_values"].to(ours.dtype)
    handles = []
    for name, path in STAGES.items():

        def keep(module, args, x, name=name):
            seen[name] = x

        def keep_theirs(module, args, x, name=name):
            expected[name] = x[0] if isinstance(x, tuple) else x

        handles.append(ours.hook_points().module(name).register_forward_hook(keep))
        handles.append(theirs.get_submodule(path).register_forward_hook(keep_theirs))
    for model in (ours, theirs):
        model(**batch)
    for handle in handles:
        handle.remove()
    unequal = [name for name in STAGES if not torch.equal(seen[name].flatten(), expected[name].flatten())]
    assert unequal == []


@torch.no_grad()
def test_image_features_computed_before_give_the_same_logits(pair, image_batch):
    ours, _ = pair
    batch = image_batch([[3], [1, 1]])
    expected = ours(**batch).logits
    features = ours.get_image_features(batch.pop("pixel_values"))
    assert torch.equal(ours(**batch, mm_encoder_outputs={"image": features}).logits, expected)


@torch.no_grad()
def test_text_alone_through_the_model_with_vision_equals_transformers(twins, random_ids):
    ours, theirs = twins()
    ids = random_ids(2, 20)
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=2e-5, rtol=0)


@torch.no_grad()
def test_generation_after_an_image_gives_the_tokens_of_transformers(twins, image_batch):
    ours, theirs = twins()
    batch = image_batch([[3]])
    asked = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(ours.generate(**batch, **asked), theirs.generate(**batch, **asked))


@torch.no_grad()
def test_generation_after_ragged_images_gives_each_row_the_tokens_it_gets_alone(twins, image_batch):
    ours, theirs = twins()
    batch, asked = image_batch([[3], [1, 1]]), {"max_new_tokens": 12, "do_sample": False}
    together = ours.generate(**batch, **asked)[:, -12:]
    for row, tiles in enumerate((slice(0, 3), slice(3, 5))):
        ids = batch["input_ids"][row : row + 1, batch["attention_mask"][row].bool()]
        alone = theirs.generate(input_ids=ids, pixel_values=batch["pixel_values"][tiles], **asked)
        assert torch.equal(together[row], alone[0, -12:])
