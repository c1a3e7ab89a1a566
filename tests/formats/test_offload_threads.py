"""A store that is interrupted, or used by several threads at once."""

import _thread
import threading
import time

import pytest
import torch

import llama4lab as lab
from llama4lab.model.expert_store import AHEAD, ExpertStore

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(new_text_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("threads")
    new_text_model(num_experts_per_tok=2).save_pretrained(path)
    return path


def store_of(model) -> ExpertStore:
    assert model.store is not None
    return model.store


def is_whole(store: ExpertStore) -> bool:
    """Whether nothing is on its way, and what is held adds up."""
    tier = store.tiers[CPU]
    return not store._reading and tier.nbytes == sum(own.nbytes for own in tier.held.values()) <= tier.budget


@pytest.mark.parametrize("budget", [0, 100_000, 10**9])
@pytest.mark.parametrize("after", [1, 7, 20])
def test_an_interrupt_in_the_middle_of_a_read_leaves_nothing_half_held(folder, random_ids, monkeypatch, budget, after):
    model = lab.load(folder, device_map="disk", memory={"cpu": budget})
    ids, store = random_ids(1, 12), store_of(model)
    with torch.no_grad():
        wanted = lab.load(folder)(ids).logits
    read, awaited, calls, waiting = store.shards.read, store._awaited, [], threading.Event()

    def announced(key, reading):
        waiting.set()
        try:
            return awaited(key, reading)
        finally:
            waiting.clear()

    def interrupted(name, index=None):
        if threading.current_thread() is not threading.main_thread():  # which reads rows of the embeddings itself
            calls.append(name)
            if len(calls) == after:
                waiting.wait(10)  # until the pass has to wait, which it does: nobody else reads
                time.sleep(0.2)
                _thread.interrupt_main()  # as Ctrl-C does
                time.sleep(0.2)
        return read(name, index)

    monkeypatch.setattr(store, "_awaited", announced)
    monkeypatch.setattr(store.shards, "read", interrupted)
    with pytest.raises(KeyboardInterrupt), torch.no_grad():
        model(ids)
    monkeypatch.undo()
    assert len(store._reading) <= AHEAD
    for _ in range(2):
        with torch.no_grad():
            assert model(ids).logits.equal(wanted)
        assert is_whole(store)


def test_an_error_in_the_reader_reaches_who_asked_and_is_forgotten(folder, random_ids, monkeypatch):
    model = lab.load(folder, device_map="disk", memory={"cpu": 0})
    ids, store = random_ids(1, 12), store_of(model)
    read = store.shards.read

    def broken(name, index=None):
        if "layers.1.self_attn.k_proj" in name:
            raise OSError("the disk is gone")
        return read(name, index)

    monkeypatch.setattr(store.shards, "read", broken)
    with pytest.raises(OSError, match="the disk is gone"), torch.no_grad():
        model(ids)
    monkeypatch.undo()
    with torch.no_grad():
        assert model(ids).logits.equal(lab.load(folder)(ids).logits)
    assert is_whole(store)


@pytest.mark.parametrize("budget", [0, 60_000, 10**9])
def test_threads_with_different_prompts_get_the_numbers_of_the_resident_model(folder, random_ids, budget):
    model, resident = lab.load(folder, device_map="disk", memory={"cpu": budget}), lab.load(folder)
    prompts = [random_ids(1, 9, seed=seed) for seed in range(4)]
    found, wrong = [], []

    def run(ids: torch.Tensor, wanted: torch.Tensor) -> None:
        try:
            with torch.no_grad():
                found.extend(model(ids).logits.equal(wanted) for _ in range(3))
        except Exception as error:  # would be lost with its thread
            wrong.append(error)

    with torch.no_grad():
        threads = [threading.Thread(target=run, args=(ids, resident(ids).logits)) for ids in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert found == [True] * 12
    assert is_whole(store_of(model))


def test_what_two_threads_want_is_read_once(folder, random_ids, monkeypatch):
    model, ids = lab.load(folder, device_map="disk"), random_ids(1, 9)
    store, read, names = store_of(model), store_of(model).shards.read, []

    def slow(name, index=None):
        names.append((name, index))
        time.sleep(0.002)
        return read(name, index)

    monkeypatch.setattr(store.shards, "read", slow)
    start = threading.Barrier(2)

    def run() -> None:
        start.wait()
        with torch.no_grad():
            model(ids)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    matrices = [name for name in names if "embed_tokens" not in name[0]]
    assert len(matrices) == len(set(matrices)) == store.traffic.read
    assert store.traffic.asked == 2 * store.traffic.read
