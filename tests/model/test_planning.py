"""The arithmetic of plans: laws, and the store itself as the reference."""

from itertools import product

import pytest
import torch

from llama4lab.model.bandwidths import disk_rate, ram_rate, rates_of
from llama4lab.model.budgets import planned_budgets
from llama4lab.model.llama4 import HookedLlama4ForCausalLM
from llama4lab.model.packed_matrix import PackedMatrix
from llama4lab.model.pass_times import distinct_experts, pass_time, remembered
from llama4lab.model.planned_model import Model, layer_of, part_of
from llama4lab.model.planning import least, placed_for
from llama4lab.model.tier import Tier
from llama4lab.model.weight_sizes import weigh
from llama4lab.model.working_memory import cache_nbytes, cache_room


@pytest.fixture
def planned(new_text_model):
    """A model to plan, of new sizes."""

    def make(tokens: int = 4, quantize: str | None = None, **options) -> Model:
        config = new_text_model(**options).config
        with torch.device("meta"):
            empty = HookedLlama4ForCausalLM(config)
        tied = "lm_head" if config.tie_word_embeddings else None
        return Model(weigh(empty, None, torch.float32, quantize), config, torch.float32, tokens, tied)

    return make


@pytest.mark.parametrize(("experts", "tokens"), [(2, 3), (3, 2), (3, 4), (4, 3)])
def test_distinct_experts_are_the_mean_over_all_routes(experts, tokens):
    routes = list(product(range(experts), repeat=tokens))
    assert distinct_experts(experts, 1, tokens) == pytest.approx(sum(len(set(route)) for route in routes) / len(routes))


@pytest.mark.parametrize(("experts", "tokens", "wanted"), [(128, 20, 18.6), (128, 100, 69.6), (128, 500, 125.5),
                                                           (16, 20, 11.6), (16, 100, 16.0)])  # fmt: skip
def test_distinct_experts_of_the_published_sizes(experts, tokens, wanted):
    assert round(distinct_experts(experts, 1, tokens), 1) == wanted


def one(nbytes: int = 1) -> PackedMatrix:
    return PackedMatrix([], [{"weight": torch.zeros(nbytes, dtype=torch.uint8)}])


def hits_of(tiers: list[Tier], layers: int, experts: int, tokens: int, passes: int) -> list[float]:
    """The share of asked matrices that each tier had, the nearest first, as the store asks them."""
    generator, found, asked = torch.Generator().manual_seed(0), [0] * len(tiers), 0
    for number in range(passes):
        for layer in range(layers):
            for expert in torch.randint(experts, (tokens,), generator=generator).unique().tolist():
                key = (str(layer), expert)
                held = next((tier for tier in tiers if tier.get(key) is not None), None)
                if number >= passes // 4:
                    asked += 1
                    if held is not None:
                        found[tiers.index(held)] += 1
                if held is None:
                    tiers[-1].put(key, one())
                if held is not tiers[0]:
                    tiers[0].put(key, one())
    return [count / asked for count in found]


@pytest.mark.parametrize(("tokens", "slots"), [(1, 8), (1, 30), (1, 60), (6, 20), (6, 70), (40, 60), (3, 0)])
def test_what_a_tier_remembers_is_what_it_finds(tokens, slots):
    layers, experts = 6, 16
    (found,) = hits_of([Tier(slots)], layers, experts, tokens, 150)
    chosen = distinct_experts(experts, 1, tokens) / experts
    assert found == pytest.approx(remembered(slots / (layers * experts), chosen), abs=0.08)


@pytest.mark.parametrize(("near", "far"), [(15, 60), (30, 96), (20, 40)])
def test_ram_adds_what_it_remembers_beyond_the_gpu(near, far):
    layers, experts = 6, 16
    found = hits_of([Tier(near), Tier(far)], layers, experts, 1, 400)
    first, both = (remembered(slots / (layers * experts), 1 / experts) for slots in (near, far))
    assert found[0] == pytest.approx(first, abs=0.06)
    assert sum(found) == pytest.approx(both, abs=0.12)


def test_a_share_that_fits_is_always_found_and_none_never():
    assert [remembered(1, used) for used in (0.01, 0.5, 1)] == [1, 1, 1]
    assert [remembered(0, used) for used in (0.01, 0.5, 1)] == [0, 0, 0]
    assert remembered(0.9, 1) == 0, "each is dropped before its turn comes again"


@torch.no_grad()
@pytest.mark.parametrize("tokens", [5, 7, 12, 14, 21, 40])
def test_the_room_of_the_cache_holds_what_the_cache_takes(new_text_model, random_ids, tokens):
    model = new_text_model()
    layers = range(model.config.num_hidden_layers)
    output = model(random_ids(1, tokens), use_cache=True)

    def stored() -> int:
        held = [each for layer in output.past_key_values.layers for each in (layer.keys, layer.values)]
        return sum(each.untyped_storage().nbytes() for each in held)

    room = cache_room(model.config, list(layers), tokens, torch.float32).nbytes
    assert room / 2 < stored() <= room
    assert stored() == room or tokens > 14, "to the byte, until a chunked layer holds two chunks"
    model(random_ids(1, 1), past_key_values=output.past_key_values, use_cache=True)
    assert stored() <= sum(cache_nbytes(model.config, layer, tokens + 1, torch.float32) for layer in layers)


def test_sizes_add_up_to_the_parameters(new_text_model, planned):
    for options in ({}, {"tie_word_embeddings": True}, {"interleave_moe_layer_step": 1}):
        sizes = planned(**options).sizes
        whole = sum(parameter.numel() for parameter in new_text_model(**options).parameters())
        assert sum(size.parameters for size in sizes) == whole == sum(size.resident for size in sizes) // 4
        assert {part_of(size.name) for size in sizes} >= {"model.embed_tokens", "model.norm", "model.layers.0"}


