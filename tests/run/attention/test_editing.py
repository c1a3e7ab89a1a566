"""An edited model is a model of another config; and what was edited is restored."""

import pytest
import torch

import llama4lab as lab
from llama4lab.model.attention import SelfAttention
from llama4lab.model.facts import facts
from llama4lab.run.attention.editing import edited
from llama4lab.tables.attention import chunks

LENGTH = 29
CONTROLS = ("rope", "qk_norm", "tuning", "chunk_size", "rotate", "barred")


def state(model) -> list:
    return [[getattr(layer.self_attn, name) for name in CONTROLS] for layer in model.text.layers] + [model.text.edits]


@pytest.fixture(scope="module")
def padded(random_ids) -> dict[str, torch.Tensor]:
    """Two rows of 29 and of 24 tokens, padding on the left."""
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :5] = 0
    return {"input_ids": random_ids(2, LENGTH) * mask, "attention_mask": mask}


@torch.no_grad()
def logits(model, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits of the tokens."""
    return model(**inputs, use_cache=False).logits[inputs["attention_mask"].bool()]


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(found, expected, atol=1e-5, rtol=1e-4)


NOPE_TO_ROPE = {"rope": True, "qk_norm": True, "temperature": False}
LIKE = [
    ({"chunk": 64}, None, {"attention_chunk_size": None}),
    ({"chunk": None}, None, {"attention_chunk_size": None}),
    ({"chunk": 5}, None, {"attention_chunk_size": 5}),
    ({"temperature": False}, None, {"attn_temperature_tuning": False}),
    ({"temperature": 1}, None, {"attn_temperature_tuning": False}),
    ({"qk_norm": False}, None, {"use_qk_norm": False}),
    ({"rope": {"rope_theta": 100.0}}, None, {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}),
    (
        {"rope": {"rope_type": "linear", "factor": 4.0}},
        None,
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500000.0}},
    ),
    (
        {"rope": False, "qk_norm": False, "chunk": None, "temperature": True},
        1,
        {"no_rope_layers": [1, 0, 1, 0], "layer_types": None},
    ),
    ({**NOPE_TO_ROPE, "bar": "earlier"}, 3, {"no_rope_layers": [1, 1, 1, 1], "layer_types": None}),
]


@pytest.mark.parametrize(("changes", "layers", "config"), LIKE, ids=lambda value: str(value)[:30])
def test_an_edited_model_is_a_model_of_another_config(small, new_text_model, padded, changes, layers, config):
    other = new_text_model(**{"num_experts_per_tok": 2, "num_hidden_layers": 4, **config})
    other.load_state_dict(small.state_dict())
    plain = logits(small, padded)
    with edited(small, layers=layers, **changes):
        found = logits(small, padded)
    assert same(found, logits(other, padded))
    assert not same(found, plain)
    assert torch.equal(logits(small, padded), plain)


@pytest.mark.parametrize("changes", [{"chunk": 8}, {"temperature": True}, {"rope": {"rope_theta": 500000.0}}], ids=str)
def test_what_changes_nothing_is_bit_identical(small, padded, changes):
    plain = logits(small, padded)
    with edited(small, **changes):
        assert torch.equal(logits(small, padded), plain)


def test_a_function_of_positions_gives_the_temperature(small, padded):
    plain = logits(small, padded)
    attention: SelfAttention = small.text.layers[3].self_attn
    with edited(small, temperature=lambda positions: attention.config.attn_scale * 0 + 1.0 + 0 * positions.float()):
        constant = logits(small, padded)
    with edited(small, temperature=lambda at: torch.floor((at + 1.0) / 8).log1p() * attention.config.attn_scale + 1):
        assert same(logits(small, padded), plain)
    with edited(small, temperature=False):
        assert same(constant, logits(small, padded))


@pytest.mark.parametrize("kernel", ["auto", "sdpa", "eager"])
@pytest.mark.parametrize("bar", ["first_token", 6, [0, 7, 20], ["first_token", 9]], ids=str)
def test_barred_keys_are_those_of_a_mask_by_hand(small, padded, bar, kernel):
    hidden = torch.zeros(2, LENGTH, dtype=torch.bool)
    for key in [bar] if isinstance(bar, int | str) else bar:
        if isinstance(key, int):
            hidden[:, key] = True
        else:
            hidden[0, 0] = hidden[1, 5] = True
    visible = ~hidden[:, None] | torch.eye(LENGTH, dtype=torch.bool)
    visible &= padded["attention_mask"].bool()[:, None]

    def narrowed(scores: torch.Tensor) -> torch.Tensor:
        own = visible | ~padded["attention_mask"].bool()[:, :, None]
        return scores.masked_fill(~own[:, None], -torch.inf)

    with lab.patched(small, {"layers.3.self_attn.scores": narrowed}):
        expected = logits(small, padded)
    small.attn = kernel
    try:
        with edited(small, bar=bar):
            found = logits(small, padded)
            pattern = lab.record(small, padded["input_ids"][0], at="layers.3.self_attn.pattern")
    finally:
        small.attn = "auto"
    assert same(found, expected)
    seen = pattern["layers.3.self_attn.pattern"][0, :, :, hidden[0]]
    assert (seen > 0).sum() == 4 * hidden[0].sum()


def test_a_layer_barred_from_earlier_chunks_has_the_mask_of_its_chunks(small, padded):
    place = padded["attention_mask"].cumsum(1) - 1
    valid = padded["attention_mask"].bool()
    outside = (place[:, :, None] // 8 != place[:, None] // 8) & valid[:, :, None]
    hide = {"layers.3.self_attn.scores": lambda scores: scores.masked_fill(outside[:, None], -torch.inf)}
    with lab.patched(small, hide):
        expected = logits(small, padded)
    with edited(small, bar="earlier"):
        assert same(logits(small, padded), expected)


@pytest.mark.parametrize("changes", [{"chunk": 16}, {"chunk": None}, {"bar": "earlier"}, {"bar": [0, 9]}], ids=str)
def test_generation_goes_on_as_whole_passes_do(small, random_ids, changes):
    with edited(small, **changes):
        run = lab.generate(small, random_ids(13), max_new_tokens=8, at="layers.*.resid_post")
        whole = lab.record(small, run.prompt.input_ids[:, :-1], at="layers.*.resid_post")
    for name in whole:
        assert torch.allclose(run[name], whole[name], atol=1e-4)


@pytest.mark.parametrize("changes", [{"chunk": 16}, {"chunk": 4}, {"temperature": False}, {"bar": 3}], ids=str)
def test_a_cache_goes_on_only_under_its_own_edits(small, random_ids, changes):
    ids = random_ids(1, 20)
    with torch.no_grad():
        cache = small(ids).past_key_values
        with edited(small, **changes):
            with pytest.raises(ValueError, match="without edits of attention; this pass runs with"):
                small(ids[:, :1], cache=cache)
            other = small(ids).past_key_values
            small(ids[:, :1], cache=other)
        with pytest.raises(ValueError, match="edited; this pass runs without"):
            small(ids[:, :1], cache=other)
        small(ids[:, :1], cache=cache)


def test_a_cache_of_small_chunks_is_refused_by_a_layer_that_sees_more(small, random_ids):
    ids = random_ids(1, 20)
    attention = small.text.layers[0].self_attn
    with torch.no_grad():
        cache = small(ids).past_key_values
        attention.chunk_size = 32  # by hand, past `edited`
        try:
            with pytest.raises(ValueError, match="keeps 7 earlier tokens of a layer that sees 20"):
                small(ids[:, :1], cache=cache)
        finally:
            attention.chunk_size = 8


@pytest.mark.parametrize(
    "changes", [{"chunk": 5}, {"bar": "earlier"}, {"bar": [1, 4]}, {"bar": "first_token"}, {"rope": False}], ids=str
)
def test_sweeps_agree_with_single_runs(small, random_ids, changes):
    """A hook of anybody sends every cell through a run of its own."""
    clean, corrupted = random_ids(2, 11), random_ids(2, 11, seed=1)
    cells = {"layer": [0, 3], "position": [1, 4, 7, 8]}
    asked = {"at": "layers.*.self_attn.z", "over": cells, "metric": lab.metrics.log_prob([3, 4])}
    with edited(small, **changes):
        together = lab.sweep(small, clean, corrupted, **asked, progress=False)
        handle = small.register_forward_hook(lambda *_: None)
        try:
            singly = lab.sweep(small, clean, corrupted, **asked, progress=False)
        finally:
            handle.remove()
    plain = lab.sweep(small, clean, corrupted, **asked, progress=False)
    assert torch.allclose(together.patched, singly.patched, atol=1e-4)
    assert not torch.allclose(together.patched, plain.patched, atol=1e-4)


def test_the_facts_of_a_run_are_those_of_the_edited_layers(small, random_ids):
    ids = random_ids(20)
    with edited(small, layers=[0, 1], chunk=4), edited(small, layers=2, rope=False), edited(small, bar="earlier"):
        run = lab.record(small, ids)
        made = lab.generate(small, ids, max_new_tokens=1)
    assert run.meta["chunk_sizes"] == made.meta["chunk_sizes"] == [4, 4, 8, 4]
    assert run.meta["chunk_size"] == 4
    assert run.meta["rope_layers"] == [0, 1]
    assert run.meta["chunked_layers"] == [0, 1, 2, 3]
    assert chunks(run).groupby("layer").size().tolist() == [5, 5, 3, 5]
    assert lab.record(small, ids).meta == facts(small.config)


@pytest.mark.parametrize("problem", [KeyboardInterrupt, RuntimeError, None])
def test_all_is_restored_however_a_block_ends(small, problem):
    before = state(small)
    try:
        with edited(small, chunk=4, temperature=2.0, rope={"rope_theta": 10.0}), edited(small, layers=3, bar=[0]):
            with edited(small, layers=3, bar="first_token", qk_norm=True):
                assert small.text.layers[3].self_attn.barred == {0, "first_token"}
                assert state(small) != before
            if problem:
                raise problem
    except (KeyboardInterrupt, RuntimeError):
        pass
    assert state(small) == before


WRONG = [
    ({}, ValueError, "No change"),
    ({"chunks": 3}, TypeError, "takes temperature, chunk"),
    ({"chunk": 0}, ValueError, "from 1 on"),
    ({"chunk": True}, ValueError, "from 1 on"),
    ({"chunk": 4, "layers": 9}, IndexError, "layers 0 to 3"),
    ({"chunk": 4, "layers": []}, ValueError, "empty"),
    ({"bar": "earlier", "layers": [0]}, ValueError, "sees no earlier chunk"),
    ({"bar": "later"}, ValueError, '"first_token"'),
    ({"bar": -1}, ValueError, "count from 0"),
    ({"bar": []}, ValueError, "empty"),
    ({"bar": "earlier", "chunk": 4, "layers": 3}, ValueError, "both say"),
    ({"temperature": -1.0}, ValueError, "from 0 on"),
    ({"temperature": float("nan")}, ValueError, "finite"),
    ({"temperature": "high"}, TypeError, "a factor or a function"),
    ({"rope": 3}, TypeError, "rope_parameters"),
    ({"rope": {"factor": 8.0}}, ValueError, "means nothing for rope_type 'default'"),
    ({"rope": {"rope_type": "llama3", "factor": 8.0}}, ValueError, "needs"),
    ({"rope": {"rope_type": "dynamic", "factor": 8.0}}, ValueError, "supported are"),
    ({"rope": {"rope_theta": 10.0}, "layers": 3}, ValueError, "has no RoPE"),
    ({"qk_norm": 1}, TypeError, "True or False"),
]


@pytest.mark.parametrize(("changes", "kind", "message"), WRONG, ids=lambda value: str(value)[:30])
def test_wrong_changes_are_refused_and_change_nothing(small, changes, kind, message):
    before = state(small)
    with pytest.raises(kind, match=message), edited(small, **changes):
        pass
    assert state(small) == before
