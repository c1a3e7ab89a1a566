"""Parts of a model that wait on disk: numbers are those of the resident model, and a matrix is read when it is used."""

from typing import Any

import pytest
import torch

import llama4lab as lab
from llama4lab.model.expert_bank import ExpertBank
from llama4lab.model.expert_store import ExpertStore, Stored
from llama4lab.model.experts import Experts
from llama4lab.model.packed_linear import PackedLinear
from llama4lab.model.stored_embedding import StoredEmbedding

EXPERTS = "feed_forward.experts"
LAYER = {"": "cpu", "language_model.model.layers.3": "disk"}


def store_of(model) -> ExpertStore:
    assert model.store is not None
    return model.store


def sources(model) -> list[Stored]:
    banks = [getattr(module, name, None) for module in model.modules() for name in ("gate_up_proj", "down_proj")]
    found = [bank.source for bank in banks if isinstance(bank, ExpertBank)]
    found += [module.source for module in model.modules() if isinstance(module, PackedLinear)]
    return [source for source in found if isinstance(source, Stored)]


def nbytes(source: Stored, expert: int = 0) -> int:
    return source.wanted[expert].nbytes(source.store.shards)


@pytest.fixture(scope="module")
def folder(new_model, tmp_path_factory):
    """With vision, biases and a dense layer between those with experts, two of which each token has."""
    path = tmp_path_factory.mktemp("parts")
    new_model(dtype=torch.bfloat16, num_experts_per_tok=2).save_pretrained(path)
    return path


