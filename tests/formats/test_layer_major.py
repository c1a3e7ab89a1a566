"""Many prompts through a model that waits on disk: each weight is read once for all, and numbers stay the same."""

import numpy as np
import pytest
import torch

import llama4lab as lab
from llama4lab.model.expert_bank import ExpertBank
from llama4lab.run.corpus.arrays import MEANS, RESOLUTION
from llama4lab.run.corpus.batches import MOST_TILES
from llama4lab.tiny.domains.catalogue import examples

SUMS = {*MEANS, "writes"}


@pytest.fixture(scope="module")
def folder(new_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus")
    new_model(num_experts_per_tok=2, num_local_experts=8).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def prompts(random_ids) -> list[list[int]]:
    """Forty prompts of 1 to 20 tokens."""
    return [random_ids(1 + (7 * number) % 20, seed=number).tolist() for number in range(40)]


def waiting(folder, **options):
    model = lab.load(folder, experts="offload", memory={"cpu": 0}, **options)
    assert model.store is not None
    return model, model.store


def routed_nbytes(model, prompts: list[list[int]]) -> int:
    """Bytes of the experts that some prompts are sent to, found prompt by prompt."""
    used = set()
    for ids in prompts:
        run = lab.record(model, ids, at="layers.*.feed_forward.router.indices")
        for layer, chosen in run.layers("feed_forward.router.indices").items():
            used |= {(layer, expert) for expert in chosen.unique().tolist()}
    total = 0
    for layer, expert in used:
        experts = model.text.layers[layer].feed_forward.experts
        for bank in (experts.gate_up_proj, experts.down_proj):
            assert isinstance(bank, ExpertBank)
            total += bank[expert].nbytes
    return total


def without_last(old: torch.Tensor) -> torch.Tensor:
    """Sets the last position of each row to zero."""
    return torch.cat([old[:, :-1], torch.zeros_like(old[:, -1:])], dim=1)


def same(one: lab.RoutingStats, two: lab.RoutingStats) -> None:
    for name, counts in one.arrays.items():
        if name in SUMS:
            np.testing.assert_allclose(counts * RESOLUTION, two.arrays[name] * RESOLUTION, rtol=1e-4, atol=1e-4)
        else:
            assert np.array_equal(counts, two.arrays[name]), name


@torch.no_grad()
def test_counting_a_corpus_reads_each_routed_expert_once(folder, prompts):
    model, store = waiting(folder)
    wanted = routed_nbytes(model, prompts)
    store.reset()
    lab.routing_stats(model, prompts, progress=False)
    assert store.traffic.bytes_read == wanted
    store.reset()
    lab.routing_stats(model, prompts, tokens=100, progress=False)
    several = store.traffic.bytes_read
    assert wanted < several
    model.attn = "sdpa"  # whose masks keep rows apart: batches of like length
    store.reset()
    lab.routing_stats(model, prompts, tokens=100, progress=False)
    assert store.traffic.bytes_read > wanted


@torch.no_grad()
def test_recording_many_prompts_reads_each_routed_expert_once(folder, prompts):
    model, store = waiting(folder)
    wanted = routed_nbytes(model, prompts)
    store.reset()
    run = lab.record(model, [*prompts], at="layers.*.resid_post")
    rows = run.prompt.input_ids.shape[0]
    assert rows == 40
    # Rows are padded, and padding is routed too.
    padding = lab.record(model, run.prompt, at="layers.*.feed_forward.router.indices")
    used = sum(len(chosen.unique()) for chosen in padding.layers("feed_forward.router.indices").values())
    assert store.traffic.read == 2 * 2 * used, "two passes, two projections"
    assert store.traffic.bytes_read >= 2 * wanted
    alone = lab.record(lab.load(folder), prompts[3], at="layers.*.resid_post")
    for name in run.names:
        torch.testing.assert_close(run[name][3, -len(prompts[3]) :], alone[name][0], rtol=0, atol=2e-5)


@torch.no_grad()
def test_counts_of_packed_rows_are_those_of_batches(folder, prompts):
    by = {"one": prompts[:15], "two": prompts[15:]}
    models = waiting(folder)[0], lab.load(folder)
    same(*(lab.routing_stats(model, by, vocabulary=True, progress=False) for model in models))


@torch.no_grad()
def test_images_and_padded_prompts_are_counted_alike():
    resident, waiting = lab.load(), lab.load(device_map="disk", memory={"cpu": 0})
    pictures = examples("shapes", 18)
    found = []
    for model in (waiting, resident):
        padded = model.prompt(["The capital of France is", "One"])
        items = [model.prompt(picture.text, images=picture.image) for picture in pictures]
        found.append(lab.routing_stats(model, [padded, *items[:6], "alone", *items[6:]], progress=False))
    assert sum(len(prompt.pixel_values) for prompt in items) > MOST_TILES
    same(*found)


@torch.no_grad()
def test_interventions_act_as_in_any_run(folder, prompts):
    resident, (model, _) = lab.load(folder), waiting(folder)
    found = []
    for own in (model, resident):
        with lab.patched(own, {"layers.1.resid_pre": without_last}):
            found.append(lab.routing_stats(own, prompts, progress=False))
    same(*found)


@torch.no_grad()
def test_a_count_goes_on_in_the_passes_that_it_began_with(folder, prompts, tmp_path, monkeypatch):
    model, _ = waiting(folder)
    path = tmp_path / "stats.npz"

    def half():
        yield from prompts[:20]
        raise KeyboardInterrupt

    monkeypatch.setattr("llama4lab.run.corpus.batches.AHEAD", 1)
    with pytest.raises(KeyboardInterrupt):
        lab.routing_stats(model, half(), path=path, tokens=64, progress=False)
    assert 0 < lab.RoutingStats.load(path).items < 40
    whole = lab.routing_stats(model, prompts, path=path, progress=False)
    assert whole.items == 40
    assert whole.about["tokens"] == "64, packed"
    same(whole, lab.routing_stats(model, prompts, progress=False))
    with pytest.raises(ValueError, match="its tokens is '64, packed', not 4096"):
        lab.routing_stats(lab.load(folder), prompts, path=path, progress=False)
