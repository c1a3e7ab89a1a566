"""Gradients of all parameters beside those of transformers, through router gates, experts and images."""

import pytest
import torch

CONFIGS = [
    {},
    {"num_experts_per_tok": 2, "interleave_moe_layer_step": 1},
    {"use_qk_norm": False, "num_key_value_heads": 1},
    {"attention_bias": True, "attn_temperature_tuning": False, "num_key_value_heads": 4},
]


def assert_gradients_equal(ours, theirs, relative: float = 1e-4):
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    errors = {}
    for name, parameter in ours.named_parameters():
        if expected[name] is None or parameter.grad is None:
            assert (expected[name] is None) == (parameter.grad is None), name
            continue
        # The bias of a NoPE layer's keys shifts all scores of a query alike: its gradient is rounding around zero.
        size = expected[name].norm().clamp(min=1e-3 if name.endswith("k_proj.bias") else 1e-30)
        errors[name] = ((parameter.grad - expected[name]).norm() / size).item()
    assert len(errors) > 50
    assert {name: error for name, error in errors.items() if error > relative} == {}


@pytest.mark.parametrize("kernel", ["auto", "eager", "sdpa"])
@pytest.mark.parametrize("changes", CONFIGS, ids=str)
def test_gradients_of_all_parameters_equal_those_of_transformers(changes, kernel, text_twins, random_ids):
    ours, theirs = text_twins(**changes)
    ours.attn = kernel
    ids = random_ids(2, 30)
    for model in (ours, theirs):
        loss = model(ids, labels=ids).loss
        loss.backward()
    assert_gradients_equal(ours, theirs)


def test_the_loss_equals_that_of_transformers_with_ignored_labels(text_twins, random_ids):
    ours, theirs = text_twins()
    ids, labels = random_ids(2, 30), random_ids(2, 30)
    labels[:, :7] = -100
    mine, other = (model(ids, labels=labels).loss for model in (ours, theirs))
    torch.testing.assert_close(mine, other, atol=1e-5, rtol=0)


def test_gradients_of_the_vision_tower_equal_those_of_transformers(twins, image_batch):
    ours, theirs = twins(attn_temperature_tuning=False)
    batch = image_batch([[3], [1, 1]])
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for model in (ours, theirs):
        model(**batch, labels=labels).loss.backward()
    assert_gradients_equal(ours, theirs)


def test_gradients_of_padded_rows_equal_those_of_the_rows_alone(text_twins, random_ids):
    ours, theirs = text_twins()
    ids = random_ids(2, 30)
    ids[1, :11] = 0
    weight = torch.randn(2, 30, 128)
    logits = ours(ids, attention_mask=(ids != 0).long()).logits
    (logits * weight)[ids != 0].sum().backward()
    for row, start in ((0, 0), (1, 11)):
        (theirs(ids[row : row + 1, start:]).logits * weight[row : row + 1, start:]).sum().backward()
    assert_gradients_equal(ours, theirs)


def test_gradients_of_activations_equal_those_of_transformers(text_twins, random_ids):
    ours, theirs = text_twins()
    ids, grads, expected, handles = random_ids(2, 30), {}, {}, []

    def keep(store, key):
        def hook(module, args, x):
            x = x[0] if isinstance(x, tuple) else x
            x.register_hook(lambda grad: store.update({key: grad.reshape(2, 30, -1)}))

        return hook

    pairs = [(f"layers.{i}.self_attn.out", f"model.layers.{i}.self_attn") for i in range(5)]
    pairs += [(f"layers.{i}.resid_post", f"model.layers.{i}") for i in range(5)]
    pairs += [("embed", "model.embed_tokens"), ("final_norm", "model.norm")]
    for name, path in pairs:
        handles.append(ours.hook_points().module(name).register_forward_hook(keep(grads, name)))
        handles.append(theirs.get_submodule(path).register_forward_hook(keep(expected, name)))
    for model in (ours, theirs):
        model(ids, labels=ids).loss.backward()
    for name, _ in pairs:
        error = (grads[name] - expected[name]).norm() / expected[name].norm()
        assert error < 1e-4, name
