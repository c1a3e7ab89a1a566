import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from llama4lab.model.loading import load
from llama4lab.prompt.prompt import Prompt
from llama4lab.prompt.repeats import repeated_tokens
from llama4lab.run.attention.reductions import Wanted
from llama4lab.run.attention.streaming import attention_stream, recorded_stream
from llama4lab.run.generation import generate
from llama4lab.run.recording import record
from llama4lab.run.run import Run
from llama4lab.tables import heads
from llama4lab.tiny import evaluation
from llama4lab.tiny.domains import induction

NAME = "layers.{}.self_attn.pattern"
QUERIES_AND_KEYS = ["layers.*.self_attn.q_rot", "layers.*.self_attn.k_rot"]


@pytest.fixture
def worded(make_prompt):
    """A prompt of words in which equal words have equal ids."""

    def make(*rows: str) -> Prompt:
        prompt = make_prompt(*rows)
        words = sorted({word for row in prompt.tokens for word in row})
        ids = torch.tensor([[words.index(word) for word in row] for row in prompt.tokens])
        return Prompt(ids, prompt.attention_mask, None, prompt.tokens, prompt.modality)

    return make


def uniform(length: int) -> torch.Tensor:
    return torch.tril(torch.ones(length, length)) / torch.arange(1, length + 1)[:, None]


def looking(length: int, *pairs: tuple[int, int]) -> torch.Tensor:
    """Each query looks at the key planted for it, the others at the first token."""
    pattern = torch.zeros(length, length)
    pattern[:, 0] = 1
    for query, key in pairs:
        pattern[query] = 0
        pattern[query, key] = 1
    return pattern


def table_of(make_run, prompt, planted: list[torch.Tensor], layer: int = 3, **meta):
    pattern = torch.stack(planted, dim=1) if planted[0].ndim == 3 else torch.stack(planted)[None]
    return heads.scores(make_run(prompt, {NAME.format(layer): pattern}, **meta))


def test_planted_heads_have_the_score_1_of_their_kind(make_run, worded):
    prompt = worded("a b c d a b c d")
    previous = looking(8, *[(q, q - 1) for q in range(1, 8)])
    duplicate = looking(8, *[(q, q - 4) for q in range(4, 8)])
    induction_head = looking(8, *[(q, q - 3) for q in range(4, 8)])
    table = table_of(make_run, prompt, [previous, duplicate, induction_head])
    assert table["kind"].tolist() == ["nope"] * 3
    # In the first round only `duplicate` and `induction_head` look at the first token, which b has before it.
    assert table["previous_token"].tolist() == pytest.approx([1, 1 / 7, 1 / 7])
    assert table["duplicate_token"].tolist() == pytest.approx([0, 1, 0])
    assert table["induction"].tolist() == pytest.approx([0, 0, 1])
    assert (
        table[["previous_token_queries", "duplicate_token_queries", "induction_queries"]].values.tolist()
        == [[7, 4, 4]] * 3
    )


def test_several_earlier_occurrences_count_together(make_run, worded):
    table = table_of(make_run, worded("a b a c a"), [uniform(5)])
    # Queries 2 and 4 are the word "a" again, after one and after two of it.
    assert table["duplicate_token"].item() == pytest.approx((1 / 3 + 2 / 5) / 2)
    assert table["induction"].item() == pytest.approx((1 / 3 + 2 / 5) / 2)
    assert table["previous_token"].item() == pytest.approx((1 / 2 + 1 / 3 + 1 / 4 + 1 / 5) / 4)


def test_a_token_that_repeats_at_once_does_not_look_at_itself(make_run, worded):
    table = table_of(make_run, worded("a a"), [torch.tensor([[1.0, 0], [0, 1]])])
    assert (table["duplicate_token_queries"].item(), table["induction_queries"].item()) == (1, 0)
    assert table["duplicate_token"].item() == 0
    assert np.isnan(table["induction"].item())


