"""Experts that wait on disk: the numbers are those of the resident model, and only what is routed to is read."""

import re
import subprocess
import sys
import threading
from copy import deepcopy

import pytest
import torch

import llama4lab as lab
from llama4lab.checkpoint.shards import Shards
from llama4lab.model.expert_bank import ExpertBank
from llama4lab.model.expert_store import ExpertStore, Stored


def store_of(model) -> ExpertStore:
    assert model.store is not None
    return model.store


@pytest.fixture(params=["plain, unfused", "int4", "modelopt nvfp4", "fused"])
def folder(request, saved_as, new_model, tmp_path):
    if request.param != "fused":
        return saved_as(request.param)
    new_model(dtype=torch.bfloat16, num_local_experts=4).save_pretrained(tmp_path)
    return tmp_path


@torch.no_grad()
def test_logits_are_equal_to_those_of_the_resident_model(folder, image_batch):
    batch = image_batch([[2], [1]])
    resident = lab.load(folder)(**batch).logits
    offloaded = lab.load(folder, experts="offload")
    torch.testing.assert_close(offloaded(**batch).logits, resident, rtol=0, atol=1e-5)


@torch.no_grad()
def test_exactly_the_experts_that_tokens_were_routed_to_are_read(folder, random_ids):
    model = lab.load(folder, experts="offload")
    run = lab.record(model, random_ids(1, 3), at="layers.*.feed_forward.router.indices")
    used = {
        (layer, expert)
        for layer, chosen in run.layers("feed_forward.router.indices").items()
        for expert in chosen.unique().tolist()
    }
    traffic = store_of(model).traffic
    assert traffic.read == 2 * len(used), "both projections of each expert"
    layers = len(run.layers("feed_forward.router.indices"))
    banks = [getattr(module, name, None) for module in model.modules() for name in ("gate_up_proj", "down_proj")]
    sources = [bank.source for bank in banks if isinstance(bank, ExpertBank)]
    matrices = [m for source in sources if isinstance(source, Stored) for own in source.matrices for m in own]
    every = sum(matrix.nbytes(store_of(model).shards) for matrix in matrices)
    assert traffic.bytes_read == every * len(used) // (4 * layers)
    lab.record(model, random_ids(1, 3))
    assert traffic.read == 2 * len(used), "the second pass finds all of them in RAM"
    assert 0.5 <= traffic.hit_rate < 1


@torch.no_grad()
def test_what_is_kept_stays_inside_the_budget(folder, random_ids):
    model = lab.load(folder, experts="offload", memory={"cpu": "100KB"})
    plain = lab.load(folder)
    for seed in range(6):
        ids = random_ids(1, 12, seed=seed)
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=0, atol=1e-5)
        tier = store_of(model).tiers[torch.device("cpu")]
        assert tier.nbytes == sum(matrix.nbytes for matrix in tier.held.values()) <= 100_000
    nothing = lab.load(folder, experts="offload", memory={"cpu": 0})
    assert nothing(ids).logits.equal(model(ids).logits)
    assert not store_of(nothing).tiers[torch.device("cpu")].held


def test_patching_sweeps_and_gradients_work_on_experts_on_disk(folder, random_ids):
    metric = lab.metrics.logit_diff(5, 7)
    clean, corrupted = random_ids(1, 10), random_ids(1, 10, seed=1)
    found = []
    for options in ({}, {"experts": "offload", "memory": {"cpu": "200KB"}}):
        model = lab.load(folder, **options)
        at, over = "layers.*.resid_pre", ["layer", "position"]
        sweep = lab.sweep(model, clean, corrupted, at=at, over=over, metric=metric, progress=False)
        estimate = lab.attribute(model, clean, corrupted, at=at, metric=metric)
        found.append((sweep.tensor("effect"), next(iter(estimate.tensors.values()))))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=2e-5)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=2e-5)


