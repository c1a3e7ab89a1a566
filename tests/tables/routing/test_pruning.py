# pandas declares what it gives as wide unions.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportIndexIssue=false

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import llama4lab as lab
from llama4lab.run.metrics import evaluated
from llama4lab.tables.routing.pruning import importance, rank_correlation

TOLERANCE = 2e-5
LOSS = lab.metrics.loss()
EFFECTS = ["zero", "mean", "runner_up", "shared_only"]
NAME = "layers.{}.feed_forward."


@pytest.fixture(scope="module", params=[1, 2])
def model(request, new_text_model):
    """One or two experts a token, dense layers between."""
    return new_text_model(num_experts_per_tok=request.param, num_hidden_layers=4)


@pytest.fixture(scope="module")
def prompts(model, random_ids):
    """A batch of two rows of different length, and another one."""
    ids = random_ids(3, 11)
    return [model.prompt([ids[0].tolist(), ids[1, 4:].tolist()]), model.prompt([ids[2, 2:].tolist()])]


@pytest.fixture(scope="module")
def table(model, prompts):
    return importance(model, prompts)


@torch.no_grad()
def plain_write(layer, x, expert, gate):
    """An expert by its definition."""
    experts = layer.feed_forward.experts
    first, second = (gate * x @ experts.gate_up_proj[expert].double()).chunk(2)
    return torch.nn.functional.silu(first) * second @ experts.down_proj[expert].double()


@torch.no_grad()
def served(model, prompts, layer):
    """For every expert of a layer what it reads, with which gate, at all tokens that it serves."""
    found = {expert: [] for expert in range(4)}
    for prompt in prompts:
        run = lab.record(model, prompt, at=[NAME.format(layer) + "router.*", f"layers.{layer}.resid_mid"])
        x = model.text.layers[layer].post_attention_layernorm(run[f"layers.{layer}.resid_mid"]).double()
        for row, position in prompt.attention_mask.nonzero().tolist():
            logits = run[NAME.format(layer) + "router.logits"][row, position].double()
            for expert in logits.topk(model.text.config.num_experts_per_tok).indices.tolist():
                found[expert].append((x[row, position], float(logits[expert].sigmoid())))
    return found


def change(model, prompts, layer, expert, ablation, means):
    """The change of the loss by ordinary patches of single runs: a sum over rows."""
    name, total = NAME.format(layer), 0.0
    for prompt in prompts:
        run = lab.record(model, prompt, at=[name + "router.*"])
        chosen, real = run[name + "router.indices"], prompt.attention_mask.bool()[..., None]
        mine = (chosen == expert) & real
        order = run[name + "router.logits"].argsort(-1, descending=True)
        next_best = order[..., [chosen.shape[-1]]]
        hit = {"shared_only": mine.any(-1, keepdim=True)}.get(ablation, mine)[..., None]
        new = means[expert] if ablation == "mean" else torch.zeros(())
        patch = {name + "experts.out": lambda x, hit=hit, new=new: torch.where(hit, new.to(x.dtype), x)}
        if ablation == "runner_up":
            patch = {name + "router.indices": lambda x, mine=mine, other=next_best: torch.where(mine, other, x)}
        with lab.patched(model, patch):
            now = evaluated(LOSS, lab.record(model, prompt))
        total += float((now - evaluated(LOSS, run)).sum())
    return total


@pytest.mark.parametrize("ablation", EFFECTS)
def test_effects_equal_those_of_single_runs(model, prompts, table, ablation):
    for layer in (1, 3):
        of_expert = served(model, prompts, layer)
        means = {}
        for expert, tokens in of_expert.items():
            writes = [plain_write(model.text.layers[layer], x, expert, gate) for x, gate in tokens]
            means[expert] = torch.stack(writes).mean(0) if writes else torch.zeros(64)
        for expert in range(layer % 2, 4, 2):
            line = table[(table["layer"] == layer) & (table["expert"] == expert)].iloc[0]
            truth = change(model, prompts, layer, expert, ablation, means) / 3
            assert line[ablation] == pytest.approx(truth, abs=TOLERANCE)
    assert table[ablation].abs().max() > 1e-3


def test_scores_are_those_of_their_formulas(model, prompts, table):
    total = sum(int(prompt.attention_mask.sum()) for prompt in prompts)
    for layer in (1, 3):
        for expert, tokens in served(model, prompts, layer).items():
            line = table[(table["layer"] == layer) & (table["expert"] == expert)].iloc[0]
            block = model.text.layers[layer]
            gated = [float(plain_write(block, x, expert, gate).norm()) for x, gate in tokens]
            plain = [float(plain_write(block, x, expert, 1.0).norm()) for x, _ in tokens]
            assert line["tokens"] == len(tokens)
            assert line["frequency"] == pytest.approx(len(tokens) / total)
            assert line["ean_sum"] == pytest.approx(sum(plain), rel=1e-4)
            if tokens:
                assert line["reap"] == pytest.approx(np.mean(gated), rel=1e-4)
                assert line["ean_mean"] == pytest.approx(np.mean(plain), rel=1e-4)
                # The trap: as a factor on the output, the gate would give another score.
                trap = np.mean([gate * size for (_, gate), size in zip(tokens, plain, strict=True)])
                assert abs(line["reap"] / trap - 1) > 0.05
            else:
                assert np.isnan(line["reap"])
    top_k = model.text.config.num_experts_per_tok
    assert np.allclose(table.groupby("layer")["frequency"].sum(), top_k)


