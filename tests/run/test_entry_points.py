"""However a model was loaded, it takes texts and shows its tokenizer."""

import torch

import llama4lab as lab


def test_a_model_from_transformers_loader_takes_texts_too(tiny):
    other = lab.HookedLlama4.from_pretrained(tiny.folder, dtype=torch.float32).eval()
    assert other.tokenizer.get_vocab() == tiny.tokenizer.get_vocab()
    text = "The capital of France is"
    assert torch.equal(lab.record(other, text).logits, lab.record(tiny, text).logits)


def test_a_model_without_a_folder_takes_token_ids(tiny):
    bare = lab.HookedLlama4(tiny.config).eval()
    assert bare.tokenizer is None
    assert lab.record(bare, [5, 6, 7]).logits.shape[:2] == (1, 3)