@torch.no_grad()
def test_a_copy_of_the_model_shares_the_store(folder, random_ids):
    model, ids = lab.load(folder, experts="offload"), random_ids(1, 6)
    copy = deepcopy(model)
    assert copy(ids).logits.equal(model(ids).logits)
    assert store_of(copy) is store_of(model)


@torch.no_grad()
def test_two_threads_get_the_same_numbers(folder, random_ids):
    model = lab.load(folder, experts="offload", memory={"cpu": "100KB"})
    prompts = [random_ids(1, 12, seed=seed) for seed in range(4)]
    wanted = [lab.load(folder)(ids).logits for ids in prompts]
    found: dict[int, torch.Tensor] = {}

    def run(number: int) -> None:
        with torch.no_grad():
            for _ in range(3):
                found[number] = model(prompts[number]).logits

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, logits in found.items():
        torch.testing.assert_close(logits, wanted[number], rtol=0, atol=1e-5)


def test_an_interrupt_while_reading_leaves_a_usable_model(folder, random_ids, monkeypatch):
    model = lab.load(folder, experts="offload", memory={"cpu": 0})
    ids, shards = random_ids(1, 12), store_of(model).shards
    with torch.no_grad():
        wanted = model(ids).logits
    read, calls = shards.read, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return read(*args)

    monkeypatch.setattr(shards, "read", interrupted)
    with pytest.raises(KeyboardInterrupt), torch.no_grad():
        model(ids)
    monkeypatch.undo()
    with torch.no_grad():
        assert model(ids).logits.equal(wanted)


def test_a_file_that_became_shorter_is_an_error_that_names_it(folder, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    shards = Shards(copy)
    name = max(shards, key=lambda name: shards.spec(name).start)
    with (copy / "model.safetensors").open("r+b") as opened:
        opened.truncate(shards.spec(name).start + 1)
    with pytest.raises(OSError, match=rf"model\.safetensors ends before {re.escape(name)} does"):
        shards.read(name)


def test_slices_are_read_by_their_number(folder):
    shards = Shards(folder)
    name = next(name for name in shards if len(shards.spec(name).shape) > 1)
    assert shards.read(name, 2).equal(shards[name][2])
    with pytest.raises(IndexError, match="slice 5000"):
        shards.read(name, 5000)


def test_what_excludes_each_other_is_refused(folder):
    with pytest.raises(ValueError, match='choose "resident" or "offload"'):
        lab.load(folder, experts="elsewhere")
    with pytest.raises(ValueError, match=r"'lots' is not a size in memory; write for example \"20GiB\""):
        lab.load(folder, experts="offload", memory={"cpu": "lots"})


MEASURE = """
import resource, sys, torch
import llama4lab as lab
torch.set_num_threads(1)
folder, budget = sys.argv[1], int(sys.argv[2])
model = lab.load(folder, dtype="bfloat16", experts="offload", memory={"cpu": budget})
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ids = torch.randint(1, 100, (1, 64), generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    logits = model(ids).logits
torch.save(logits, sys.argv[3])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) * 1024, model.store.traffic.bytes_read)
"""


def test_experts_larger_than_the_budget_run_inside_it(tmp_path, new_text_model, random_ids):
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_local_experts": 16, "head_dim": 128}
    model = new_text_model(dtype=torch.bfloat16, num_hidden_layers=4, interleave_moe_layer_step=1, **sizes)
    model.save_pretrained(tmp_path / "model")
    experts = 4 * 16 * 3 * 512 * 1024 * 2
    budget = experts // 8
    with torch.no_grad():
        wanted = model(torch.randint(1, 100, (1, 64), generator=torch.Generator().manual_seed(0))).logits
    del model
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "model"), str(budget), str(tmp_path / "logits.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    grown, read = map(int, done.stdout.split())
    assert torch.load(tmp_path / "logits.pt").equal(wanted)
    assert read > 2 * budget
    assert grown < budget + 40 * 2**20