def test_targets_that_the_chunk_hides_are_left_out(make_run, worded):
    prompt = worded("a b a b a")
    near = table_of(make_run, prompt, [uniform(5)], layer=0, chunk_size=4)
    far = table_of(make_run, prompt, [uniform(5)], layer=3, chunk_size=4)
    assert near["kind"].item() == "rope"
    # The fifth token begins the second chunk: it sees nothing before it.
    assert near[["previous_token_queries", "duplicate_token_queries", "induction_queries"]].values.tolist() == [
        [3, 2, 2]
    ]
    assert far[["previous_token_queries", "duplicate_token_queries", "induction_queries"]].values.tolist() == [
        [4, 3, 3]
    ]
    assert near["duplicate_token"].item() == pytest.approx((1 / 3 + 1 / 4) / 2)


def test_padding_is_left_out_and_rows_count_by_their_tokens(make_run, worded):
    prompt = worded("a b a b", "c c")
    first, second = uniform(4), torch.zeros(4, 4)
    second[2:, 2:] = torch.tensor([[1, 0], [0.75, 0.25]])
    second[:2, :2] = torch.eye(2)  # what padding does
    table = table_of(make_run, prompt, [torch.stack([first, second])])
    assert table["previous_token"].item() == pytest.approx((1 / 2 + 1 / 3 + 1 / 4 + 0.75) / 4)
    assert table["duplicate_token"].item() == pytest.approx((1 / 3 + 1 / 4 + 0.75) / 3)
    assert table["induction_queries"].item() == 2


def test_chunks_of_padded_rows_begin_at_their_first_token(make_run, worded):
    prompt = worded("a b c d e", "a a a")
    table = table_of(make_run, prompt, [torch.stack([uniform(5)] * 2)], layer=0, chunk_size=3)
    # Chunks of the first row: abc de; of the second, two places later: aaa.
    assert table["previous_token_queries"].item() == 2 + 1 + 2


def test_image_tokens_are_never_the_same(make_run, worded):
    table = table_of(make_run, worded("<p> <p> a <p> a"), [uniform(5)])
    assert table["duplicate_token_queries"].item() == 1
    assert table["induction_queries"].item() == 1
    assert table["previous_token_queries"].item() == 4


def test_cut_runs_give_the_scores_of_their_queries(make_run, worded):
    prompt = worded("a b c a b c", "d e d e d e")
    patterns = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0)).tril()
    run = make_run(prompt, {NAME.format(3): patterns / patterns.sum(-1, keepdim=True)})
    cut = heads.scores(run.cut(rows=[1], positions=[3, 5]))
    weights = run[NAME.format(3)][1].double()
    expected = [(weights[head, 3, 1] + weights[head, 5, 1] + weights[head, 5, 3]) / 2 for head in range(3)]
    assert cut["duplicate_token"].tolist() == pytest.approx([value.item() for value in expected], abs=1e-6)


def test_the_heads_of_tiny_that_copy_are_those_of_its_card():
    model, packer = evaluation.open_checkpoint()
    _, _, expected = evaluation.copying(model, packer, 20)
    tiny = load()
    words = [tiny.prompt(f" {word}").input_ids[0, -1].item() for word in induction.WORDS]
    run = record(tiny, repeated_tokens(tiny, 20, length=25, vocabulary=words), at="layers.*.self_attn.pattern")
    scores = heads.scores(run).pivot(index="layer", columns="head", values="induction").to_numpy()
    assert scores.max() > 0.95
    # Other draws of words, and the token before the second round, which `copying` does not count.
    assert np.abs(scores - expected.numpy()).max() < 0.03


def test_the_score_of_tiny_is_that_of_the_stripe_in_its_pattern():
    tiny = load()
    prompt = repeated_tokens(tiny, 3, length=12)
    run = record(tiny, prompt, at="layers.7.self_attn.pattern")
    pattern, first = run["layers.7.self_attn.pattern"], int(prompt.modality[0][0] == "special")
    queries = torch.arange(first + 12, first + 24)
    stripe = pattern[:, :, queries, queries - 11].mean((0, 2))
    assert heads.scores(run)["induction"].tolist() == pytest.approx(stripe.tolist(), abs=1e-6)


