import numpy as np
import pytest

import llama4lab as lab
from llama4lab.tables.routing.periods import load_over_time

INDICES = "layers.*.feed_forward.router.indices"


@pytest.fixture(scope="module")
def model(new_text_model):
    return new_text_model(num_experts_per_tok=2)


@pytest.fixture(scope="module")
def run(model, random_ids) -> lab.Run:
    """Two rows, the second padded on the left by 6."""
    prompt = model.prompt(random_ids(2, 20))
    prompt.attention_mask[1, :6] = 0
    prompt.modality[1][:6] = ["pad"] * 6
    return lab.record(model, prompt, INDICES)


@pytest.mark.parametrize("window", [1, 5, 7, 50])
def test_windows_of_a_run_count_from_the_first_token_of_each_row(run, window):
    table = load_over_time(run, window=window)
    for layer, indices in run.layers("feed_forward.router.indices").items():
        for first in range(0, 20, window):
            chosen = np.concatenate([indices[0, first : first + window], indices[1, 6:][first : first + window]])
            own = table[(table["layer"] == layer) & (table["first"] == first)]
            counts = np.bincount(chosen.ravel(), minlength=4)
            assert own["tokens"].tolist() == counts.tolist()
            assert own["expert_load"].tolist() == pytest.approx((counts / counts.sum()).tolist())
            assert set(own["last"]) == {min(first + window, 20) - 1}


def test_the_default_window_cuts_the_longest_row_into_at_most_sixteen(run):
    assert len(np.unique(load_over_time(run)["first"])) == 10


def test_stretches_of_statistics_double(model, run):
    stats = lab.routing_stats(model, run.prompt, progress=False)
    table, single = load_over_time(stats), load_over_time(run, window=1)
    for layer in (1, 3):
        for first in (0, 1, 3, 7, 15):
            own = table[(table["layer"] == layer) & (table["first"] == first)]
            assert set(own["last"]) == {2 * first}
            counts = dict.fromkeys(range(4), 0)
            for line in single.to_dict("records"):
                if line["layer"] == layer and first <= line["first"] <= 2 * first:
                    counts[line["expert"]] += line["tokens"]
            assert own["tokens"].tolist() == list(counts.values())
            assert sum(own["expert_load"]) == pytest.approx(1)
    assert set(table["uniform"]) == {0.25}
    assert set(table["first"]) == {0, 1, 3, 7, 15}


def test_what_cannot_be_cut_is_refused(model, run):
    with pytest.raises(ValueError, match="at least 1 token"):
        load_over_time(run, window=0)
    stats = lab.routing_stats(model, run.prompt, progress=False)
    with pytest.raises(ValueError, match="fixed when counting"):
        load_over_time(stats, window=4)
