"""Verifying GGUF checkpoints."""

# pandas declares what it gives as wide unions.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportCallIssue=false, reportOperatorIssue=false, reportIndexIssue=false, reportOptionalSubscript=false

import pytest

import llama4lab as lab
from llama4lab.model.expert_bank import ExpertBank, Held
from llama4lab.tables.verifying import verify


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "mixed"])
def test_a_gguf_checkpoint_is_in_order_and_its_own_names_are_listed(packed_file, kind):
    model = lab.load(packed_file(kind))
    found = verify(model, matrices=None)
    assert found.ok, str(found)
    assert found.matrices["equal"].all()
    names = found.tensors.set_index("tensor")["read_by"]
    assert names["blk.1.ffn_up_exps.weight"] == "model.layers.1.feed_forward.experts.gate_up_proj"
    assert names["blk.0.attn_k.weight"] == "model.layers.0.self_attn.k_proj.weight"
    kinds = set(found.matrices.dropna(subset="expert")["scheme"])
    assert kinds == ({"GGUF IQ2_XXS and GGUF Q4_K", "GGUF Q6_K"} if kind == "mixed" else {f"GGUF {kind}"})


def test_a_vision_tower_beside_it_is_verified_too(gguf_saved, new_model, sizes):
    found = verify(lab.load(gguf_saved(new_model(**sizes))), matrices=None)
    assert found.ok, str(found)
    assert found.matrices["name"].str.startswith("vision_model.").sum() > 20
    assert set(found.tensors["file"]) == {"model.gguf", "mmproj.gguf"}


def test_exchanged_experts_and_blocks_are_caught(packed_file):
    model = lab.load(packed_file("Q4_K"))
    bank = model.text.layers[1].feed_forward.experts.down_proj
    assert isinstance(bank, ExpertBank)
    assert isinstance(bank.source, Held)
    slots = bank.source.matrices
    slots[0], slots[2] = slots[2], slots[0]
    slots[3].tensors[0] = {"weight": slots[3].tensors[0]["weight"].roll(1, 0)}
    assert verify(model, matrices=None).wrong["expert"].tolist() == [0, 2, 3]
