# pandas declares what it gives as wide unions.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from dataclasses import replace

import accelerate
import numpy as np
import pytest
import torch

from llama4lab.model.loading import load
from llama4lab.prompt.prompt import Prompt
from llama4lab.run.generation import generate
from llama4lab.run.patching import patched
from llama4lab.run.recording import record
from llama4lab.tables.logit_attribution import contributions, needs

KINDS = {
    "top-1": {},
    "top-2": {"num_experts_per_tok": 2},
    "all experts": {"interleave_moe_layer_step": 1, "num_experts_per_tok": 2},
    "all dense": {"moe_layers": []},
    "biased": {"attention_bias": True, "num_experts_per_tok": 2},
}


@pytest.fixture(scope="module", params=KINDS)
def model(request, new_text_model):
    return new_text_model(**KINDS[request.param])


@pytest.fixture(scope="module")
def top_2(new_text_model):
    return new_text_model(**KINDS["biased"])


@pytest.fixture(scope="module")
def padded(top_2):
    """Two rows, the second behind two tokens of padding."""
    return record(top_2, [[5, 6, 7, 8, 9], [11, 12, 13]], at=[*needs(top_2), "layers.*.self_attn.head_out"])


def sums(table) -> np.ndarray:
    return table.groupby(["row", "position"])["contribution"].sum().to_numpy()


def along(model, run, token: int, row: int, position: int) -> torch.Tensor:
    """The direction of a token's logit, straight from the weights."""
    x = run["layers.4.resid_post"][row, position].double()
    scale = torch.rsqrt(x.pow(2).mean() + model.text.norm.eps)
    return (model.lm_head.weight[token] * model.text.norm.weight * scale).detach()


def test_the_parts_sum_to_the_logit_at_every_token(model):
    run = record(model, [[5, 6, 7, 8, 9, 3, 2, 8, 8, 1], [11, 12, 13]], at=needs(model))
    mask = run.prompt.attention_mask.bool()
    one = contributions(model, run, 17, position=None)
    assert np.allclose(sums(one), run.logits[mask][:, 17], atol=1e-4)
    two = contributions(model, run, [17, 3], [5, 99], position=None)
    logits = torch.cat([run.logits[0, :, 17] - run.logits[0, :, 5], run.logits[1, 7:, 3] - run.logits[1, 7:, 99]])
    assert np.allclose(sums(two), logits, atol=1e-4)
    assert two.groupby(["row", "position"])["share"].sum().to_numpy() == pytest.approx(1)
    assert "rounding" not in set(one["part"])


def test_every_part_of_every_layer_has_a_line(top_2, padded):
    table = contributions(top_2, padded, 17)
    assert table["position"].unique().tolist() == [4]
    own = table[table["row"] == 0]
    assert own["part"].tolist()[0] == "embed"
    assert own["layer"].isna().tolist() == [True] + [False] * (len(own) - 1)
    counts = own.groupby(["layer", "part"]).size().unstack(fill_value=0)
    assert counts["head"].tolist() == [4] * 5
    assert counts["bias"].tolist() == [1] * 5
    assert counts["mlp"].tolist() == [1, 0, 1, 0, 1]
    assert counts["shared_expert"].tolist() == [0, 1, 0, 1, 0]
    assert counts["expert"].tolist() == [0, 2, 0, 2, 0]
    for layer in (1, 3):
        chosen = own[(own["layer"] == layer) & (own["part"] == "expert")]["expert"].tolist()
        assert chosen == sorted(padded[f"layers.{layer}.feed_forward.router.indices"][0, 4].tolist())


def test_each_contribution_is_what_the_part_wrote_along_the_direction_of_the_token(top_2, padded):
    table = contributions(top_2, padded, 17, position=None)
    for line in table.sample(120, random_state=1).itertuples():
        ff = f"layers.{line.layer}.feed_forward"
        place = (line.row, line.position)
        if line.part == "embed":
            written = padded["embed_merged"][place]
        elif line.part == "head":
            written = padded[f"layers.{line.layer}.self_attn.head_out"][place][line.head]
        elif line.part == "bias":
            written = top_2.text.layers[line.layer].self_attn.o_proj.bias
        elif line.part == "expert":
            slots = padded[f"{ff}.router.indices"][place] == line.expert
            written = padded[f"{ff}.experts.out"][place][slots].sum(0)
        else:
            written = padded[f"{ff}.shared_expert.out" if line.part == "shared_expert" else f"{ff}.out"][place]
        expected = (written.double() * along(top_2, padded, 17, *place)).sum().item()
        assert line.contribution == pytest.approx(expected, abs=1e-5)


