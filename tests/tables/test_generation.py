"""Tables of a generation: against single passes over the finished text, and against tables that exist already."""

from typing import Any

import pandas as pd
import pytest
import torch

import llama4lab as lab
from llama4lab.tables import generation
from llama4lab.tables.attention.patterns import mass
from llama4lab.tables.generation_growth import GrowingTables

TEXTS = ["The capital of France is", "When Mary and John went to the store, John gave a drink to"]
ROUTERS, PATTERNS, VECTORS = (
    "layers.*.feed_forward.router.*",
    "layers.*.self_attn.pattern",
    "layers.*.self_attn.[qk]_rot",
)
LOOKS = ["own_chunk", "earlier", "first_token", "itself", "distance", "entropy"]


@pytest.fixture(scope="module")
def tiny():
    return lab.load()


@pytest.fixture(scope="module")
def long_texts():
    """Two texts of unequal length whose generated tokens cross the border of a chunk of 64."""
    return [TEXTS[0], TEXTS[1] + "".join(f" Mary and {TEXTS[1][5:]}" for _ in range(3))]


@pytest.fixture(scope="module")
def run(tiny, long_texts):
    return lab.generate(tiny, long_texts, max_new_tokens=12, at=[ROUTERS, PATTERNS], eos_token_id=None)


def test_choices_are_those_of_one_pass_over_the_finished_text(tiny, run):
    table: Any = generation.tokens(run)
    once = lab.record(tiny, run.prompt)
    log_probs = once.logits.double().log_softmax(-1)
    for line in table.to_dict("records"):
        own = log_probs[line["row"], line["position"] - 1]
        assert line["token_id"] == run.prompt.input_ids[line["row"], line["position"]]
        assert line["log_prob"] == pytest.approx(own[line["token_id"]].item(), abs=1e-3)
        assert line["entropy"] == pytest.approx(-(own.exp() * own).sum().item(), abs=1e-3)
        assert line["rank"] == 0
        assert line["best"] == line["token"]
    assert table["step"].tolist() == [*range(12)] * 2


def test_a_sampled_token_has_its_rank_among_all(tiny):
    torch.manual_seed(0)
    run = lab.generate(tiny, TEXTS[1], max_new_tokens=10, do_sample=True, temperature=5.0, eos_token_id=None)
    table: Any = generation.tokens(run)
    order = run.logits[0].sort(dim=-1, descending=True, stable=True).indices
    places = (order == run.prompt.input_ids[0, -10:, None]).nonzero()[:, 1]
    assert table["rank"].tolist() == places.tolist()
    assert table["rank"].max() > 0


def test_experts_are_the_decisions_about_generated_tokens(run):
    table: Any = generation.experts(run)
    whole: Any = lab.tables.routing.decisions(run)
    first = run.prompt.input_ids.shape[1] - 12
    own: Any = whole[whole["position"] >= first].reset_index(drop=True)
    pd.testing.assert_frame_equal(table.drop(columns="step"), own)
    assert (table["step"] == table["position"] - first).all()
    assert table["step"].max() == 10  # the last token was never read


def test_attention_is_where_a_pass_over_the_finished_text_looks(tiny, run):
    """The mean over the generated tokens of one row is what `mass` gives of them."""
    table: Any = generation.attention(run)
    first = run.prompt.input_ids.shape[1] - 12
    once = lab.record(tiny, run.prompt, at=PATTERNS)
    for row in range(2):
        expected = mass(once.cut(rows=row, positions=slice(first, -1)))
        found = table[table["row"] == row].groupby(["layer", "head"])[LOOKS].mean().reset_index()
        for name in set(LOOKS) - {"distance"}:
            assert (found[name] - expected[name]).abs().max() < 1e-4, name


def test_the_distance_is_the_mean_over_keys(tiny, run):
    table: Any = generation.attention(run)
    first = run.prompt.input_ids.shape[1] - 12
    pattern = lab.record(tiny, run.prompt, at=PATTERNS)["layers.3.self_attn.pattern"]
    positions = torch.arange(pattern.shape[-1])
    for step in (0, 5, 10):
        expected = (pattern[1, :, first + step] * (first + step - positions).clamp(min=0)).sum(-1)
        own = table.query("row == 1 and layer == 3 and step == @step")["distance"]
        assert own.tolist() == pytest.approx(expected.tolist(), abs=1e-3)


def test_a_chunked_layer_looks_at_no_earlier_chunk_and_all_shares_add_up(run):
    table: Any = generation.attention(run)
    assert (table.loc[table["kind"] == "rope", "earlier"] == 0).all()
    assert (table.loc[table["kind"] == "nope", "earlier"] > 0.1).any()
    assert (table["own_chunk"] + table["earlier"] - 1).abs().max() < 1e-4


