"""The trained checkpoint can do what its card says, on documents that training never saw."""

import pytest
import torch

from llama4lab.tiny import evaluation, specialisation
from llama4lab.tiny.packing import GROUPS


@pytest.fixture(scope="module")
def checkpoint():
    return evaluation.open_checkpoint()


@pytest.fixture(scope="module")
def rows(checkpoint):
    return specialisation.held_out(checkpoint[1], 16)


def test_repeated_random_words_are_copied_by_an_induction_head(checkpoint):
    first, second, scores = evaluation.copying(*checkpoint, n=24)
    assert first > 5.0
    assert second < 0.25 * first
    assert scores.max() > 0.5


def test_indirect_objects_are_found(checkpoint):
    assert evaluation.accuracy(*checkpoint, domain="indirect_objects", n=150) > 0.9


def test_facts_are_known_in_wordings_not_seen_for_that_country(checkpoint):
    assert evaluation.accuracy(*checkpoint, domain="facts", n=150) > 0.95


def test_recall_beyond_a_chunk_needs_the_nope_layers(checkpoint):
    free, barred = evaluation.far_recall(*checkpoint, n=40)
    assert free > 0.8
    assert barred < 0.2


def test_questions_about_shapes_are_answered_from_the_image(checkpoint):
    seen, shuffled = evaluation.looking(*checkpoint, n=100)
    assert seen > 0.85
    assert shuffled < 0.5


@pytest.mark.parametrize(("domain", "least"), [("code", 0.95), ("translation", 0.85), ("recall", 0.95), ("chat", 0.95)])
def test_the_other_domains_are_learned(checkpoint, domain, least):
    assert evaluation.accuracy(*checkpoint, domain=domain, n=150) > least


def test_sums_are_known_by_heart_and_not_computed(checkpoint):
    assert evaluation.accuracy(*checkpoint, domain="arithmetic", n=150, split="train") > 0.9
    assert evaluation.accuracy(*checkpoint, domain="arithmetic", n=150) < 0.5


def test_no_expert_is_dead(checkpoint, rows):
    for load in specialisation.expert_load(checkpoint[0], rows).values():
        assert load.min() > 0.005


def test_experts_know_more_about_domains_than_random_ones(checkpoint, rows):
    trained = specialisation.information(checkpoint[0], rows)
    random = specialisation.information(specialisation.untrained(checkpoint[0]), rows)
    assert all(trained[layer] > random[layer] for layer in trained)


def test_some_experts_serve_one_domain(checkpoint):
    rows = specialisation.held_out(checkpoint[1], 8)
    ranked = specialisation.ranking(specialisation.ablation(checkpoint[0], rows))
    # Held-out sums are mostly wrong with every expert in place, so what happens to them says little.
    known = [entry for entry in ranked if GROUPS[entry[2]] != "arithmetic"]
    clear = [entry for entry in known if entry[3] > 0.15 and entry[3] > 10 * max(entry[4], 0.01)]
    assert len(clear) >= 3
    assert len({GROUPS[entry[2]] for entry in clear}) >= 2


def test_the_files_are_small_and_in_bfloat16(checkpoint):
    model, _ = evaluation.open_checkpoint()
    folder = evaluation.HERE
    assert sum(file.stat().st_size for file in folder.iterdir() if file.is_file()) < 12e6
    kept = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    assert all(torch.equal(tensor, tensor.bfloat16().float()) for tensor in kept.values())
