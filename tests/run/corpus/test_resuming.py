"""An interrupted count goes on from its file, and ends as if nothing had happened."""

import random

import numpy as np
import pytest

import llama4lab as lab
from llama4lab.run.corpus import batches, counting


@pytest.fixture(scope="module")
def items(random_ids) -> list[dict]:
    return [{"text": random_ids(2 + 11 * n % 23, seed=n).tolist(), "kind": f"kind {n // 20}"} for n in range(48)]


@pytest.fixture(autouse=True)
def _short_windows(monkeypatch):
    monkeypatch.setattr(batches, "MOST_ROWS", 16)


COUNT = {"by": "kind", "tokens": 128, "progress": False, "vocabulary": True}


def hooks(model) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def same(one: lab.RoutingStats, other: lab.RoutingStats) -> None:
    for name in ("groups", "items", "about", "token_texts"):
        assert getattr(one, name) == getattr(other, name)
    assert all(np.array_equal(one.arrays[name], other.arrays[name]) for name in one.arrays)


def interrupted(items: list[dict], after: int):
    for number, item in enumerate(items):
        if number == after:
            raise KeyboardInterrupt
        yield item


@pytest.mark.parametrize("every_batch", [True, False], ids=["saved at every batch", "saved when it ends"])
def test_interrupted_in_the_prompts(small, items, tmp_path, monkeypatch, every_batch):
    monkeypatch.setattr(counting, "SAVE_AFTER", -1.0 if every_batch else 1e9)
    whole = lab.routing_stats(small, items, **COUNT)
    rng, path = random.Random(0), tmp_path / "stats.npz"
    for after in sorted(rng.sample(range(48), 3)):
        with pytest.raises(KeyboardInterrupt):
            lab.routing_stats(small, interrupted(items, after), path=path, **COUNT)
    same(lab.routing_stats(small, iter(items), path=path, **COUNT), whole)
    same(lab.RoutingStats.load(path), whole)
    assert hooks(small) == 0


def test_interrupted_in_the_model(small, items, tmp_path):
    whole = lab.routing_stats(small, items, **COUNT)
    rng, path, fired = random.Random(1), tmp_path / "stats.parquet", 0

    def hook(*_) -> None:
        nonlocal fired
        fired += 1
        if fired == last:
            raise KeyboardInterrupt

    for _ in range(3):
        fired, last = 0, rng.randint(1, 4)
        layer = small.text.layers[rng.randrange(4)]
        handle = layer.resid_post.register_forward_hook(hook)
        try:
            with pytest.raises(KeyboardInterrupt):
                lab.routing_stats(small, items, path=path, **COUNT)
        finally:
            handle.remove()
        assert hooks(small) == 0
    same(lab.routing_stats(small, items, path=path, **COUNT), whole)


def test_interrupted_while_adding_up_nothing_half_added_is_saved(small, items, tmp_path, monkeypatch):
    whole = lab.routing_stats(small, items, **COUNT)
    path, calls, add = tmp_path / "stats.npz", 0, counting.Counts.add

    def torn(self, *args):
        nonlocal calls
        calls += 1
        add(self, *args)
        if calls == 4:
            self.whole = False
            raise KeyboardInterrupt

    monkeypatch.setattr(counting, "SAVE_AFTER", -1.0)
    monkeypatch.setattr(counting.Counts, "add", torn)
    with pytest.raises(KeyboardInterrupt):
        lab.routing_stats(small, items, path=path, **COUNT)
    monkeypatch.setattr(counting.Counts, "add", add)
    same(lab.routing_stats(small, items, path=path, **COUNT), whole)


def test_a_count_that_is_done_is_only_read(small, items, tmp_path):
    path = tmp_path / "stats.npz"
    whole = lab.routing_stats(small, items, path=path, **COUNT)
    handle = small.text.register_forward_hook(lambda *_: pytest.fail("a pass ran"))
    try:
        same(lab.routing_stats(small, items, path=path, **COUNT), whole)
    finally:
        handle.remove()


@pytest.mark.parametrize("changed", [{"by": None}, {"tokens": 32}, {"vocabulary": [1]}, {"max_length": 5}])
def test_a_file_of_other_options_is_refused(small, items, tmp_path, changed):
    path = tmp_path / "stats.npz"
    lab.routing_stats(small, items[:4], path=path, **COUNT)
    with pytest.raises(ValueError, match=f"holds other statistics: its {next(iter(changed))}"):
        lab.routing_stats(small, items[:4], path=path, **COUNT | changed)


def test_a_file_of_another_model_or_of_other_prompts_is_refused(small, new_text_model, items, tmp_path):
    path = tmp_path / "stats.npz"
    with pytest.raises(KeyboardInterrupt):
        lab.routing_stats(small, interrupted(items, 36), path=path, **COUNT)
    other = new_text_model(num_experts_per_tok=2, num_hidden_layers=4, seed=1)
    with pytest.raises(ValueError, match="its model is"):
        lab.routing_stats(other, items, path=path, **COUNT)
    for wrong in (items[1:], items[:3], items[:30] + items[:30]):
        with pytest.raises(ValueError, match="begin otherwise"):
            lab.routing_stats(small, wrong, path=path, **COUNT)
    both = lab.RoutingStats.load(path)
    (both + both).save(path)
    with pytest.raises(ValueError, match="it is a sum"):
        lab.routing_stats(small, items, path=path, **COUNT)


def test_a_sum_is_refused_whatever_its_options(small, items, tmp_path):
    path = tmp_path / "stats.npz"
    stats = lab.routing_stats(small, items[:4], **COUNT)
    (stats + stats).save(path)
    with pytest.raises(ValueError, match="it is a sum"):
        lab.routing_stats(small, items[:4], path=path, **COUNT)
