# Columns of a place are handed on as one list.
# pyright: reportCallIssue=false

import accelerate
import numpy as np
import pytest
import torch

import llama4lab as lab
from llama4lab.run.alternatives import Given, alone_in_its_row, cell_outcomes, line_outcomes
from llama4lab.run.metrics import evaluated
from llama4lab.run.sweep_engine.engine import Engine

TOLERANCE = 2e-5
LOSS = lab.metrics.loss()


@pytest.fixture(scope="module")
def prompt(small, random_ids):
    """Two rows of different length, longer than a chunk."""
    ids = random_ids(2, 19)
    return small.prompt([ids[0].tolist(), ids[1, 6:].tolist()])


# Place -> the shape of one value there, and how many slots it has.
PLACES = {
    "layers.1.feed_forward.router.indices": 2,
    "layers.3.feed_forward.router.gates": 2,
    "layers.1.feed_forward.experts.out": 2,
    "layers.3.feed_forward.experts.out": 2,
    "layers.0.feed_forward.out": None,
    "layers.2.self_attn.z": None,
    "layers.1.resid_mid": None,
    "layers.1.resid_post": None,
    "layers.3.resid_post": None,
    "embed_merged": None,
    "final_norm": None,
}


def some_values(model, prompt, name, count, slots):
    """Values that are at home at a hook point: those of its own tokens, one after the other."""
    tensor = lab.record(model, prompt, at=name)[name]
    each = tensor[prompt.attention_mask.bool()]
    each = each[:, 0] if slots else each
    return each[torch.arange(count) * 5 % len(each)]


def given_for(model, prompt, name, *, slots, seed=0, cells=4, entries=9):
    """Entries at random tokens, of which one cell may have several or none."""
    drawn = np.random.default_rng(seed)
    tokens = prompt.attention_mask.bool().nonzero().numpy()
    slot = drawn.integers(0, 2, entries) if slots else np.zeros(entries, dtype=int)
    cell, token = drawn.integers(0, cells, entries), drawn.integers(0, len(tokens), entries)
    keys = np.stack([cell, token, slot])
    kept = np.unique(keys, axis=1, return_index=True)[1]
    cell, (row, position), slot = cell[kept], tokens[token[kept]].T, slot[kept]
    columns = [torch.from_numpy(column.copy()) for column in (cell, row, position)]
    values, at = some_values(model, prompt, name, 5, slots), torch.from_numpy(drawn.integers(0, 5, len(kept)))
    return Given(name, *columns, torch.from_numpy(slot.copy()) if slots else None, values, at)


def single_run(model, prompt, given, cell, metric=LOSS):
    """The same by `patched`, entry by entry."""

    def patch_of(each):
        def patch(tensor):
            new = tensor.clone()
            for entry in (each.cell == cell).nonzero().flatten().tolist():
                place = (each.row[entry], each.position[entry])
                place = place if each.slot is None else (*place, each.slot[entry])
                new[place] = each.values[each.at[entry]]
            return new

        return patch

    with lab.patched(model, {each.name: patch_of(each) for each in given}):
        run = lab.record(model, prompt)
    return evaluated(metric, run), run.logits[:, -1].argmax(-1)


def assert_like_single_runs(model, prompt, given, cells, metric=LOSS, **running):
    found = cell_outcomes(model, prompt, given, cells, metric, **running)
    assert torch.allclose(found.base.value, evaluated(metric, lab.record(model, prompt)), atol=TOLERANCE)
    assert len(found.value) == cells
    for cell in range(cells):
        value, best = single_run(model, prompt, given, cell, metric)
        assert torch.allclose(found.value[cell], value, atol=TOLERANCE)
        assert torch.equal(found.top_ids[cell, :, 0], best)
    return found


@pytest.mark.parametrize("name", PLACES)
def test_cells_equal_single_runs_at_every_kind_of_place(small, prompt, name):
    given = given_for(small, prompt, name, slots=PLACES[name])
    found = assert_like_single_runs(small, prompt, [given], 4)
    assert (found.value - found.base.value).abs().max() > 1e-4


def test_all_slots_of_a_token_can_be_given_one_value(small, prompt):
    name = "layers.1.feed_forward.experts.out"
    assert_like_single_runs(small, prompt, [given_for(small, prompt, name, slots=None)], 4)


def test_several_places_change_together(small, prompt):
    given = [given_for(small, prompt, name, slots=PLACES[name], seed=i) for i, name in enumerate(PLACES)]
    assert_like_single_runs(small, prompt, given, 4)
    assert_like_single_runs(small, prompt, given[::-1], 4)


@pytest.mark.parametrize("metric", [lab.metrics.logit_diff([7, 8], [9, 10]), lambda logits: (logits[:, 3] ** 2).mean()])
def test_every_metric_is_followed(small, prompt, metric):
    name = "layers.1.feed_forward.router.indices"
    assert_like_single_runs(small, prompt, [given_for(small, prompt, name, slots=2)], 4, metric)


