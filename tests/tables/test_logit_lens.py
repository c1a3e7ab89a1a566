# pandas declares what it gives as wide unions.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

import accelerate
import numpy as np
import pytest
import torch

from llama4lab.model.loading import load
from llama4lab.run.generation import generate
from llama4lab.run.patching import patched
from llama4lab.run.recording import record
from llama4lab.run.tuned_lens import TunedLens
from llama4lab.tables import logits as final
from llama4lab.tables.logit_lens import RESIDUAL, top_tokens, trajectories

FACT = "The capital of Indonesia is"


@pytest.fixture(scope="module")
def model(new_text_model):
    return new_text_model(num_experts_per_tok=2)


@pytest.fixture(scope="module")
def padded(model):
    """Two rows, the second behind two tokens of padding."""
    return record(model, model.prompt([[5, 6, 7, 8, 9], [11, 12, 13]]), at=RESIDUAL)


@pytest.fixture(scope="module")
def tiny():
    return load()


@pytest.fixture(scope="module")
def fact(tiny):
    return record(tiny, FACT, at=RESIDUAL)


@torch.no_grad()
def read(model, run, name) -> torch.Tensor:
    """The log probabilities at a hook point, straight from the weights."""
    x = run[name]
    if name != "final_norm":
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + model.text.norm.eps)
        x = x * scale * model.text.norm.weight
    return (x @ model.get_output_embeddings().weight.T).log_softmax(-1)


def test_every_place_and_token_is_read_as_if_the_model_ended_there(model, padded):
    table = top_tokens(model, padded, k=3)
    assert len(table) == 3 * (5 + 3) * (3 + 3 * 5)
    assert (table["position"] >= 2)[table["row"] == 1].all()  # padding is left out
    for (name, row, position), own in table.groupby(["hook_point", "row", "position"]):
        log_prob = read(model, padded, name)[row, position]
        best = log_prob.topk(3)
        assert own["rank"].tolist() == [0, 1, 2]
        assert own["token_id"].tolist() == best.indices.tolist()
        assert np.allclose(own["log_prob"], best.values, atol=1e-4)
        assert np.allclose(own["prob"], best.values.exp(), atol=1e-5)
        assert np.allclose(own["entropy"], -(log_prob.exp() * log_prob).sum(), atol=1e-4)
        target = padded.logits[row, position].log_softmax(-1)
        assert np.allclose(own["kl"], (target.exp() * (target - log_prob)).sum(), atol=1e-4)


def test_lines_come_row_by_row_in_the_order_of_the_forward_pass(model, padded):
    table = top_tokens(model, padded)
    assert table[["row", "depth", "position"]].values.tolist() == sorted(
        table[["row", "depth", "position"]].values.tolist()
    )
    places = table.drop_duplicates("hook_point")
    assert places["hook_point"].tolist()[:4] == ["embed", "embed_merged", "layers.0.resid_pre", "layers.0.resid_mid"]
    assert places["kind"].tolist()[-2:] == ["resid_post", "final_norm"]
    assert places["layer"].isna().tolist() == [True, True, *[False] * 15, True]
    assert set(table["lens"]) == {"logit"}
    assert table["input"].tolist()[:5] == padded.prompt.tokens[0]


def test_at_the_end_the_lens_is_the_model(tiny, fact):
    own = top_tokens(tiny, fact, k=5).query("position == 5")
    true = final.top_tokens(fact, k=5)
    for name in ("layers.7.resid_post", "final_norm"):
        end = own[own["hook_point"] == name]
        assert end["token"].tolist() == true["token"].tolist()
        assert np.allclose(end[["logit", "log_prob", "prob"]], true[["logit", "log_prob", "prob"]], atol=1e-4)
        assert end["kl"].max() < 1e-6