def test_the_table_says_what_it_is(model, prompts, table):
    assert list(table) == ["layer", "expert", "tokens", "frequency", *EFFECTS, "reap", "ean_sum", "ean_mean"]
    assert table[["layer", "expert"]].to_numpy().tolist() == [[layer, e] for layer in (1, 3) for e in range(4)]
    base = np.concatenate([evaluated(LOSS, lab.record(model, prompt)).numpy() for prompt in prompts])
    assert table.attrs["base"] == pytest.approx(base.mean(), abs=1e-5)
    assert table.attrs["rows"] == 3
    assert table.attrs["lower_is_better"] is True
    assert (table.loc[table["tokens"] == 0, EFFECTS] == 0).all().all()
    alone = model.text.config.num_experts_per_tok == 1
    assert np.allclose(table["zero"], table["shared_only"], atol=1e-6) == alone


def test_chosen_ablations_layers_and_metrics(model, prompts, table):
    some = importance(model, prompts, layers=3, ablations=["shared_only", "zero"])
    assert list(some)[4:6] == ["shared_only", "zero"]
    for column in ("zero", "shared_only", "reap"):
        own = table.loc[table["layer"] == 3, column]
        assert np.allclose(some[column], own, atol=1e-6, equal_nan=True)
    scores = importance(model, prompts, ablations=[])
    assert np.allclose(scores["ean_sum"], table["ean_sum"])
    other = importance(model, prompts[0], ablations=["zero"], metric=lab.metrics.log_prob([7, 8]))
    assert other.attrs["lower_is_better"] is False
    assert other["zero"].abs().max() > 1e-3


def test_whatever_makes_a_prompt_is_taken(model):
    ids = [[5, 6, 7, 8, 9], [9, 8, 7]]
    whole = importance(model, model.prompt(ids), ablations=["zero"])
    assert importance(model, ids, ablations=["zero"]).equals(whole)
    with pytest.raises(ValueError, match="empty list"):
        importance(model, [])


def test_images_and_the_packaged_checkpoint():
    tiny = lab.load()
    pixels = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    prompt = tiny.prompt("<|image|> What is it?", images=[Image.fromarray(pixels)])
    table = importance(tiny, prompt, layers=[7], ablations=["zero"])
    assert table["tokens"].sum() == int(prompt.attention_mask.sum())
    expert = int(table.loc[table["tokens"].idxmax(), "expert"])
    run = lab.record(tiny, prompt, at="layers.7.feed_forward.router.indices")
    mine = (run["layers.7.feed_forward.router.indices"] == expert)[..., None]
    with lab.patched(tiny, {"layers.7.feed_forward.experts.out": lambda x: torch.where(mine, 0, x)}):
        now = evaluated(LOSS, lab.record(tiny, prompt))
    assert table.loc[expert, "zero"] == pytest.approx(float(now - evaluated(LOSS, run)), abs=TOLERANCE)


def test_what_cannot_be_asked_is_refused(model, prompts, new_text_model):
    with pytest.raises(ValueError, match=r"'delete'.*zero, mean"):
        importance(model, prompts, ablations=["delete"])
    with pytest.raises(ValueError, match="layer 2, which is dense"):
        importance(model, prompts, layers=2)
    everything = new_text_model(num_experts_per_tok=4, num_hidden_layers=2)
    with pytest.raises(ValueError, match="no runner-up"):
        importance(everything, [[5, 6, 7]])
    assert importance(everything, [[5, 6, 7]], ablations=["zero"])["tokens"].eq(3).all()


def measures(**columns) -> pd.DataFrame:
    count = len(columns["zero"])
    rest = {name: np.arange(count) + 1.0 for name in ("reap", "ean_sum", "ean_mean", "frequency")}
    return pd.DataFrame({"layer": 0, "expert": np.arange(count), "tokens": 1, **rest, **columns})


def test_rank_correlation_is_spearmans_formula():
    """Without ties it is 1 - 6 sum d^2 / (n (n^2 - 1))."""
    drawn = np.random.default_rng(0)
    zero, reap = drawn.permutation(9) + 1.0, np.exp(drawn.permutation(9))
    found = rank_correlation(measures(zero=zero, reap=reap))
    ranks = np.argsort(np.argsort(zero)), np.argsort(np.argsort(reap))
    assert found.loc["zero", "reap"] == pytest.approx(1 - 6 * ((ranks[0] - ranks[1]) ** 2).sum() / (9 * 80))
    assert np.allclose(np.diag(found), 1)
    assert np.allclose(found, found.T)
    assert list(found) == ["zero", "frequency", "reap", "ean_sum", "ean_mean"]


