"""Where parts of a model go: names, devices, the disk, and what there is room for."""

import pytest
import torch

from llama4lab.model.experts import Experts
from llama4lab.model.llama4 import HookedLlama4
from llama4lab.model.placement import budgets_of, devices_of, on_disk, part_of, placed, spread

CPU = torch.device("cpu")


@pytest.fixture
def empty(full_config) -> HookedLlama4:
    with torch.device("meta"):
        return HookedLlama4(full_config(interleave_moe_layer_step=1))


def nbytes(model: torch.nn.Module, *, experts: bool) -> int:
    return sum(4 * own.numel() for name, own in model.named_parameters() if experts or ".experts." not in name)


def test_a_parameter_belongs_to_the_longest_part_that_is_named():
    parts = ["", "model", "model.layers.1", "model.layers.1.self_attn"]
    assert part_of("model.layers.1.self_attn.q_proj.weight", parts) == "model.layers.1.self_attn"
    assert part_of("model.layers.10.self_attn.q_proj.weight", parts) == "model"
    assert part_of("lm_head.weight", parts) == ""
    assert part_of("lm_head.weight", parts[1:]) is None


@pytest.mark.parametrize("device_map", ["disk", {"": "disk"}])
def test_a_model_on_disk_is_computed_on_the_cpu(device_map):
    assert devices_of(device_map) == {"": CPU}
    assert on_disk(device_map) == {""}


def test_what_waits_on_disk_is_computed_on_the_first_gpu_that_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    device_map = {"a": "cpu", "b": "disk", "c": "cuda:1", "d": "cuda"}
    one, zero = torch.device("cuda", 1), torch.device("cuda", 0)
    assert devices_of(device_map) == {"a": CPU, "b": one, "c": one, "d": zero}
    assert on_disk(device_map) == {"b"}


@pytest.mark.parametrize("device_map", [None, "cpu", "auto", {"": "cpu"}])
def test_nothing_waits_on_disk_unless_it_is_asked_for(device_map):
    assert on_disk(device_map) == set()


def test_a_part_that_is_not_there_is_refused(empty):
    parameters = dict(empty.named_parameters())
    with pytest.raises(ValueError, match=r"names 'language_model.model.layers.77', which holds no weight; near: "):
        placed({"": CPU, "language_model.model.layers.77": CPU}, parameters)
    with pytest.raises(ValueError, match="places no part of the model that holds vision_model"):
        placed({"language_model": CPU}, parameters)


def test_all_is_in_memory_where_it_fits(empty):
    places, offload = spread(empty, torch.float32, {CPU: 3 * nbytes(empty, experts=True)})
    assert not offload
    assert set(places.values()) == {"cpu"}


def test_experts_go_to_disk_before_anything_else_does(empty):
    places, offload = spread(empty, torch.float32, {CPU: 2 * nbytes(empty, experts=False)})
    assert offload
    assert set(places.values()) == {"cpu"}
    assert set(placed(devices_of(places), dict(empty.named_parameters())).values()) == {CPU}


@pytest.mark.parametrize("share", [0, 0.5])
def test_what_has_no_room_goes_to_disk(empty, share):
    limit = int(share * nbytes(empty, experts=False))
    places, offload = spread(empty, torch.float32, {CPU: limit}, offload=True)
    parameters = dict(empty.named_parameters())
    waiting = {name for name in parameters if part_of(name, places) in on_disk(places)}
    held = sum(4 * own.numel() for name, own in parameters.items() if name not in waiting and ".experts." not in name)
    assert offload
    assert held <= limit
    assert (held > 0) == (share > 0)
    assert all(
        isinstance(module.gate_up_proj, torch.Tensor) for module in empty.modules() if isinstance(module, Experts)
    )


def test_without_limits_too_little_memory_is_an_error(empty, monkeypatch):
    monkeypatch.setattr("llama4lab.model.placement._inferred", lambda *_: {"": "disk"})
    with pytest.raises(MemoryError, match=r"more than GPUs and RAM have free together.\nWith experts=\"offload\""):
        spread(empty, torch.float32, None)


def test_budgets_are_of_devices_that_are_there():
    assert budgets_of({"cpu": "2 KiB"}) == {CPU: 2048}
    with pytest.raises(ValueError, match="'disk' is not a device"):
        budgets_of({"disk": "2KiB"})
