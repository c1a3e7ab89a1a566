"""What a store holds where: budgets, what goes first, and a device beside the RAM."""

import pytest
import torch

from llama4lab.checkpoint.matrices import Matrix, Part
from llama4lab.checkpoint.schemes.plain import Plain
from llama4lab.checkpoint.shards import Shards
from llama4lab.model.expert_store import ExpertStore, Stored
from llama4lab.model.packed_matrix import PackedMatrix
from llama4lab.model.tier import Tier
from llama4lab.model.wanted import Wanted

CPU, OTHER = torch.device("cpu"), torch.device("cuda", 0)


class OnOther(PackedMatrix):
    """A matrix that says it is on another device, which this machine need not have."""

    device = OTHER  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]


def packed(nbytes: int) -> PackedMatrix:
    matrix = Matrix({"weight": Part("some")}, Plain(), (1, nbytes // 4))
    return PackedMatrix([matrix], [{"weight": torch.zeros(1, nbytes // 4)}])


def held(tier: Tier) -> list[str]:
    return [name for name, _ in tier.held]


def test_what_was_not_used_for_longest_goes_first():
    tier = Tier(1000)
    for name in "abc":
        tier.put((name, 0), packed(400))
    assert held(tier) == ["b", "c"]
    tier.get(("b", 0))
    tier.put(("d", 0), packed(400))
    assert (held(tier), tier.nbytes) == (["b", "d"], 800)


def test_what_is_larger_than_the_budget_drops_nothing():
    tier = Tier(1000)
    tier.put(("a", 0), packed(400))
    tier.put(("b", 0), packed(1200))
    assert held(tier) == ["a"]


def test_what_every_pass_uses_stays_and_the_rest_makes_room():
    tier = Tier(1000)
    tier.put(("expert", 0), packed(400))
    for name in ("one", "two", "three"):
        tier.put((name, 0), packed(400), steady=True)
    assert (held(tier), tier.nbytes) == (["one", "two"], 800)
    tier.put(("expert", 1), packed(400))
    assert held(tier) == ["one", "two"], "it would have to take the room of one of them"
    tier.put(("expert", 2), packed(200))
    assert tier.nbytes == 1000


@pytest.fixture
def shards(new_text_model, tmp_path) -> Shards:
    new_text_model().save_pretrained(tmp_path)
    return Shards(tmp_path)


def stored(store: ExpertStore, device: torch.device) -> Stored:
    """The experts of a layer."""
    name = "model.layers.1.feed_forward.experts.down_proj"
    shape = (store.shards.spec(name).shape[2], store.shards.spec(name).shape[1])
    each = [Matrix({"weight": Part(name, expert)}, Plain(), shape, turned=True) for expert in range(4)]
    return Stored(store, name, [Wanted((name, expert), [own]) for expert, own in enumerate(each)], device)


def test_a_device_is_asked_before_the_ram_and_the_ram_before_the_file(shards, monkeypatch):
    monkeypatch.setattr(PackedMatrix, "to", lambda own, device: OnOther(own.matrices, own.tensors))
    each = shards.nbytes("model.layers.1.feed_forward.experts.down_proj", 0)
    store = ExpertStore(shards, {OTHER: each, CPU: 2 * each})
    source, traffic = stored(store, OTHER), store.traffic
    for expert in (0, 1, 2):
        assert source.matrix(expert).device == OTHER
    assert (traffic.read, traffic.bytes_read) == (3, 3 * each)
    assert [expert for _, expert in store.tiers[OTHER].held] == [2]
    assert [expert for _, expert in store.tiers[CPU].held] == [1, 2]
    source.matrix(2)
    source.matrix(1)
    source.matrix(0)
    assert (traffic.on_device, traffic.in_ram, traffic.read) == (1, 1, 4)
    assert [tier.nbytes for tier in store.tiers.values()] == [each, 2 * each]


def test_without_a_budget_for_ram_a_device_is_filled_from_the_file(shards, monkeypatch):
    monkeypatch.setattr(PackedMatrix, "to", lambda own, device: OnOther(own.matrices, own.tensors))
    store = ExpertStore(shards, {OTHER: 10**9})
    source = stored(store, OTHER)
    for _ in range(2):
        for expert in range(4):
            source.matrix(expert)
    assert (store.traffic.read, store.traffic.on_device) == (4, 4)


def test_what_is_expected_is_read_ahead_and_what_is_not_is_forgotten(shards):
    store = ExpertStore(shards, {CPU: 0})
    source = stored(store, CPU)
    source.expect([3, 0, 1])
    source.matrix(3)
    assert [expert for _, expert in store._reading] == [0, 1]
    source.matrix(0)
    assert [expert for _, expert in store._reading] == [1]
    source.matrix(2)
    assert not store._reading
    source.matrix(1)
    assert store.traffic.asked == 4


def test_room_is_made_before_a_read_begins(shards):
    each = shards.nbytes("model.layers.1.feed_forward.experts.down_proj", 0)
    store = ExpertStore(shards, {CPU: 2 * each})
    source = stored(store, CPU)
    source.matrix(0)
    source.matrix(1)
    source.expect([2, 3])
    source.matrix(2)
    assert (
        store.tiers[CPU].nbytes + sum(own.nbytes for own in store._reading.values() if not own.result.done())
        <= 2 * each
    )
    source.matrix(3)
    assert [expert for _, expert in store.tiers[CPU].held] == [2, 3]


def test_counts_can_be_set_to_zero_and_what_is_held_dropped(shards):
    store = ExpertStore(shards, {CPU: 10**9})
    source = stored(store, CPU)
    source.matrix(0)
    source.matrix(0)
    assert store.traffic.hit_rate == 0.5
    store.reset()
    assert store.traffic == type(store.traffic)()
    store.clear()
    source.matrix(0)
    assert store.traffic.read == 1
    assert "of 1,000,000,000 bytes on cpu; 0% of 1 found there" in repr(store)