def test_effects_count_by_size_unless_their_sign_is_asked_for():
    table = measures(zero=[-3.0, -2.0, 1.0], reap=[3.0, 2.0, 1.0])
    assert rank_correlation(table).loc["zero", "reap"] == pytest.approx(1)
    assert rank_correlation(table, signed=True).loc["zero", "reap"] == pytest.approx(-1)


def test_ranks_within_layers_do_not_see_which_layer_is_larger():
    table = measures(zero=[1.0, 2.0, 11.0, 12.0], reap=[2.0, 1.0, 12.0, 11.0], layer=[0, 0, 1, 1])
    assert rank_correlation(table).loc["zero", "reap"] > 0
    assert rank_correlation(table, within_layers=True).loc["zero", "reap"] == pytest.approx(-1)


def test_experts_without_tokens_are_left_out_of_the_correlation():
    table = measures(zero=[1.0, 2.0, 3.0, 0.0], reap=[1.0, 2.0, 3.0, np.nan], tokens=[1, 1, 1, 0])
    assert rank_correlation(table).loc["zero", "reap"] == pytest.approx(1)
    with pytest.raises(ValueError, match="1 experts"):
        rank_correlation(table.iloc[2:])


def test_a_measure_without_differences_has_no_correlation():
    found = rank_correlation(measures(zero=[1.0, 1.0, 1.0]))
    assert found.loc["zero"].isna().all()


@pytest.mark.parametrize("top_k", [1, 2])
def test_planted_experts_have_known_scores_and_effects(new_text_model, top_k):
    """One layer without attention; a token of class c reads 8 e_c; expert e writes strength (g z)^2 sigmoid(g z)."""
    model = new_text_model(num_hidden_layers=1, interleave_moe_layer_step=1, num_experts_per_tok=top_k)
    logits = np.array([[0.9, -0.4, 0.3, -1.0], [-0.6, 0.8, -0.2, 0.4], [0.5, 0.1, 0.7, -0.3], [0.6, -0.5, 0.2, 0.1]])
    strength, block = np.array([1.0, -2.0, 3.0, 0.5]), model.text.layers[0].feed_forward
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1) if parameter.ndim == 1 else parameter.zero_()
        model.text.embed_tokens.weight[torch.arange(128), torch.arange(128) % 4] = 1
        block.router.weight[:, :4] = torch.tensor(logits.T) / 8
        bank = block.experts.gate_up_proj
        bank[:, :4, 0] = bank[:, :4, bank.shape[2] // 2] = 0.1
        block.experts.down_proj[torch.arange(4), 0, 8 + torch.arange(4)] = torch.tensor(strength).float()
        model.get_output_embeddings().weight[:12, :12] = torch.eye(12)
    tokens = [4, 5, 6, 7, 8, 6]
    kinds, size = np.array(tokens) % 4, 1 / np.sqrt(1 / 64 + 1e-5)

    def write(expert, gate):
        z = 0.1 * size * gate
        return strength[expert] * z * z / (1 + np.exp(-z))

    def gate(kind, expert):
        return 1 / (1 + np.exp(-logits[kind, expert] * size / 8))

    def loss(lost=None, instead=None):
        total = 0.0
        for kind, following in zip(kinds[:-1], tokens[1:], strict=True):
            resid, order = np.zeros(64), np.argsort(-logits[kind])
            resid[kind] = 1
            own = [e for e in order[:top_k] if e != lost]
            own += [order[top_k]] if instead and lost in order[:top_k] else []
            for expert in own:
                resid[8 + expert] = write(expert, gate(kind, expert))
            out = np.zeros(128)
            out[:12] = (resid / np.sqrt((resid**2).mean() + 1e-5))[:12]
            total += np.log(np.exp(out).sum()) - out[following]
        return total / (len(tokens) - 1)

    table = importance(model, [tokens], ablations=["zero", "runner_up"])
    for expert in range(4):
        line = table.iloc[expert]
        users = [kind for kind in kinds if expert in np.argsort(-logits[kind])[:top_k]]
        assert line["tokens"] == len(users)
        assert line["zero"] == pytest.approx(loss(expert) - loss(), abs=1e-5)
        assert line["runner_up"] == pytest.approx(loss(expert, instead=True) - loss(), abs=1e-5)
        if users:
            assert line["reap"] == pytest.approx(
                np.mean([abs(write(expert, gate(k, expert))) for k in users]), rel=1e-4
            )
            assert line["ean_mean"] == pytest.approx(abs(write(expert, 1.0)), rel=1e-4)