def test_chosen_tokens_have_their_logit_probability_and_rank(model, padded):
    chosen = [17, 3]
    table = trajectories(model, padded, chosen)
    assert table["token_id"].tolist() == chosen * (len(table) // 2)
    for line in table.sample(40, random_state=0).itertuples():
        log_prob = read(model, padded, line.hook_point)[line.row, line.position]
        assert line.log_prob == pytest.approx(log_prob[line.token_id].item(), abs=1e-4)
        assert line.prob == pytest.approx(log_prob[line.token_id].exp().item(), abs=1e-5)
        assert line.rank == (log_prob > log_prob[line.token_id]).sum()
    ends = table.query("hook_point == 'layers.4.resid_post'")
    true = [padded.logits[line.row, line.position, line.token_id].item() for line in ends.itertuples()]
    assert np.allclose(ends["logit"], true, atol=1e-5)


def test_the_best_token_has_rank_0(tiny, fact):
    best = top_tokens(tiny, fact, at="layers.5.resid_mid").query("position == 5")
    way = trajectories(tiny, fact, best["token"].item(), at="layers.5.resid_mid").query("position == 5")
    assert way["rank"].item() == 0
    assert way["log_prob"].item() == pytest.approx(best["log_prob"].item())


def test_the_answer_to_a_fact_is_readable_in_the_middle_of_the_model(tiny, fact):
    ranks = trajectories(tiny, fact, " Jakarta", at="layers.*.resid_post").query("position == 5")["rank"].tolist()
    assert min(ranks[:4]) > 3
    assert ranks[4:] == [0] * 4


@pytest.mark.parametrize("nbytes", [1, 4 * 128 * 5])
def test_the_size_of_a_chunk_changes_nothing(model, padded, monkeypatch, nbytes):
    whole = top_tokens(model, padded, k=2), trajectories(model, padded, [4, 5])
    monkeypatch.setattr("llama4lab.run.unembedding.CHUNK_NBYTES", nbytes)
    parts = top_tokens(model, padded, k=2), trajectories(model, padded, [4, 5])
    for one, other in zip(whole, parts, strict=True):
        words = one.select_dtypes(exclude="number").columns
        assert one[words].equals(other[words])
        numbers = [column for column in one if column not in {*words, "layer"}]
        assert np.allclose(one[numbers], other[numbers], atol=1e-5)


def test_logits_of_all_layers_are_never_in_memory_at_once(model, padded, monkeypatch):
    monkeypatch.setattr("llama4lab.run.unembedding.CHUNK_NBYTES", 4 * 128 * 5)
    sizes = []
    handle = model.lm_head.register_forward_hook(lambda _, inputs, output: sizes.append(output.shape[0]))
    top_tokens(model, padded)
    handle.remove()
    assert max(sizes) == 5
    assert sum(sizes) == (5 + 3) * 18


def test_a_cut_run_is_read_where_it_was_cut(model, padded):
    own = top_tokens(model, padded.cut(rows=1, positions=[-1, 3]), at="layers.2.resid_mid")
    whole = top_tokens(model, padded, at="layers.2.resid_mid")
    expected = whole.query("row == 1 and position >= 3").reset_index(drop=True)
    assert own["position"].tolist() == [3, 4]
    assert own["token_id"].tolist() == expected["token_id"].tolist()
    assert np.allclose(own[["prob", "kl"]], expected[["prob", "kl"]], atol=1e-5)


def test_image_tokens_are_read_where_their_features_are(new_model, image_batch):
    model = new_model()
    inputs = image_batch([[1], [2]])
    with torch.no_grad():
        seen = {}
        handle = (
            model.hook_points()
            .module("layers.1.resid_post")
            .register_forward_hook(lambda _, __, output: seen.update(x=output))
        )
        logits = model(**inputs).logits
        handle.remove()
    prompt = model.prompt([[1], [2]])
    prompt = type(prompt)(
        inputs["input_ids"], inputs["attention_mask"], inputs["pixel_values"],
        [[str(token) for token in row] for row in inputs["input_ids"].tolist()],
        [["text" if token else "pad" for token in row] for row in inputs["input_ids"].tolist()],
    )  # fmt: skip
    run = record(model, prompt, at=["embed", "embed_merged", "layers.1.resid_post", "layers.4.resid_post"])
    table = top_tokens(model, run)
    assert torch.equal(run["layers.1.resid_post"], seen["x"])
    end = table.query("hook_point == 'layers.4.resid_post'")
    assert end["token_id"].tolist() == logits[inputs["attention_mask"].bool()].argmax(-1).tolist()
    embed, merged = (table[table["hook_point"] == name]["logit"] for name in ("embed", "embed_merged"))
    is_image = [int(token) == 127 for token in table[table["hook_point"] == "embed"]["input"]]
    assert (~np.isclose(embed, merged)).tolist() == is_image


def test_a_patched_run_is_read_as_it_ran(model, padded):
    with patched(model, {"layers.2.resid_post": 1.0}):
        run = record(model, padded.prompt, at="layers.*.resid_post")
    table = top_tokens(model, run, at="layers.2.resid_post")
    assert table["token_id"].nunique() == 1


def test_where_the_run_has_no_logits_there_is_no_divergence(model):
    run = generate(model, [[5, 6, 7, 8]], max_new_tokens=2, at="layers.*.resid_post")
    table = top_tokens(model, run, at="layers.4.resid_post")
    assert table["kl"].isna().tolist() == [position not in run.logit_positions for position in table["position"]]
    assert table["kl"].max() < 1e-6


def test_a_tuned_lens_is_read_by_the_same_tables(tiny, fact):
    places = ["layers.0.resid_post", "layers.3.resid_mid"]
    shift = torch.randn(128, generator=torch.Generator().manual_seed(0))
    lens = TunedLens({place: 0.1 * torch.eye(128) for place in places}, dict.fromkeys(places, shift), {"num_layers": 8})
    table = top_tokens(tiny, fact, at=[*places, "layers.7.resid_post"], lens=lens)
    assert set(table["lens"]) == {"tuned"}
    with torch.no_grad():
        x = 1.1 * fact["layers.3.resid_mid"][0] + shift
        expected = tiny.get_output_embeddings()(tiny.text.norm(x)).argmax(-1)
    assert table[table["hook_point"] == "layers.3.resid_mid"]["token_id"].tolist() == expected.tolist()
    assert table[table["hook_point"] == "layers.7.resid_post"]["kl"].max() < 1e-6
    way = trajectories(tiny, fact, " Jakarta", at=places, lens=lens)
    assert (way["rank"] == 0).sum() == (table[table["hook_point"].isin(places)]["token"] == " Jakarta").sum()
    with pytest.raises(KeyError, match="not fitted at 'embed_merged'"):
        top_tokens(tiny, fact, at="embed_merged", lens=lens)


def test_offloaded_and_half_precision_models_are_read(new_text_model, padded):
    away = new_text_model(num_experts_per_tok=2)
    accelerate.cpu_offload(away, execution_device=torch.device("cpu"))
    assert top_tokens(away, padded).equals(top_tokens(new_text_model(num_experts_per_tok=2), padded))
    half = new_text_model(dtype=torch.bfloat16)
    run = record(half, [[5, 6, 7]], at="layers.*.resid_post")
    end = top_tokens(half, run, at="layers.4.resid_post")
    assert end["token_id"].tolist() == run.logits[0].argmax(-1).tolist()
    assert end["kl"].max() < 1e-4


def test_a_run_with_gradients_can_be_read(model):
    run = record(model, [[5, 6, 7]], at="layers.*.resid_post", grad=True)
    assert len(top_tokens(model, run)) == 15


def test_what_cannot_be_read_is_refused(model, padded, tiny, fact):
    with pytest.raises(ValueError, match="k=0"):
        top_tokens(model, padded, k=0)
    with pytest.raises(KeyError, match="no hook point of the residual stream"):
        top_tokens(model, record(model, [[5, 6]]))
    with pytest.raises(ValueError, match="no tokenizer"):
        trajectories(model, padded, " Paris")
    with pytest.raises(IndexError, match="0 to 127"):
        trajectories(model, padded, [3, 128])
    with pytest.raises(IndexError, match="no tokens"):
        trajectories(model, padded, [])
    with pytest.raises(ValueError, match="single token"):
        trajectories(tiny, fact, " Paris Rome")
