"""Verifying models in every format: what is right is in order, and what is wrong in decoder, memory or file shows."""

# pandas declares what it gives as wide unions.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportCallIssue=false, reportOperatorIssue=false, reportIndexIssue=false, reportOptionalSubscript=false

import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import llama4lab as lab
from llama4lab.checkpoint.schemes.fp4 import Nvfp4
from llama4lab.checkpoint.schemes.integers import AffineIntegers, PackedIntegers
from llama4lab.checkpoint.schemes.lookup import Lookup
from llama4lab.checkpoint.schemes.plain import Plain
from llama4lab.checkpoint.schemes.scaled import Scaled
from llama4lab.model.expert_bank import ExpertBank, Held
from llama4lab.model.expert_store import Stored
from llama4lab.tables.verifying import verify

SCHEMES = (PackedIntegers, AffineIntegers, Scaled, Nvfp4, Lookup, Plain)
FORMATS = ["int4", "int4 with zero points", "int8", "int8 by row", "fp8 by row", "fp8 by block", "nvfp4"]
FORMATS += ["nf4, nested", "nf4", "fp4", "modelopt fp8", "modelopt nvfp4", "fbgemm", "mlx"]
PAIRS = ("int4", "nvfp4", "nf4", "fp4", "mlx")


def bank_of(model, layer=1) -> ExpertBank:
    bank = model.text.layers[layer].feed_forward.experts.gate_up_proj
    assert isinstance(bank, ExpertBank)
    return bank


def halves_exchanged(role, part):
    in_bytes = part.contiguous().view(torch.uint8)
    return (in_bytes >> 4 | in_bytes << 4).view(part.dtype) if role in ("weight", "weight_packed") else part


def groups_shifted(role, part):
    """Each scale in the place of its neighbour; of a single one, twice as much."""
    if role not in ("weight_scale", "scales", "absmax"):
        return part
    return part.float().mul(2).to(part.dtype) if part.numel() == 1 else part.flatten().roll(1).view(part.shape)


@pytest.fixture
def wrong(monkeypatch):
    """Makes decoders wrong: they take stored tensors that were changed by a function of their role."""

    def make(change) -> None:
        for scheme in SCHEMES:
            dense = scheme.dense

            def changed(self, parts, shape, dense=dense):
                return dense(self, {role: change(role, part) for role, part in parts.items()}, shape)

            monkeypatch.setattr(scheme, "dense", changed)

    return make


@pytest.fixture(scope="module")
def loaded(saved_as):
    """A model of each format for tests that leave it as it is."""
    models = {}

    def load(format):
        if format not in models:
            models[format] = lab.load(saved_as(format))
        return models[format]

    return load


def test_a_model_that_was_loaded_rightly_is_in_order(saved_as, loaded, format):
    found = verify(loaded(format), matrices=None)
    assert found.ok, str(found)
    assert found.matrices["equal"].all()
    assert (found.matrices["max_abs_difference"] == 0).all()
    assert (found.matrices["rounded_to"] == "").all()
    experts = found.matrices.dropna(subset="expert")
    assert experts.groupby("name")["expert"].apply(list).tolist() == 4 * [[0, 1, 2, 3]]
    assert format.startswith("plain") == (set(experts["scheme"]) == {"plain"})
    table, stored = found.tensors, load_file(saved_as(format) / "model.safetensors")
    assert set(table["tensor"]) == set(stored)
    assert table["bytes"].sum() == sum(tensor.nbytes for tensor in stored.values())
    assert [str(list(stored[name].shape)) for name in table["tensor"]] == table["shape"].tolist()
    unused = table["read_by"] == "activations only (not used)"
    assert set(table.loc[~unused, "read_by"]) == set(found.matrices["name"])
    assert unused.sum() == sum("input_scale" in name for name in stored)
    assert (table.loc[table["tensor"].str.contains("scale|absmax"), "role"] == "scale").all()


@pytest.mark.parametrize("format", ["plain, unfused", "int4", "modelopt nvfp4"])
@pytest.mark.parametrize("options", [{"experts": "offload"}, {"dtype": "bfloat16"}], ids=str)
def test_so_it_is_offloaded_and_in_bfloat16(saved_as, format, options):
    found = verify(lab.load(saved_as(format), **options), matrices=None)
    assert found.ok, str(found)
    assert found.matrices["equal"].all()


@pytest.mark.parametrize("format", PAIRS)
def test_a_decoder_that_exchanges_halves_of_bytes_is_caught(loaded, format, wrong):
    wrong(halves_exchanged)
    found = verify(loaded(format), matrices=12)
    experts = found.matrices.dropna(subset="expert")
    assert not found.ok
    assert not experts["ok"].any()


@pytest.mark.parametrize("format", FORMATS)
def test_a_decoder_that_takes_the_scale_of_another_group_is_caught(loaded, format, wrong):
    wrong(groups_shifted)
    found = verify(loaded(format), matrices=12)
    assert not found.ok
    assert not found.matrices.dropna(subset="expert")["ok"].any()