def test_with_somebody_elses_hooks_the_numbers_are_those_of_runs_inside_them(small, prompt):
    given = [given_for(small, prompt, name, slots=PLACES[name]) for name in PLACES]
    with lab.patched(small, {"layers.0.resid_post": lambda x: 1.3 * x}):
        assert_like_single_runs(small, prompt, given, 4)


def test_little_memory_changes_nothing_but_too_little_is_an_error(small, prompt, monkeypatch):
    given = [given_for(small, prompt, "layers.1.feed_forward.experts.out", slots=2, cells=60, entries=90)]
    whole, calls, run = cell_outcomes(small, prompt, given, 60, LOSS), [], Engine.run
    monkeypatch.setattr(Engine, "run", lambda self, cells, done: calls.append(cells) or run(self, cells, done))
    parts = cell_outcomes(small, prompt, given, 60, LOSS, memory="1100KiB")
    assert len(calls) > 3
    assert torch.allclose(parts.value, whole.value, atol=1e-6)
    with pytest.raises(MemoryError, match="one cell at a time"):
        cell_outcomes(small, prompt, given, 60, LOSS, memory=1000)


def test_an_offloaded_model_gives_the_same(small, prompt, new_text_model):
    away = new_text_model(num_experts_per_tok=2, num_hidden_layers=4)
    accelerate.cpu_offload(away, execution_device=torch.device("cpu"))
    given = [given_for(small, prompt, name, slots=PLACES[name]) for name in PLACES]
    here, there = (cell_outcomes(model, prompt, given, 4, LOSS) for model in (small, away))
    assert torch.allclose(here.value, there.value, atol=1e-6)
    assert all(parameter.device.type == "meta" for parameter in away.parameters())


def test_prompts_with_images_are_run(tiny, asked, no_hooks_left):
    name = "layers.3.feed_forward.router.indices"
    position = torch.tensor([5, 30, len(asked.tokens[0]) - 1])
    zeros = torch.zeros(3, dtype=torch.long)
    given = Given(name, torch.arange(3), zeros, position, zeros, torch.arange(8), torch.tensor([2, 5, 7]))
    assert_like_single_runs(tiny, asked, [given], 3)


def test_without_cells_there_is_the_prompt_as_it_is(small, prompt):
    found = cell_outcomes(small, prompt, [], 0, LOSS)
    assert found.value.shape == (0, 2)
    assert torch.allclose(found.base.value, evaluated(LOSS, lab.record(small, prompt)), atol=TOLERANCE)


def test_places_that_are_not_there_are_refused(small, prompt):
    given = given_for(small, prompt, "layers.1.resid_post", slots=None)
    with pytest.raises(ValueError, match="given once"):
        cell_outcomes(small, prompt, [given, given], 4, LOSS)
    wrong = Given("layers.1.resid", *[given.cell] * 3, None, given.values, given.at)
    with pytest.raises(ValueError, match="matches none"):
        cell_outcomes(small, prompt, [wrong], 4, LOSS)
    beyond = Given(given.name, given.cell, given.row, given.position + 19, None, given.values, given.at)
    with pytest.raises(IndexError, match="19 positions"):
        cell_outcomes(small, prompt, [beyond], 4, LOSS)


@pytest.mark.parametrize("metric", [LOSS, lambda logits: logits.mean()])
def test_lines_of_one_row_never_share_a_cell(metric):
    row, runs = np.array([0, 0, 1, 1, 1, 0]), np.array([True, False, True, True, False, True])
    cell = alone_in_its_row(row, runs, metric)
    assert (cell[~runs] == -1).all()
    own = list(zip(cell[runs], row[runs], strict=True))
    assert len(set(own)) == len(own)
    assert sorted(set(cell[runs])) == list(range(cell.max() + 1))
    assert cell.max() + 1 == (2 if metric is LOSS else 4)


@pytest.mark.parametrize("metric", [LOSS, lambda logits: (logits[:, 3:] ** 2).mean()])
def test_a_line_has_the_outcome_of_its_change_alone(small, prompt, metric):
    name, values = "layers.1.feed_forward.router.indices", torch.arange(4)
    row, position, expert = np.array([0, 1, 1, 0]), np.array([2, 9, 12, 4]), np.array([1, 2, 0, 3])
    cell = alone_in_its_row(row, np.array([True, True, True, False]), metric)
    ran = [torch.from_numpy(column[:3]) for column in (cell, row, position, np.zeros(4, dtype=np.int64), expert)]
    found = line_outcomes(small, prompt, [Given(name, *ran[:4], values, ran[4])], row, cell, metric)
    for line in range(4):
        one = [torch.tensor([number]) for number in (0, row[line], position[line], 0)]
        given = [Given(name, *one, values, torch.tensor([expert[line]]))] if cell[line] >= 0 else []
        value, best = single_run(small, prompt, given, 0, metric)
        assert torch.allclose(found.value[line], value[row[line]], atol=TOLERANCE)
        assert found.top_ids[line, 0] == best[row[line]]
