"""Plans of packed checkpoints: the bytes are those that the loaded model takes, in every format."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import llama4lab as lab
from llama4lab.checkpoint.schemes.encoding import encoded
from llama4lab.checkpoint.summary import COMPONENTS
from llama4lab.model.expert_bank import ExpertBank, Held
from llama4lab.model.packed_linear import PackedLinear
from llama4lab.model.packed_matrix import PackedMatrix
from llama4lab.model.tier import Tier
from llama4lab.tables.planning import memory_plan

RATES = {"disk": "1GB/s", "cpu": "10GB/s"}
PLENTY = {"cpu": "10GB"}


def packed_matrices(model) -> list[PackedMatrix]:
    sources = [module.source for module in model.modules() if isinstance(module, PackedLinear)]
    banks = [getattr(module, name, None) for module in model.modules() for name in ("gate_up_proj", "down_proj")]
    sources += [bank.source for bank in banks if isinstance(bank, ExpertBank)]
    return [matrix for source in sources if isinstance(source, Held) for matrix in source.matrices]


def nbytes(model) -> int:
    """What the weights of a model take in memory; not what its store keeps."""
    return sum(each.nbytes for each in model.parameters()) + sum(each.nbytes for each in packed_matrices(model))


def tier_of(model) -> Tier:
    assert model.store is not None
    return model.store.tiers[torch.device("cpu")]


def in_memory(plan) -> int:
    return sum(plan.table["bytes_in_memory"].tolist())


class Peak(TorchDispatchMode):
    """Counts the bytes of tensors that are made inside it and alive at once."""

    def __init__(self):
        super().__init__()
        self.alive: list[tuple[StorageWeakRef, int]] = []
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {each.untyped_storage()._cdata for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        out = func(*args, **(kwargs or {}))
        self.alive = [(ref, size) for ref, size in self.alive if not ref.expired()]
        known = given | {ref.cdata for ref, _ in self.alive}
        for each in tree_leaves(out):
            if isinstance(each, Tensor) and each.untyped_storage()._cdata not in known:
                self.alive.append((StorageWeakRef(each.untyped_storage()), each.untyped_storage().nbytes()))
        self.peak = max(self.peak, sum(size for _, size in self.alive))
        return out


@torch.no_grad()
def test_a_packed_checkpoint_takes_the_bytes_of_the_plan(saved_as, format):
    folder = saved_as(format)
    plan = memory_plan(folder, memory=PLENTY, bandwidths=RATES)
    assert plan.experts == "resident"
    model = lab.load(folder, **plan.options)
    assert nbytes(model) == in_memory(plan) == plan.placement.places[0].weights
    assert model.dtype == plan.placement.model.dtype
    (file,) = folder.glob("*.safetensors")
    header = file.stat().st_size - sum(size.stored for size in plan.placement.model.sizes)
    assert 0 < header < 0.2 * file.stat().st_size
    shapes = {(matrix.shape, len(matrix.matrices)): matrix for matrix in packed_matrices(model)}
    rooms = {room.what: room.nbytes for room in plan.placement.places[0].rooms}
    for matrix in shapes.values():
        with Peak() as measured:
            matrix.dense(torch.float32)
        assert measured.peak <= rooms["one matrix"]


@torch.no_grad()
def test_experts_of_a_packed_checkpoint_are_kept_within_the_plan(saved_as, format, random_ids):
    folder = saved_as(format)
    (place,) = memory_plan(folder, memory=PLENTY, bandwidths=RATES, context=4).placement.places
    most = place.weights + place.working - 1
    plan = memory_plan(folder, memory={"cpu": most}, bandwidths=RATES, context=4)
    assert plan.experts == "offload"
    model = lab.load(folder, **plan.options)
    row, rooms = plan.devices.iloc[0], plan.working.set_index("what")["nbytes"]
    assert nbytes(model) == row["weights"]
    assert tier_of(model).budget == row["kept"] + rooms["on the way"]
    assert row["weights"] + row["working_memory"] + row["kept"] + row["left"] == most
    experts = [size for size in plan.placement.model.sizes if size.experts]
    assert row["expert_slots"] == row["kept"] * plan.placement.places[0].experts // sum(
        each.waiting for each in experts
    )
    model(random_ids(2, 40))
    held = tier_of(model).held.values()
    assert 0 < sum(matrix.nbytes for matrix in held) <= tier_of(model).budget
    sizes = {each.one_kept for each in experts}  # the mean, where states of the same kind differ in their digits
    assert all(min(abs(matrix.nbytes - size) for size in sizes) < 8 for matrix in held)


@torch.no_grad()
@pytest.mark.parametrize("method", ["int8", "int4", "fp8"])
def test_quantizing_on_the_way_takes_the_bytes_of_the_plan(saved_as, method, random_ids):
    folder = saved_as("plain, unfused")
    plan = memory_plan(folder, memory=PLENTY, quantize=method, bandwidths=RATES)
    assert plan.options["quantize"] == method
    assert nbytes(lab.load(folder, **plan.options)) == in_memory(plan)
    experts = [size for size in plan.placement.model.sizes if size.experts]
    offloaded = lab.load(folder, experts="offload", quantize=method, memory={"cpu": "100MB"})
    offloaded(random_ids(4, 60))
    assert {matrix.nbytes for matrix in tier_of(offloaded).held.values()} == {each.one_kept for each in experts}
    rounding = max(each.rounding for each in experts)
    for shape in {(256, 128), (128, 128)}:
        values = torch.randn(shape)
        with Peak() as measured:
            encoded(values, method)
        assert measured.peak + values.nbytes <= rounding * values.numel() // (128 * 128)


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", [{"num_experts_per_tok": 2}, {"interleave_moe_layer_step": 1}, {"vocab_size": 999}])
def test_a_pass_takes_no_more_than_is_set_aside(new_text_model, random_ids, tmp_path, dtype, options):
    new_text_model(hidden_size=96, intermediate_size=200, **options).save_pretrained(tmp_path)
    plan = memory_plan(tmp_path, memory=PLENTY, dtype=dtype, bandwidths=RATES, context=300)
    model, ids = lab.load(tmp_path, **plan.options), random_ids(1, 300)
    with Peak() as measured:
        model(ids, use_cache=True)
    assert plan.placement.places[0].working / 4 < measured.peak <= plan.placement.places[0].working


@torch.no_grad()
def test_layers_that_wait_on_disk_are_loaded_as_planned(saved_as, random_ids):
    folder = saved_as("int4")
    whole = memory_plan(folder, memory=PLENTY, bandwidths=RATES, context=4)
    (place,), sizes = whole.placement.places, whole.placement.model.sizes
    table = {part: sum(each.resident for each in sizes if each.component == part) for part in COMPONENTS}
    most = place.working + place.weights - table["routed experts"] - table["vision"] // 2
    plan = memory_plan(folder, memory={"cpu": most}, bandwidths=RATES, context=4)
    assert "disk" in plan.options["device_map"].values()
    model = lab.load(folder, **plan.options)
    assert nbytes(model) == plan.devices["weights"][0]
    assert tier_of(model).budget == plan.placement.places[0].store
    ids = random_ids(1, 4)
    torch.testing.assert_close(model(ids).logits, lab.load(folder)(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "auto", None])
def test_the_dtype_is_the_one_that_load_chooses(saved_as, dtype):
    folder = saved_as("modelopt fp8")
    plan = memory_plan(folder, memory=PLENTY, dtype=dtype, bandwidths=RATES)
    assert lab.load(folder, dtype=dtype).dtype == plan.placement.model.dtype
    assert nbytes(lab.load(folder, **plan.options)) == in_memory(plan)


def test_a_quantized_checkpoint_is_not_quantized_again(saved_as):
    with pytest.raises(ValueError, match="quantized already"):
        memory_plan(saved_as("int4"), memory=PLENTY, quantize="int8", bandwidths=RATES)
