import pytest
import torch


@pytest.mark.parametrize("top_k", [1, 2])
def test_one_grouped_call_equals_a_product_for_each_expert(new_text_model, random_ids, monkeypatch, top_k):
    model, ids = new_text_model(num_experts_per_tok=top_k, num_local_experts=8), random_ids(2, 21)
    plain = model(ids).logits
    plain.square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    monkeypatch.setattr("llama4lab.model.experts._one_call_is_faster", lambda rows: True)
    grouped = model(ids).logits
    grouped.square().mean().backward()
    torch.testing.assert_close(grouped, plain, rtol=1e-5, atol=1e-5)
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-5, msg=name)