def test_two_slots_of_one_expert_are_one_line(top_2):
    indices = "layers.1.feed_forward.router.indices"
    with patched(top_2, {indices: 2}):
        run = record(top_2, [[5, 6, 7, 8]], at=needs(top_2))
    table = contributions(top_2, run, 17)
    own = table[(table["part"] == "expert") & (table["layer"] == 1)]
    assert own["expert"].tolist() == [2]
    written = run["layers.1.feed_forward.experts.out"][0, 3].sum(0).double()
    assert own["contribution"].item() == pytest.approx((written * along(top_2, run, 17, 0, 3)).sum().item(), abs=1e-5)
    assert np.allclose(sums(table), run.logits[0, 3, 17].item(), atol=1e-4)


def test_a_difference_is_the_difference_of_two_tables(top_2, padded):
    one, other, both = (contributions(top_2, padded, *tokens) for tokens in ((17,), (3,), (17, 3)))
    assert np.allclose(both["contribution"], one["contribution"] - other["contribution"], atol=1e-6)
    back = contributions(top_2, padded, 3, 17)
    assert np.allclose(both["contribution"], -back["contribution"], atol=1e-6)
    assert np.allclose(both["share"], back["share"], atol=1e-4)
    assert contributions(top_2, padded, 3, 3)["share"].isna().all()


def test_any_direction_can_be_split(top_2, padded):
    rows = top_2.lm_head.weight.detach()
    one = contributions(top_2, padded, rows[17])
    assert np.allclose(one["contribution"], contributions(top_2, padded, 17)["contribution"], atol=1e-6)
    each = contributions(top_2, padded, rows[[17, 3]], 9)
    assert np.allclose(each["contribution"], contributions(top_2, padded, [17, 3], 9)["contribution"], atol=1e-6)
    mean = contributions(top_2, padded, rows.mean(0), position=None)
    mask = padded.prompt.attention_mask.bool()
    assert np.allclose(sums(mean), padded.logits[mask].mean(-1), atol=1e-4)


def test_positions_count_in_the_prompt_and_in_cut_runs(top_2, padded):
    table = contributions(top_2, padded, 17, position=[1, -1])
    assert table.drop_duplicates(["row", "position"])[["row", "position"]].values.tolist() == [[0, 1], [0, 4], [1, 4]]
    cut = contributions(top_2, padded.cut(rows=1, positions=[2, 3]), 17)
    whole = contributions(top_2, padded, 17, position=3).query("row == 1")
    assert cut["position"].unique().tolist() == [3]
    assert np.allclose(cut["contribution"], whole["contribution"], atol=1e-6)


def test_image_tokens_are_embedded_by_their_features(new_model, image_batch):
    model = new_model(num_experts_per_tok=2)
    inputs = image_batch([[1, 1], [2]])
    rows = inputs["input_ids"].tolist()
    texts = [[str(token) for token in row] for row in rows]
    kinds = [["image" if token == 127 else "text" if token else "pad" for token in row] for row in rows]
    prompt = Prompt(inputs["input_ids"], inputs["attention_mask"], inputs["pixel_values"], texts, kinds)
    run = record(model, prompt, at=needs(model))
    table = contributions(model, run, 17, 3, position=None)
    logits = (run.logits[..., 17] - run.logits[..., 3])[inputs["attention_mask"].bool()]
    assert np.allclose(sums(table), logits, atol=1e-4)


def test_the_tiny_checkpoint_is_split_exactly():
    model = load()
    run = record(model, ["The capital of Indonesia is", "Mary and John went to the"], at=needs(model))
    table = contributions(model, run, " Jakarta", " Rabat", position=None)
    jakarta, rabat = (run.prompt.token_id(token) for token in (" Jakarta", " Rabat"))
    logits = (run.logits[..., jakarta] - run.logits[..., rabat])[run.prompt.attention_mask.bool()]
    assert np.allclose(sums(table), logits, atol=1e-4)
    assert table.attrs == {"measure": "logit difference", "of": " Jakarta", "minus": " Rabat"}
    each = contributions(model, run, [" Jakarta", " store"])
    assert each.attrs == {"measure": "logit", "of": None, "minus": None}