def test_parts_are_named_and_numbered():
    assert part_of("language_model.model.layers.12.self_attn.q_proj.weight") == "language_model.model.layers.12"
    assert part_of("vision_model.model.layers.3.mlp.fc1.weight") == "vision_model"
    assert [layer_of(part) for part in ("vision_model", "model.layers.7", "model.norm")] == [None, 7, None]


@pytest.mark.parametrize("memory", [("cpu",), ("cuda:0",), ("cuda:0", "cpu"), ("cuda:0", "cuda:1", "cpu")])
@pytest.mark.parametrize("quantize", [None, "int4"])
def test_no_device_gives_more_than_its_budget_and_every_part_has_a_place(planned, memory, quantize):
    model = planned(quantize=quantize)
    always, working = least(model, "cpu")
    found = set()
    for tenths in range(2, 40, 3):
        budgets = {name: int((always + working) * tenths / 10) for name in memory}
        placement = placed_for(model, budgets)
        if placement is None:
            continue
        places = placement.device_map
        assert set(places) == set(model.parts)
        assert set(places.values()) <= {*memory, "disk"}
        for place in placement.places:
            assert place.weights + place.working + place.kept + place.left == place.budget
            assert 0 <= place.kept_steady <= place.kept <= place.budget
            assert place.left >= 0
            assert 0 <= place.slots <= place.experts
        found.add(("offload" if placement.case.offload else "resident", bool(placement.case.disk)))
    assert ("resident", False) in found
    assert quantize or "offload" in {experts for experts, _ in found}, "rounding takes more than tiny experts do"


def test_more_memory_never_means_more_reading(planned):
    model = planned(num_hidden_layers=6, interleave_moe_layer_step=1)
    always, working = least(model, "cpu")
    read = []
    for tenths in range(4, 60, 4):
        placement = placed_for(model, {"cpu": (always + working) * tenths // 10})
        if placement is not None:
            read.append(pass_time(placement, 1, 1.0, 1.0).from_disk)
    assert len(read) > 5
    assert read == sorted(read, reverse=True)
    assert read[-1] == 0 < read[0]


def test_gpus_are_filled_in_order_before_ram(planned):
    model = planned(num_hidden_layers=6, num_local_experts=64)
    always, working = least(model, "cpu")
    budgets = {"cuda:1": (always + working) * 2 // 3, "cuda:0": always + working, "cpu": 20 * (always + working)}
    placement = placed_for(model, budgets)
    assert placement is not None
    names = list(dict.fromkeys(placement.device_map.values()))
    assert names == ["cuda:1", "cuda:0"]
    assert placement.case.offload
    assert placement.ram is not None
    assert placement.ram.weights == 0
    assert placement.ram.share == 1, "all experts fit in RAM"


def test_a_tied_head_goes_where_the_embeddings_are(planned):
    model = planned(tie_word_embeddings=True)
    always, working = least(model, "cpu")
    placement = placed_for(model, {"cuda:0": (always + working) * 2 // 3, "cuda:1": 2 * (always + working)})
    assert placement is not None
    assert placement.device_map["lm_head"] == placement.device_map["model.embed_tokens"] == "cuda:0"


def test_ram_beside_a_gpu_lends_what_the_gpu_cannot_hold(planned):
    model = planned(num_hidden_layers=6)
    always, working = least(model, "cuda:0")
    largest = max(size.resident for size in model.sizes if not size.experts)
    placement = placed_for(model, {"cuda:0": always + working - 1, "cpu": 10 * always})
    assert placement is not None
    assert placement.case.lent
    assert "lent from RAM" in {room.what for room in placement.places[0].rooms}
    time = pass_time(placement, 1, 1.0, 1.0)
    assert placement.ram is not None
    assert time.moved >= placement.ram.weights > 0
    assert largest <= placement.places[0].working


def test_budgets_are_read_without_the_devices():
    assert planned_budgets({"cpu": "1GiB", "cuda": 5, "cuda:3": "2 MB"}) == {
        "cuda:0": 5, "cuda:3": 2_000_000, "cpu": 2**30}  # fmt: skip
    assert list(planned_budgets({"cpu": 1, "cuda:0": 1})) == ["cuda:0", "cpu"]
    assert planned_budgets(None)["cpu"] > 2**20
    for memory, message in [({"gpu0": 1}, "not a device"), ({"meta": 1}, "cannot hold"), ({"cpu": "much"}, "size"),
                            ({}, "empty"), ({"cuda": 1, "cuda:0": 2}, "twice")]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            planned_budgets(memory)


def test_rates_are_numbers_or_texts():
    assert rates_of({"disk": "7GB/s", "cpu": 25e9}) == {"disk": 7e9, "cpu": 25e9}
    assert rates_of({"disk": "1 GiB"}) == {"disk": 2**30}
    for rates, message in [({"nvme": 1}, "Sources are"), ({"disk": "fast"}, "7GB/s"), ({"cpu": 0}, "7GB/s"),
                           ({"cpu": -1.0}, "7GB/s"), ({"cpu": float("nan")}, "7GB/s")]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            rates_of(rates)


def test_rates_are_measured(tmp_path):
    (tmp_path / "file").write_bytes(bytes(3 * 2**20))
    (tmp_path / "empty").write_bytes(b"")
    assert disk_rate([tmp_path / "file", tmp_path / "empty"]) > 1e6
    assert disk_rate([]) != disk_rate([])
    assert ram_rate(torch.device("cpu")) > 1e6
