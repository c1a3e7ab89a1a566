"""Whole checkpoints in each format: the packed model is the dense model of the same numbers, in all that it does."""

import pytest
import torch
from torch import nn

import llama4lab as lab
from llama4lab.model.experts import Experts
from llama4lab.model.packed_linear import PackedLinear


def dense_twin(model):
    """A model of the same class whose weights are the numbers that the packed one stands for."""
    twin = type(model)(model.config).eval()
    twin.load_state_dict(model.state_dict())
    twin.prompter = model.prompter if hasattr(model, "prompter") else None
    return twin


def batch_for(model, image_batch, random_ids):
    return {"input_ids": random_ids(2, 14)} if model.vision is None else image_batch([[2], [1]])


def test_the_logits_are_those_of_the_dense_model(saved_as, format, image_batch, random_ids):
    model = lab.load(saved_as(format))
    twin = dense_twin(model)
    batch = batch_for(model, image_batch, random_ids)
    with torch.no_grad():
        ours, theirs = model(**batch).logits, twin(**batch).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert ours.std() > 0.1


def test_gradients_reach_activations_and_are_those_of_the_dense_model(saved_as, format, image_batch, random_ids):
    model = lab.load(saved_as(format))
    batch = batch_for(model, image_batch, random_ids)
    found = []
    for each in (model, dense_twin(model)):
        embedded = each.text.embed_tokens(batch["input_ids"]).detach().requires_grad_()
        each(inputs_embeds=embedded, attention_mask=batch.get("attention_mask")).logits[:, -1, 5].sum().backward()
        found.append(embedded.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5 * found[1].abs().max().item())
    assert found[0].abs().sum() > 0


def test_sweeps_and_routing_are_those_of_the_dense_model(saved_as, format, random_ids):
    model = lab.load(saved_as(format))
    clean, corrupted, metric = random_ids(1, 10), random_ids(1, 10, seed=1), lab.metrics.logit_diff(5, 7)
    found, routes = [], []
    for each in (model, dense_twin(model)):
        options = {"at": "layers.*.resid_pre", "over": ["layer", "position"], "metric": metric, "progress": False}
        found.append(lab.sweep(each, clean, corrupted, **options).tensor("effect"))
        with lab.rerouted(each, layers=1, ban=2):
            run = lab.record(each, clean, at="layers.1.feed_forward.router.indices")
        routes.append(run["layers.1.feed_forward.router.indices"])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=2e-5)
    assert torch.equal(routes[0], routes[1])
    assert 2 not in routes[0]


def test_weights_stay_packed_and_can_be_read(saved_as, format, image_batch, random_ids):
    model = lab.load(saved_as(format))
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    banks = [module for module in model.modules() if isinstance(module, Experts)]
    before = [module.packed.nbytes for module in packed]
    with torch.no_grad():
        model(**batch_for(model, image_batch, random_ids))
    assert [module.packed.nbytes for module in packed] == before
    if format == "plain, unfused":
        assert not packed
        return
    for module in packed:
        assert module.weight.shape == (module.out_features, module.in_features)
        assert module.packed.nbytes < 0.6 * module.weight.nbytes
    for experts in banks:
        assert not isinstance(experts.down_proj, nn.Parameter)
        assert experts.gate_up_proj[1].shape == experts.gate_up_proj.shape[1:]
        with pytest.raises(IndexError, match="experts 0 to 3"):
            experts.down_proj[4]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_model_can_be_moved_to_another_dtype(saved_as, dtype, image_batch):
    model = lab.load(saved_as("int4")).to(dtype)
    with torch.no_grad():
        logits = model(**image_batch([[1]])).logits
    assert logits.dtype == dtype
    assert logits.isfinite().all()
