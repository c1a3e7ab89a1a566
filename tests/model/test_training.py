"""Training mode: gradients through the choice of experts, checkpointed layers, dropout, a step that learns."""

import copy

import pytest
import torch

# The newest transformers calls it activation checkpointing; the older ones of the range know this name alone.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_(en|dis)able` is deprecated:FutureWarning")


@pytest.fixture
def model(new_text_model):
    return new_text_model(num_experts_per_tok=2).train()


def gradients(model, ids, **options) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(ids, labels=ids, **options).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_gradients_reach_every_parameter(model, random_ids):
    grads = gradients(model, random_ids(4, 40))
    assert {name for name, _ in model.named_parameters()} == set(grads)
    assert [name for name, grad in grads.items() if not grad.abs().sum() > 0 or not grad.isfinite().all()] == []


def test_the_gradient_of_a_chosen_expert_is_the_change_that_its_logit_makes(new_text_model, random_ids):
    """Meta's code detaches the experts' input, which would cut this path."""
    model, ids, seen = new_text_model().train(), random_ids(2, 12), []
    weight = torch.randn(2, 12, 128)
    router = model.text.layers[1].feed_forward.router

    def keep(module, args, logits):
        logits.retain_grad()
        seen.append(logits)

    with router.logits.register_forward_hook(keep):
        (model(ids).logits * weight).sum().backward()
    chosen = int(seen[0][1, 5].argmax())

    @torch.no_grad()
    def total_with(step: float) -> float:
        def nudge(module, args, logits):
            logits = logits.clone()
            logits[1, 5, chosen] += step
            return logits

        with router.logits.register_forward_hook(nudge):
            return (model(ids).logits * weight).double().sum().item()

    measured = (total_with(0.01) - total_with(-0.01)) / 0.02
    assert abs(measured) > 0.1
    assert seen[0].grad[1, 5, chosen].item() == pytest.approx(measured, rel=0.02)
    others = [expert for expert in range(4) if expert != chosen]
    assert seen[0].grad[1, 5, others].abs().sum() == 0  # what was not chosen has no gradient


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_checkpointed_layers_give_the_same_gradients(reentrant, new_model, image_batch):
    model, batch = new_model().train(), image_batch([[2], [1]])
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    grads = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.zero_grad()
        model(**batch, labels=labels).loss.backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert set(grads[0]) == set(grads[1])
    for name in grads[0]:
        torch.testing.assert_close(grads[1][name], grads[0][name], atol=1e-6, rtol=1e-5)


def test_checkpointing_runs_each_layer_twice_and_can_be_switched_off(model, random_ids):
    calls = []
    # A pre-hook: the second run of a layer ends as soon as it has what the backward pass needs.
    model.text.layers[2].register_forward_pre_hook(lambda module, args: calls.append(1))
    gradients(model, random_ids(1, 9))
    model.gradient_checkpointing_enable()
    gradients(model, random_ids(1, 9))
    model.gradient_checkpointing_disable()
    gradients(model, random_ids(1, 9))
    assert len(calls) == 1 + 2 + 1


def test_a_cache_asked_for_with_checkpointing_is_not_filled_twice(model, random_ids):
    model.gradient_checkpointing_enable()
    output = model(random_ids(1, 9), labels=random_ids(1, 9), use_cache=True)
    output.loss.backward()
    assert output.cache is None or output.cache.get_seq_length() == 9


def test_generation_in_training_with_checkpointing_gives_the_tokens_of_the_model(model, random_ids):
    ids = random_ids(2, 9)
    asked = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    expected = model.generate(ids, **asked)
    model.gradient_checkpointing_enable()
    assert torch.equal(model.generate(ids, **asked), expected)


def test_a_filled_cache_is_refused_where_layers_are_computed_twice(model, random_ids):
    ids = random_ids(1, 9)
    with torch.no_grad():
        cache = model(ids[:, :5], use_cache=True).cache
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing; call inside"):
        model(ids[:, 5:], cache=cache)


def test_hook_points_work_inside_checkpointed_layers(model, random_ids):
    ids, seen = random_ids(1, 9), []
    model.gradient_checkpointing_enable()
    with model.hook_points().module("layers.1.resid_post").register_forward_hook(lambda m, a, x: seen.append(x)):
        model(ids, labels=ids).loss.backward()
    assert torch.equal(seen[0], seen[-1])


def test_training_makes_no_cache_unless_asked(model, random_ids):
    assert model(random_ids(1, 9)).cache is None


@pytest.mark.parametrize("kernel", ["auto", "sdpa", "eager"])
def test_dropout_acts_in_training_alone(kernel, new_text_model, random_ids):
    model, ids = new_text_model(attention_dropout=0.5), random_ids(2, 20)
    model.attn = kernel
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model(ids).logits)
        model.train()
        assert not torch.allclose(model(ids).logits, model(ids).logits)


def test_without_dropout_training_mode_gives_the_same_numbers(new_text_model, random_ids):
    model, ids = new_text_model(), random_ids(2, 20)
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(model.train()(ids).logits, expected)


def test_a_few_steps_learn_a_sequence(model, random_ids):
    ids = random_ids(1, 24)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_the_chunk_size_of_a_layer_can_be_changed_between_passes(new_text_model, random_ids):
    model, ids = new_text_model(), random_ids(2, 20)
    other = new_text_model(attention_chunk_size=4)
    for layer in model.text.layers:
        if layer.self_attn.chunk_size is not None:
            layer.self_attn.chunk_size = 4
    with torch.no_grad():
        assert torch.equal(model(ids).logits, other(ids).logits)


def test_the_loss_ignores_labels_of_minus_100_and_shifts_by_one(new_text_model, random_ids):
    model, ids = new_text_model(), random_ids(2, 20)
    labels = ids.clone()
    labels[:, :5] = labels[:, 12:] = -100
    with torch.no_grad():
        output = model(ids, labels=labels)
    log_probabilities = output.logits[:, 4:11].log_softmax(-1)
    expected = -log_probabilities.gather(-1, ids[:, 5:12, None]).mean()
    torch.testing.assert_close(output.loss, expected)


def test_gradients_flow_to_input_vectors(new_text_model, random_ids):
    model = new_text_model()
    vectors = copy.deepcopy(model.get_input_embeddings()(random_ids(2, 9)).detach()).requires_grad_()
    model(inputs_embeds=vectors).logits[:, -1].sum().backward()
    assert (vectors.grad.abs().sum(-1)[:, 8] > 0).all()