def test_attention_from_queries_and_keys_is_that_from_patterns(tiny, long_texts, run):
    vectors = lab.generate(tiny, long_texts, max_new_tokens=12, at=VECTORS, eos_token_id=None)
    expected, found = generation.attention(run), generation.attention(vectors)
    pd.testing.assert_frame_equal(found, expected, atol=1e-4, check_dtype=False)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"prefill_chunk_size": 7}], ids=str)
def test_tables_that_grow_are_those_of_the_finished_run(options, tiny, long_texts, run):
    grown = GrowingTables(tiny, prompt_tail=3)

    def each_step(step) -> None:
        grown.add(step)
        if step.number % 5 == 2:
            grown.catch_up()

    asked = {"at": grown.at, "passing": grown.passing, "each_step": each_step, "eos_token_id": None, **options}
    lab.generate(tiny, long_texts, max_new_tokens=12, **asked)
    grown.catch_up()
    first = run.meta["generated_from"]
    pd.testing.assert_frame_equal(grown.tokens, generation.tokens(run), atol=1e-3)
    pd.testing.assert_frame_equal(grown.attention, generation.attention(run), atol=1e-3, check_dtype=False)
    whole: Any = lab.tables.routing.decisions(run)
    own: Any = whole[whole["position"] >= first - 3].reset_index(drop=True)
    pd.testing.assert_frame_equal(grown.decisions, own, atol=1e-3)


def test_tables_grow_with_two_experts_a_token_dense_layers_and_padding(new_text_model):
    model = new_text_model(num_experts_per_tok=2)
    prompt = model.prompt([[5, 6, 7, 8, 9, 10, 11], [5, 6, 7]])
    grown = GrowingTables(model)
    run = lab.generate(model, prompt, max_new_tokens=6, at=[ROUTERS, PATTERNS])
    lab.generate(model, prompt, max_new_tokens=6, at=grown.at, passing=grown.passing, each_step=grown.add)
    grown.catch_up()
    pd.testing.assert_frame_equal(grown.decisions, lab.tables.routing.decisions(run), atol=1e-4)
    pd.testing.assert_frame_equal(grown.attention, generation.attention(run), atol=1e-4, check_dtype=False)
    assert sorted(set(generation.experts(run)["slot"])) == [0, 1]


def test_rows_that_have_ended_have_no_further_lines(tiny):
    end = int(lab.generate(tiny, TEXTS[0], max_new_tokens=2).prompt.input_ids[0, -2])
    run = lab.generate(tiny, TEXTS, max_new_tokens=6, at=[ROUTERS, PATTERNS], eos_token_id=end)
    table: Any = generation.tokens(run)
    assert table.loc[table["row"] == 0, "token_id"].tolist() == [end]
    assert len(table[table["row"] == 1]) > 1
    assert set(generation.experts(run).query("row == 0")["step"]) == {0}
    assert set(generation.attention(run).query("row == 0")["step"]) == {0}


def test_a_run_that_was_cut_or_saved_keeps_its_steps(run, tmp_path):
    whole: Any = generation.tokens(run)
    part = generation.tokens(run.cut(rows=1, positions=run.logit_positions[4:6]))
    expected: Any = whole[(whole["row"] == 1) & whole["step"].isin([4, 5])].reset_index(drop=True)
    pd.testing.assert_frame_equal(part, expected)
    run.save(tmp_path / "run.safetensors")
    read = generation.tokens(lab.Run.load(tmp_path / "run.safetensors"))
    pd.testing.assert_frame_equal(read.drop(columns="best"), whole.drop(columns="best"))


def test_a_run_that_was_not_generated_is_refused(tiny):
    with pytest.raises(ValueError, match=r"not generated[\s\S]*lab\.generate"):
        generation.tokens(lab.record(tiny, TEXTS[0]))


def test_attention_that_was_not_recorded_is_named(tiny):
    run = lab.generate(tiny, TEXTS[0], max_new_tokens=2, at=ROUTERS)
    with pytest.raises(KeyError, match="q"):
        generation.attention(run)


def test_barred_keys_need_patterns(tiny):
    with lab.edited(tiny, layers=7, bar="first_token"):
        run = lab.generate(tiny, TEXTS[0], max_new_tokens=3, at=VECTORS, eos_token_id=None)
        patterns = lab.generate(tiny, TEXTS[0], max_new_tokens=3, at=PATTERNS, eos_token_id=None)
    with pytest.raises(ValueError, match="bars single keys"):
        generation.attention(run)
    assert set(generation.attention(patterns).query("layer == 7")["first_token"]) == {0.0}
