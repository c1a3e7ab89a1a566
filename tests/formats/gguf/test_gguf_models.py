"""Whole GGUF checkpoints: the packed model is the dense model of the same numbers, in all that it does."""

from typing import Any

import pytest
import torch
from transformers import Llama4ForCausalLM, Llama4ForConditionalGeneration
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

import llama4lab as lab
from llama4lab.checkpoint.gguf.files import GgufFiles
from llama4lab.model.packed_linear import PackedLinear

AS_PUBLISHED = {"attention_chunk_size": 8192, "floor_scale": 8192, "attn_scale": 0.1}
KINDS = ["Q4_0", "Q8_0", "Q4_K", "Q6_K", "IQ2_XXS", "mixed"]


@pytest.fixture(params=KINDS)
def file(request, packed_file):
    return packed_file(request.param)


def dense_twin(model, kind=None):
    """A model, ours or transformers', whose weights are the numbers that the packed one stands for."""
    twin = (kind or type(model))._from_config(model.config).eval()
    twin.load_state_dict(model.state_dict())
    return twin


@pytest.mark.parametrize("changes", [{}, {"num_experts_per_tok": 2}, {"interleave_moe_layer_step": 1}])
def test_plain_numbers_give_the_model_that_was_written(gguf_saved, new_text_model, random_ids, changes):
    model = new_text_model(**changes)
    loaded = lab.load(gguf_saved(model, "F32"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    ids = random_ids(2, 20)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_the_packaged_checkpoint_answers_as_before(gguf_saved):
    model = lab.load()
    loaded = lab.load(gguf_saved(model, "F32"))
    ids = torch.randint(0, 1400, (2, 40))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        assert torch.equal(loaded(ids, attention_mask=mask).logits, expected)


@pytest.mark.parametrize("experts", ["resident", "offload"])
def test_the_logits_are_those_of_the_dense_model(file, experts, random_ids):
    model, ids = lab.load(file, experts=experts), random_ids(2, 14)
    mask = torch.ones_like(ids)
    with torch.no_grad():
        theirs = dense_twin(model, Llama4ForCausalLM)(ids).logits
        torch.testing.assert_close(model(ids).logits, theirs, rtol=0, atol=3e-5)
        # transformers counts padding as positions.
        mask[1, :5] = 0
        ours, theirs = (each(ids, attention_mask=mask).logits for each in (model, dense_twin(model)))
    torch.testing.assert_close(ours[mask > 0], theirs[mask > 0], rtol=0, atol=1e-5)
    assert ours.std() > 0.05


def test_matrices_stay_packed_and_can_be_read(packed_file, random_ids):
    model = lab.load(packed_file("Q4_K"))
    packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    assert set(packed) == {name for name, _ in model.named_modules() if name.endswith(("proj", "lm_head"))}
    for module in packed.values():
        assert module.packed.nbytes == module.weight.nbytes * 144 / 1024
    assert "GGUF Q4_K, blocks of 256" in repr(model.get_submodule("model.layers.0.self_attn.q_proj"))
    experts: Any = model.get_submodule("model.layers.1.feed_forward.experts")
    assert experts.gate_up_proj[3].shape == (256, 512)


def test_every_hook_point_fires_and_can_be_patched(packed_file, random_ids):
    model = lab.load(packed_file("mixed"))
    twin, ids, other = dense_twin(model), random_ids(1, 9), random_ids(1, 9, seed=1)
    run = lab.record(model, ids, at=list(model.hook_points()))
    assert set(run.names) == set(model.hook_points())
    options = {"at": "layers.*.resid_pre", "over": ["layer", "position"], "progress": False}
    options["metric"] = lab.metrics.logit_diff(5, 7)
    found = [lab.sweep(each, ids, other, **options).tensor("effect") for each in (model, twin)]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=2e-5)


def test_gradients_reach_activations_and_are_those_of_the_dense_model(file, random_ids):
    model, found = lab.load(file), []
    for each in (model, dense_twin(model)):
        embedded = each.text.embed_tokens(random_ids(1, 9)).detach().requires_grad_()
        each(inputs_embeds=embedded).logits[:, -1, 5].sum().backward()
        found.append(embedded.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5 * found[1].abs().max().item())
    assert found[0].abs().sum() > 0


def test_only_the_bytes_of_routed_experts_are_read(packed_file, random_ids, monkeypatch):
    model = lab.load(packed_file("Q4_K"), experts="offload")
    reads, read = [], GgufFiles.read

    def counted(self, name, index=None):
        reads.append((name, index, read(self, name, index).nbytes))
        return read(self, name, index)

    monkeypatch.setattr(GgufFiles, "read", counted)
    run = lab.record(model, random_ids(1, 3), at="layers.1.feed_forward.router.indices")
    routed = set(run["layers.1.feed_forward.router.indices"].flatten().tolist())
    expert = {(name, index): nbytes for name, index, nbytes in reads if ".experts." in name}
    assert {index for _, index in expert} == routed
    assert len(routed) < 4
    assert sum(expert.values()) == len(routed) * 3 * 256 * 256 // 256 * 144


def test_a_model_that_is_saved_is_a_checkpoint_of_numbers(packed_file, tmp_path, random_ids):
    model, ids = lab.load(packed_file("mixed")), random_ids(1, 9)
    model.save_pretrained(tmp_path)
    again = lab.load(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
    assert not any(isinstance(module, PackedLinear) for module in again.modules())


def test_plain_numbers_can_be_quantized_on_the_way_and_packed_ones_not(gguf_saved, packed_file, new_text_model):
    loaded = lab.load(gguf_saved(new_text_model(), "F16"), quantize="int8")
    assert sum(isinstance(module, PackedLinear) for module in loaded.modules()) == 5 * 3
    with pytest.raises(ValueError, match="are quantized already"):
        lab.load(packed_file("Q8_0"), quantize="int8")


def test_a_head_that_is_the_embedding_is_stored_once(gguf_saved, new_text_model, random_ids):
    def without_head(state):
        del state["output.weight"]

    model = new_text_model(tie_word_embeddings=True, **AS_PUBLISHED)
    model.tie_weights()
    loaded, ids = lab.load(gguf_saved(model, "F32", config=False, change=without_head)), random_ids(1, 12)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_vision_tower_beside_the_model_is_loaded(gguf_saved, new_model, image_batch, monkeypatch):
    # transformers 5.24.0 reads this off the output of its text model, which lacks it: every pass would fail.
    monkeypatch.setattr(MoeCausalLMOutputWithPast, "image_outputs", None, raising=False)
    model = new_model()
    loaded = lab.load(gguf_saved(model, "F32"))
    batch = image_batch([[2, 1]])
    with torch.no_grad():
        ours = loaded(**batch).logits
        theirs = dense_twin(loaded, Llama4ForConditionalGeneration)(**batch).logits
        near = model(**batch).logits
    kept = batch["attention_mask"] > 0
    torch.testing.assert_close(ours[kept], theirs[kept], rtol=0, atol=2e-5)
    assert (ours - near)[kept].abs().mean() < 0.05 * near.std()  # vision was rounded to bfloat16


def test_without_the_vision_tower_the_model_is_text_only(gguf_saved, new_model, random_ids):
    model = new_model()
    file = gguf_saved(model, "F32")
    (file.parent / "mmproj.gguf").unlink()
    loaded, ids = lab.load(file), random_ids(1, 12)
    assert loaded.vision is None
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