def test_a_run_without_patterns_is_refused():
    tiny = load()
    for at in ([], [QUERIES_AND_KEYS[0]]):
        with pytest.raises(KeyError, match=r"Record it with at=\\?\"layers.\*.self_attn.pattern"):
            heads.scores(record(tiny, "one two", at=at))


def check_all_ways(model, prompt) -> pd.DataFrame:
    """Patterns, recorded queries and keys, and a stream give the same scores."""
    expected = heads.scores(record(model, prompt, at="layers.*.self_attn.pattern"))
    recorded = heads.scores(record(model, prompt, at=QUERIES_AND_KEYS))
    whole = attention_stream(model, prompt, wanted=Wanted(blocks=(7, 5)))
    for found in (recorded, heads.scores(whole), heads.streamed_scores(model, prompt)):
        pd.testing.assert_frame_equal(found, expected, atol=1e-5, rtol=0)
    return expected


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_chunk_size": 5, "num_attention_heads": 6, "num_key_value_heads": 2, "num_experts_per_tok": 2},
        {"attention_chunk_size": None},
        {"no_rope_layers": [0] * 5, "layer_types": ["full_attention"] * 5},
    ],
)
def test_scores_from_queries_and_keys_are_those_from_patterns(new_text_model, changes):
    model = new_text_model(**changes)
    ids = torch.randint(1, 6, (2, 33), generator=torch.Generator().manual_seed(1))
    table = check_all_ways(model, model.prompt([ids[0].tolist(), ids[1, :19].tolist()]))
    assert not table["induction"].isna().to_numpy().any()


def test_scores_of_tiny_from_queries_and_keys_are_those_from_patterns():
    tiny = load()
    table = check_all_ways(tiny, repeated_tokens(tiny, 3, length=25))
    assert table["induction"].to_numpy().max() > 0.5


def test_scores_of_a_prompt_with_a_picture_are_the_same_from_queries_and_keys():
    tiny = load()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 110, 3), dtype=np.uint8))
    prompt = tiny.prompt("<|image|> a red square and a red square", images=[picture])
    table = check_all_ways(tiny, prompt)
    assert 0 < table["duplicate_token_queries"].to_numpy().max() < prompt.modality[0].count("image")


def test_scores_of_a_part_of_a_run_are_the_same_from_queries_and_keys():
    tiny = load()
    run = record(tiny, repeated_tokens(tiny, 3, length=8), at=[*QUERIES_AND_KEYS, "layers.*.self_attn.pattern"])
    cut = run.cut(rows=[2, 0], positions=slice(0, 14))
    found = heads.scores(recorded_stream(cut))
    pd.testing.assert_frame_equal(found, heads.scores(cut), atol=1e-5, rtol=0)


def test_a_stream_that_was_not_asked_for_scores_is_refused():
    with pytest.raises(ValueError, match=r"not asked for. Stream with Wanted\(scores=True\)"):
        heads.scores(attention_stream(load(), "one two", wanted=Wanted(scores=False)))


def test_generated_text_is_scored_like_one_pass():
    tiny = load()
    run = generate(tiny, repeated_tokens(tiny, 2, length=8), max_new_tokens=4, at="layers.*.self_attn.pattern")
    once = record(tiny, Prompt(*_all_but_last(run)), at="layers.*.self_attn.pattern")
    assert np.allclose(heads.scores(run).iloc[:, 3:], heads.scores(once).iloc[:, 3:], atol=1e-4, equal_nan=True)


def _all_but_last(run: Run):
    prompt = run.prompt
    tokens, kinds = ([row[:-1] for row in rows] for rows in (prompt.tokens, prompt.modality))
    return prompt.input_ids[:, :-1], prompt.attention_mask[:, :-1], None, tokens, kinds