@pytest.mark.parametrize("options", [{"device_map": "disk"}, {"device_map": LAYER}, {"device_map": {"": "disk"}}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_numbers_are_those_of_the_resident_model_to_the_last_bit(folder, image_batch, options, dtype):
    batch = image_batch([[2], [1]])
    resident, waiting = lab.load(folder, dtype=dtype), lab.load(folder, dtype=dtype, memory={"cpu": "50KB"}, **options)
    assert waiting(**batch).logits.equal(resident(**batch).logits)
    assert (waiting.dtype, waiting.device) == (resident.dtype, resident.device)
    assert not any(parameter.is_meta for parameter in waiting.parameters())


def test_what_is_small_is_in_memory_and_every_matrix_waits(folder):
    model = lab.load(folder, device_map="disk")
    assert max(parameter.numel() for name, parameter in model.named_parameters() if "position" not in name) <= 4 * 64
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert all(linear.out_features == 4 for linear in linears), "routers"
    assert isinstance(model.get_input_embeddings(), StoredEmbedding)
    assert "on disk" in repr(model.get_output_embeddings())
    assert store_of(model).traffic.bytes_read == 0


def test_every_weight_can_be_read_as_in_the_resident_model(folder):
    model, resident = lab.load(folder, device_map="disk"), lab.load(folder)
    wanted = resident.state_dict()
    found = model.state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].equal(tensor), name
    layer, other = (each.text.get_submodule("layers.1") for each in (model, resident))
    query, whole = layer.get_submodule("self_attn.q_proj"), other.get_parameter("self_attn.q_proj.weight")
    assert isinstance(query, PackedLinear)
    assert query.weight.equal(whole)
    one, two = (own.get_submodule(EXPERTS) for own in (layer, other))
    assert isinstance(one, Experts)
    assert isinstance(two, Experts)
    assert one.gate_up_proj[2].equal(two.gate_up_proj[2])


@torch.no_grad()
def test_a_pass_reads_each_matrix_once_of_experts_the_routed_ones_and_of_embeddings_the_rows(folder, random_ids):
    model, ids = lab.load(folder, device_map="disk", memory={"cpu": 0}), random_ids(1, 3)
    store = store_of(model)
    run = lab.record(model, ids, at="layers.*.feed_forward.router.indices")
    used = {
        (f"language_model.model.layers.{layer}.", expert)
        for layer, chosen in run.layers("feed_forward.router.indices").items()
        for expert in chosen.unique().tolist()
    }
    wanted = 0
    for source in sources(model):
        if source.name.startswith("language_model") and len(source.wanted) == 1:
            wanted += nbytes(source)
        wanted += sum(
            nbytes(source, expert) for layer, expert in used if source.name.startswith(f"{layer}feed_forward.e")
        )
    rows = ids.unique().numel()
    assert store.traffic.rows == rows
    assert store.traffic.bytes_read == wanted + rows * 64 * torch.bfloat16.itemsize
    assert store.traffic.read == store.traffic.asked, "nothing is kept, and nothing was read in vain"
    assert not store._reading


@torch.no_grad()
def test_what_every_pass_uses_stays_and_makes_experts_go(folder, random_ids):
    model, ids = lab.load(folder, device_map="disk", memory={"cpu": "300KB"}), random_ids(1, 12)
    store = store_of(model)
    model(ids)
    kept = {key for key in store.tiers[torch.device("cpu")].held if "experts" not in key[0]}
    store.reset()
    model(ids)
    assert kept <= set(store.tiers[torch.device("cpu")].held)
    assert store.traffic.on_device >= len(kept) > 4
    assert store.tiers[torch.device("cpu")].nbytes <= 300_000


def test_patching_sweeps_gradients_and_generation_work(folder, random_ids):
    clean, corrupted = random_ids(1, 10), random_ids(1, 10, seed=1)
    metric, found = lab.metrics.logit_diff(5, 7), []
    disk: dict[str, Any] = {"device_map": "disk", "memory": {"cpu": "100KB"}}
    for options in ({}, disk):
        model = lab.load(folder, **options)
        at, over = "layers.*.resid_post", ["layer", "position"]
        sweep = lab.sweep(model, clean, corrupted, at=at, over=over, metric=metric, progress=False)
        estimate = lab.attribute(model, clean, corrupted, at=at, metric=metric)
        with lab.patched(model, {"layers.2.resid_mid": 0.5}):
            patched = lab.record(model, clean).logits
        new = lab.generate(model, clean, max_new_tokens=4).prompt.input_ids
        found.append([sweep.tensor("effect"), next(iter(estimate.tensors.values())), patched, new])
    for one, two in zip(*found, strict=True):
        assert one.equal(two)


def test_gradients_of_biases_are_those_of_the_resident_model(folder, image_batch):
    batch, found = image_batch([[1]]), []
    for device_map in ("cpu", "disk"):
        model = lab.load(folder, device_map=device_map)
        model(**batch).logits.sum().backward()
        found.append({name: own.grad for name, own in model.named_parameters() if name.endswith("bias")})
    assert found[0].keys() == found[1].keys() != set()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


def test_tables_that_are_tied_are_in_memory(new_text_model, random_ids, tmp_path):
    new_text_model(tie_word_embeddings=True).save_pretrained(tmp_path)
    model, resident, ids = lab.load(tmp_path, device_map="disk"), lab.load(tmp_path), random_ids(1, 6)
    head = model.get_output_embeddings()
    assert isinstance(head, torch.nn.Linear)
    assert head.weight is model.get_input_embeddings().weight
    with torch.no_grad():
        assert model(ids).logits.equal(resident(ids).logits)


@torch.no_grad()
def test_auto_with_too_little_memory_leaves_experts_on_disk_first_and_then_layers(folder, random_ids):
    resident, ids = lab.load(folder), random_ids(1, 8)
    wanted, whole = resident(ids).logits, sum(own.nbytes for own in resident.parameters())
    experts = sum(own.nbytes for name, own in resident.named_parameters() if ".experts." in name)
    fits = lab.load(folder, device_map="auto", memory={"cpu": 2 * whole})
    assert fits.store is None
    first = lab.load(folder, device_map="auto", memory={"cpu": whole - experts // 2})
    assert {source.name.split(".")[-2] for source in sources(first)} == {"experts"}
    tier = store_of(first).tiers[torch.device("cpu")]
    assert tier.budget == whole - experts // 2 - (whole - experts)
    little = lab.load(folder, device_map="auto", memory={"cpu": (whole - experts) // 2})
    assert len(sources(little)) > len(sources(first))
    for model in (fits, first, little):
        assert model(ids).logits.equal(wanted)


@pytest.mark.parametrize("method", ["int8", "int4", "fp8"])
@torch.no_grad()
def test_what_waits_is_rounded_when_it_is_read_like_what_is_resident(folder, random_ids, method):
    ids = random_ids(2, 8)
    wanted = lab.load(folder, quantize=method)(ids).logits
    for device_map, experts in (("cpu", "offload"), ("disk", "resident")):
        model = lab.load(folder, quantize=method, device_map=device_map, experts=experts)
        assert model(ids).logits.equal(wanted)
        store, banks = store_of(model), {source.name: source for source in sources(model) if EXPERTS in source.name}
        held = store.tiers[torch.device("cpu")].held
        assert all(own.nbytes < 0.6 * nbytes(banks[key[0]]) for key, own in held.items() if key[0] in banks)
        whole = sum(nbytes(source, key[1]) for source in sources(model) for key in held if key[0] == source.name)
        assert store.traffic.bytes_read - 128 * store.traffic.rows == whole, "bytes are those of the files"


def test_a_damaged_row_of_a_table_on_disk_is_refused(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    content = bytearray((folder / "model.safetensors").read_bytes())
    model = lab.load(folder, device_map="disk")
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, StoredEmbedding)
    start = store_of(model).shards.spec(embedding.name).start + 5 * 64 * 2
    content[start : start + 2] = b"\xc0\x7f"
    (tmp_path / "model.safetensors").write_bytes(content)
    damaged = lab.load(tmp_path, device_map="disk")
    with torch.no_grad(), pytest.raises(ValueError, match=r"model\.safetensors: .*embed_tokens\.weight holds values"):
        damaged(torch.tensor([[4, 5]]))


@pytest.mark.parametrize("format", ["mlx", "nf4, nested", "fp8 by block", "int4 with zero points", "plain, unfused"])
@torch.no_grad()
def test_parts_of_quantized_checkpoints_wait_as_they_are_stored(saved_as, random_ids, format):
    path, ids = saved_as(format), random_ids(1, 8)
    model = lab.load(path, device_map="disk", memory={"cpu": 0})
    assert model(ids).logits.equal(lab.load(path, experts="offload")(ids).logits)
    torch.testing.assert_close(model(ids).logits, lab.load(path)(ids).logits, rtol=0, atol=1e-5)
    inside = {name: own for name, own in model.named_parameters() if ".layers." in name and "router" not in name}
    assert {own.ndim for own in inside.values()} == {1}, "norms and biases"