def test_the_size_of_a_chunk_changes_nothing(top_2, padded, monkeypatch):
    whole = contributions(top_2, padded, 17, position=None)
    monkeypatch.setattr("llama4lab.tables.logit_attribution.CHUNK_NBYTES", 1)
    assert np.allclose(
        contributions(top_2, padded, 17, position=None)["contribution"], whole["contribution"], atol=1e-6
    )


def test_an_offloaded_model_is_split_the_same(new_text_model, top_2, padded):
    away = new_text_model(**KINDS["biased"])
    accelerate.cpu_offload(away, execution_device=torch.device("cpu"))
    own = record(away, padded.prompt, at=needs(away))
    table = contributions(away, own, 17, position=None)
    assert np.allclose(
        table["contribution"], contributions(top_2, padded, 17, position=None)["contribution"], atol=1e-6
    )
    assert all(parameter.device.type == "meta" for parameter in away.parameters())


def test_in_half_precision_what_the_sums_lost_has_its_own_line(new_text_model):
    model = new_text_model(dtype=torch.bfloat16, num_experts_per_tok=2)
    run = record(model, [[5, 6, 7, 8]], at=needs(model))
    table = contributions(model, run, 17, position=None)
    x = run["layers.4.resid_post"][0].double()
    directions = torch.stack([along(model, run, 17, 0, position).double() for position in range(4)])
    assert np.allclose(sums(table), (x * directions).sum(-1).detach(), atol=0.02)
    lost = table[table["part"] == "rounding"]["contribution"]
    assert len(lost) == 4
    assert 0 < lost.abs().max() < 0.1 * table["contribution"].abs().max()


def test_generated_tokens_can_be_split(top_2):
    run = generate(top_2, [[5, 6, 7, 8]], max_new_tokens=3, at=needs(top_2))
    table = contributions(top_2, run, 17)
    place = table["position"].iloc[0]
    assert place == run.positions[-1]
    assert np.allclose(sums(table), run.logits[0, run.logit_positions.index(place), 17], atol=1e-4)


def test_a_run_that_does_not_add_up_is_refused(top_2, padded):
    with patched(top_2, {"layers.2.resid_post": lambda x: 2 * x}):
        steered = record(top_2, padded.prompt, at=needs(top_2))
    with pytest.raises(ValueError, match="At row 0, position 4 the parts sum to"):
        contributions(top_2, steered, 17)


def test_a_run_patched_inside_a_part_adds_up(top_2, padded):
    with patched(top_2, {"layers.2.self_attn.z": 0.0, "layers.3.feed_forward.experts.out": lambda x: 3 * x}):
        run = record(top_2, padded.prompt, at=needs(top_2))
    table = contributions(top_2, run, 17, position=None)
    assert np.allclose(sums(table), run.logits[padded.prompt.attention_mask.bool()][:, 17], atol=1e-4)
    assert (table[(table["layer"] == 2) & (table["part"] == "head")]["contribution"] == 0).all()


def test_what_cannot_be_split_is_refused(top_2, padded):
    with pytest.raises(KeyError, match=r"at=lab.tables.logit_attribution.needs\(model\)"):
        contributions(top_2, record(top_2, padded.prompt, at="layers.*.self_attn.z"), 17)
    with pytest.raises(IndexError, match="0 to 127"):
        contributions(top_2, padded, 128)
    with pytest.raises(IndexError, match="tokens at positions 0 to 4"):
        contributions(top_2, padded, 17, position=5)
    with pytest.raises(IndexError, match="Position 0 was asked for"):
        contributions(top_2, padded.cut(rows=1), 17, position=0)
    with pytest.raises(IndexError, match="No position"):
        contributions(top_2, padded, 17, position=[])
    with pytest.raises(ValueError, match=r"shape \[3\]; a direction is \[64\], or \[2, 64\]"):
        contributions(top_2, padded, torch.zeros(3))
    with pytest.raises(ValueError, match="3 tokens were given for the 2 rows"):
        contributions(top_2, padded, [1, 2, 3])
    with pytest.raises(ValueError, match="no tokenizer"):
        contributions(top_2, replace(padded), " Paris")