@pytest.mark.parametrize("format", ["plain, unfused", "int4", "nf4, nested", "modelopt fp8", "mlx"])
def test_an_expert_in_the_slot_of_another_is_caught_with_its_number(saved_as, format):
    for options in ({}, {"experts": "offload"}):
        model = lab.load(saved_as(format), **options)
        bank = model.text.layers[1].feed_forward.experts.gate_up_proj
        if isinstance(bank, ExpertBank):
            slots = bank.source.matrices if isinstance(bank.source, Held) else bank.source.wanted
            slots[1], slots[3] = slots[3], slots[1]
        else:
            bank.data = bank.data[[0, 3, 2, 1]]
        found = verify(model, matrices=None).wrong
        assert found["expert"].tolist() == [1, 3]
        assert found["name"].str.endswith("layers.1.feed_forward.experts.gate_up_proj").all()
        assert (found["relative_error"] > 1).all()


def test_a_number_changed_in_memory_is_reported_with_its_name(saved_as):
    model = lab.load(saved_as("int4"))
    with torch.no_grad():
        model.text.layers[2].input_layernorm.weight[5] += 1e-3
        model.text.layers[0].self_attn.q_proj.weight[3, 4] += 0.5
        held = bank_of(model).source.matrix(2)
        held.tensors[1]["weight_scale"][7] *= 2
    found = verify(model, matrices=None)
    names = [name.removeprefix("language_model.") for name in found.wrong["name"]]
    assert sorted(names) == [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.feed_forward.experts.gate_up_proj",
        "model.layers.2.input_layernorm.weight",
    ]
    text = str(found)
    assert "NOT in order" in text
    assert "experts.gate_up_proj, expert 2 (int4, groups of 128): off by up to" in text
    attention = found.wrong.loc[found.wrong["name"].str.contains("q_proj"), "max_abs_difference"].item()
    assert attention == pytest.approx(0.5, rel=1e-5)
    assert not verify(model).ok, "vectors are checked even if no matrix is drawn"


@pytest.mark.parametrize("options", [{}, {"experts": "offload"}], ids=str)
def test_a_file_that_was_replaced_after_loading_shows(saved_as, tmp_path, options, random_ids):
    folder = tmp_path / "copy"
    shutil.copytree(saved_as("int4"), folder)
    model = lab.load(folder, **options)
    with torch.no_grad():
        model(random_ids(1, 40))  # so that the experts of an offloaded model are in RAM
    assert verify(model, matrices=None).ok
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in sorted(tensors) if "experts.0.gate_proj.weight_scale" in name)
    tensors[name] = tensors[name] * 2
    save_file(tensors, folder / "new")
    os.replace(folder / "new", folder / "model.safetensors")
    found = verify(model, matrices=None)
    assert found.wrong["expert"].tolist() == [0]
    assert found.wrong["name"].item().endswith("layers.1.feed_forward.experts.gate_up_proj")


@pytest.mark.parametrize("format", ["int4", "modelopt nvfp4", "plain, unfused"])
def test_a_store_stays_as_it_was_and_only_what_was_chosen_is_read(saved_as, format, random_ids, monkeypatch):
    model = lab.load(saved_as(format), experts="offload", memory={"cpu": "100KB"})
    model(random_ids(1, 12))
    store = model.store
    assert store is not None
    before, held = vars(store.traffic).copy(), {place: list(tier.held) for place, tier in store.tiers.items()}
    read, seen = store.shards.read, []

    def counted(name, index=None):
        seen.append(name)
        return read(name, index)

    monkeypatch.setattr(store.shards, "read", counted)
    found = verify(model, matrices=4, seed=3)
    assert found.ok
    chosen = found.matrices.dropna(subset="expert")
    assert len(chosen) == 3
    assert len(seen) <= len(chosen) * 2 * 3, "of gate and up or down the parts, each once"
    assert vars(store.traffic) == before
    assert {place: list(tier.held) for place, tier in store.tiers.items()} == held
    if format != "modelopt nvfp4":
        experts = {f".experts.{expert}." for expert in chosen["expert"]}
        assert all(any(expert in name for expert in experts) for name in seen)
    verify(model, matrices=0, reference=model)  # passes do fill the store
    assert vars(store.traffic) == before


ROUNDED = [("int8", "resident", 0.01), ("int4", "offload", 0.13), ("fp8", "resident", 0.04)]


@pytest.mark.parametrize(("method", "experts", "most"), ROUNDED)
def test_rounding_while_loading_is_measured_and_no_fault(saved_as, method, experts, most):
    model = lab.load(saved_as("plain, unfused"), quantize=method, experts=experts)
    found = verify(model, matrices=None)
    rounded = found.matrices[found.matrices["rounded_to"] != ""]
    assert found.ok
    assert not rounded["equal"].any()
    assert rounded["relative_error"].between(1e-4, most).all()
    assert rounded["name"].str.contains("feed_forward").all()
    assert set(rounded["name"][rounded["expert"].notna()].str.rpartition(".")[2]) == {"gate_up_proj", "down_proj"}
    assert "rounded while loading" in str(found)
    source = bank_of(model).source
    if isinstance(source, Stored):
        source.wanted[0] = source.wanted[1]
    else:
        assert isinstance(source, Held)
        source.matrices[0] = source.matrices[1]
    again = verify(model, matrices=None)
    assert again.wrong["expert"].tolist() == [0], "another expert is no rounding"
