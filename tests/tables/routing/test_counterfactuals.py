# pandas declares what it gives as wide unions.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportIndexIssue=false

import accelerate
import numpy as np
import pytest
import torch
from PIL import Image

import llama4lab as lab
from llama4lab.prompt.tokenizer import token_strings
from llama4lab.run.metrics import Metric, as_metric, evaluated
from llama4lab.tables.routing.choices import decisions
from llama4lab.tables.routing.counterfactuals import counterfactual, regret

TOLERANCE = 2e-5
LOSS = lab.metrics.loss()
KEYS = ["row", "layer", "position", "slot"]


@pytest.fixture(scope="module")
def tiny():
    return lab.load()


@pytest.fixture(scope="module")
def top_2(new_text_model):
    """Two experts a token, dense layers between."""
    return new_text_model(num_experts_per_tok=2, num_hidden_layers=4)


@pytest.fixture(scope="module")
def padded(top_2, random_ids):
    """Two rows of different length, longer than a chunk."""
    ids = random_ids(2, 11)
    return top_2.prompt([ids[0].tolist(), ids[1, 4:].tolist()])


def rerouted_run(model, prompt, line, gate, base):
    """One line of the table by ordinary patches of one run, and the gate that it had."""
    place, router = (line.row, line.position, line.slot), f"layers.{line.layer}.feed_forward.router."

    def to(value):
        def patch(tensor):
            new = tensor.clone()
            new[place] = value
            return new

        return patch

    patches = {router + "indices": to(line.expert)}
    if gate != "own":
        patches[router + "gates"] = to(base[router + "gates"][place] if gate == "original" else gate)
    with lab.patched(model, patches):
        run = lab.record(model, prompt, at=router + "gates")
    return run, float(run[router + "gates"][place])


def assert_like_single_runs(model, prompt, table, gate, metric=LOSS, step=1):
    base, last = lab.record(model, prompt, at="layers.*.feed_forward.router.gates"), as_metric(metric).bound(prompt)
    for line in table.iloc[::step].itertuples():
        run, fed = rerouted_run(model, prompt, line, gate, base)
        assert line.value == pytest.approx(float(evaluated(metric, run)[line.row]), abs=TOLERANCE)
        assert line.gate == pytest.approx(fed, abs=1e-6)
        probs = run.logits[line.row, last.positions[-1]].softmax(-1)
        assert line.top_prob == pytest.approx(float(probs.max()), abs=TOLERANCE)
        assert [line.top_token] == token_strings(prompt.tokenizer, [int(probs.argmax())])


@pytest.mark.parametrize("gate", ["own", "original", 0.7])
@pytest.mark.parametrize("slot", [0, 1])
def test_every_line_equals_a_run_of_its_own(top_2, padded, gate, slot):
    table = counterfactual(top_2, padded, layer=None, position=[5, 7, -2], gate=gate, slot=slot)
    assert_like_single_runs(top_2, padded, table, gate, step=4)
    assert table["effect"].abs().max() > 1e-3
    own = table[table["chosen"]].set_index(KEYS)["value"]
    assert np.allclose(table["effect"], table["value"] - own.loc[list(table[KEYS].itertuples(index=False))].to_numpy())


def test_other_metrics_are_followed(top_2, padded):
    for metric in (lab.metrics.logit_diff([7, 8], [9, 10], position=6), lambda logits: (logits[:, 6] ** 2).mean()):
        table = counterfactual(top_2, padded, layer=1, position=[4, 5], metric=metric)
        assert_like_single_runs(top_2, padded, table, "own", metric, step=2)
        assert table.attrs["lower_is_better"] is (False if isinstance(metric, Metric) else None)


def test_the_chosen_expert_reproduces_the_prompt_as_it_is(tiny):
    prompt = tiny.prompt(["The capital of France is Paris.", "Paris is"])
    value = evaluated(LOSS, lab.record(tiny, prompt))
    run = lab.record(tiny, prompt, at="layers.*.feed_forward.router.*")
    chosen = decisions(run)
    for gate in ("own", "original"):
        table = counterfactual(tiny, prompt, layer=None, position=None, gate=gate)
        lines = table[table["chosen"]].reset_index(drop=True)
        assert np.allclose(lines["value"], value.numpy()[lines["row"]], atol=1e-6)
        assert (lines["effect"] == 0).all()
        names = ["row", "layer", "position", "token", "slot", "expert"]
        assert lines[names].equals(chosen[names])
        assert np.allclose(lines[["logit", "gate"]], chosen[["logit", "gate"]], atol=1e-6)


def test_there_is_a_line_for_every_expert_of_every_token_and_none_for_padding(tiny):
    prompt = tiny.prompt(["The capital of France is Paris.", "Paris is"])
    table = counterfactual(tiny, prompt, layer=None, position=None)
    assert len(table) == int(prompt.attention_mask.sum()) * 4 * 8
    assert (table.groupby(KEYS)["expert"].apply(list).map(lambda e: e == list(range(8)))).all()
    assert (table.groupby(KEYS)["chosen"].sum() == 1).all()
    assert set(table["token"]) <= {token for row in prompt.tokens for token in row if token}
    assert table.attrs == {"metric": "loss", "lower_is_better": True, "num_experts": 8, "gate": "own"}
    assert_like_single_runs(tiny, prompt, table, "own", step=53)


def test_experts_in_other_slots_are_no_alternatives(top_2, padded):
    table = counterfactual(top_2, padded, layer=[3, 1], position=None, slot=None)
    run = lab.record(top_2, padded, at="layers.*.feed_forward.router.indices")
    assert len(table) == int(padded.attention_mask.sum()) * 2 * 2 * 3
    for (row, layer, position, slot), lines in table.groupby(KEYS):
        experts = run[f"layers.{layer}.feed_forward.router.indices"][row, position].tolist()
        assert list(lines.loc[lines["chosen"], "expert"]) == [experts[slot]]
        assert experts[1 - slot] not in set(lines["expert"])
    assert table[KEYS].drop_duplicates().equals(table[KEYS].drop_duplicates().sort_values(KEYS))


def test_a_token_does_not_change_what_was_before_it(tiny):
    prompt = tiny.prompt("The capital of France is Paris.")
    table = counterfactual(tiny, prompt, layer=[1, 7], position=-1)
    assert (table["effect"] == 0).all()
    earlier = lab.metrics.log_prob(" France", position=3)
    assert (counterfactual(tiny, prompt, layer=1, position=[4, 5], metric=earlier)["effect"] == 0).all()


def test_image_tokens_have_counterfactuals(tiny):
    drawn = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    prompt = tiny.prompt("<|image|> What is it?", images=[Image.fromarray(drawn)])
    image = prompt.modality[0].index("image")
    table = counterfactual(tiny, prompt, layer=[1, 7], position=[image, -3])
    assert_like_single_runs(tiny, prompt, table, "own", step=6)


def test_inside_somebody_elses_edits_lines_are_runs_inside_them(top_2, padded):
    with lab.patched(top_2, {"layers.1.feed_forward.experts.out": lambda x: 2 * x}):
        table = counterfactual(top_2, padded, layer=[1, 3], position=[6], gate="original")
        assert_like_single_runs(top_2, padded, table, "original", step=2)


def test_offloaded_and_half_precision_models_are_run(new_text_model, top_2, padded):
    here = counterfactual(top_2, padded, layer=None, position=[5, 6])
    away = new_text_model(num_experts_per_tok=2, num_hidden_layers=4)
    accelerate.cpu_offload(away, execution_device=torch.device("cpu"))
    assert np.allclose(counterfactual(away, padded, layer=None, position=[5, 6])["value"], here["value"], atol=1e-6)
    half = new_text_model(dtype=torch.bfloat16, num_experts_per_tok=2, num_hidden_layers=4)
    table = counterfactual(half, padded, layer=None, position=[5, 6])
    assert (table.loc[table["chosen"], "effect"] == 0).all()


def test_what_is_not_there_is_refused(top_2, tiny, padded, new_text_model):
    with pytest.raises(ValueError, match=r"layer 2, which is dense.*\n.*1, 3"):
        counterfactual(top_2, padded, layer=[1, 2], position=5)
    with pytest.raises(ValueError, match="all its layers are dense"):
        counterfactual(new_text_model(moe_layers=[]), padded, layer=None, position=5)
    with pytest.raises(IndexError, match="layers 0 to 3"):
        counterfactual(top_2, padded, layer=4, position=5)
    with pytest.raises(IndexError, match="positions 0 to 10"):
        counterfactual(top_2, padded, layer=1, position=11)
    with pytest.raises(IndexError, match="padding in every row"):
        counterfactual(top_2, top_2.prompt([[5, 6, 7, 8], [5, 6, 7]]).row(1), layer=1, position=0)
    with pytest.raises(IndexError, match="slots 0 to 1"):
        counterfactual(top_2, padded, layer=1, position=5, slot=2)
    with pytest.raises(ValueError, match=r'gate=.*"own"'):
        counterfactual(top_2, padded, layer=1, position=5, gate="mine")
    with pytest.raises(ValueError, match="No position"):
        counterfactual(top_2, padded, layer=1, position=[])
    with pytest.raises(ValueError, match="no layer"):
        counterfactual(top_2, padded, layer=[], position=5)
    # Padding of one row only is left out.
    assert set(counterfactual(top_2, padded, layer=1, position=2)["row"]) == {0}


@pytest.mark.parametrize("lower", [True, False])
def test_regret_is_the_loss_against_the_best_expert(tiny, lower):
    prompt = tiny.prompt(["The capital of France is Paris.", "Paris is"])
    table = counterfactual(tiny, prompt, layer=[1, 7], position=None)
    found = regret(table.sample(frac=1, random_state=0), lower_is_better=lower)
    assert list(found[KEYS].itertuples(index=False)) == list(table[KEYS].drop_duplicates().itertuples(index=False))
    sign = 1 if lower else -1
    for line in found.itertuples():
        own = table[(table[KEYS] == [line.row, line.layer, line.position, line.slot]).all(axis=1)]
        values = sign * own.set_index("expert")["value"]
        assert own.set_index("expert")["chosen"][line.expert]
        assert values[line.best] == values.min()
        assert line.regret == pytest.approx(values[line.expert] - values.min(), abs=1e-6)
        assert line.better == (values < values[line.expert]).sum()
        assert (line.best == line.expert) == (line.better == 0)
    assert (found["regret"] >= 0).all()
    assert found["regret"].max() > 0.1
    assert found.attrs["lower_is_better"] is lower


def test_regret_wants_to_know_what_is_good_and_the_chosen_expert(top_2, padded):
    table = counterfactual(top_2, padded, layer=1, position=[5, 6])
    assert regret(table).equals(regret(table, lower_is_better=True))
    unknown = counterfactual(top_2, padded, layer=1, position=[5, 6], metric=lambda logits: logits.mean())
    with pytest.raises(ValueError, match="lower_is_better"):
        regret(unknown)
    with pytest.raises(ValueError, match="chosen expert"):
        regret(table[~table["chosen"]])
    some = regret(table[table["position"] == 6])
    assert some.equals(regret(table)[regret(table)["position"] == 6].reset_index(drop=True))


# Planted truth: a model of one layer whose attention writes nothing. Token t is of class t % 4, and its embedding is a
# unit vector of that class. Expert e has one neuron, which reads the class, and writes along a direction of its own.

D_MODEL, CLASSES, EXPERTS = 64, 4, 4
LOGITS = np.array([[2.0, 0.5, -1.0, 0.0], [-0.5, 1.5, 0.7, 0.1], [0.3, -2.0, 0.9, 0.4], [0.2, 0.6, 1.1, -0.7]])
READS = np.array([[0.2, 0.1, -0.1, 0.1], [-0.1, 0.2, 0.1, 0.3], [0.1, -0.2, 0.1, 0.1], [0.3, 0.1, 0.2, -0.1]])
STRENGTH = np.array([1.5, -2.0, 2.5, 1.0])


def planted(new_text_model, top_k):
    """The model: LOGITS[class, expert], READS[class, expert] are what router and neuron see per unit of the input."""
    model = new_text_model(
        num_hidden_layers=1, interleave_moe_layer_step=1, num_local_experts=EXPERTS, num_experts_per_tok=top_k
    )
    layer = model.text.layers[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1) if parameter.ndim == 1 else parameter.zero_()
        for token in range(128):
            model.text.embed_tokens.weight[token, token % CLASSES] = 1
        block = layer.feed_forward
        block.router.weight[:, :CLASSES] = torch.tensor(LOGITS.T)
        d_ff = block.experts.down_proj.shape[1]
        block.experts.gate_up_proj[:, :CLASSES, 0] = torch.tensor(READS.T, dtype=torch.float32)
        block.experts.gate_up_proj[:, :CLASSES, d_ff] = torch.tensor(READS.T, dtype=torch.float32)
        for expert in range(EXPERTS):
            block.experts.down_proj[expert, 0, 8 + expert] = STRENGTH[expert]
        model.get_output_embeddings().weight[:12, :12] = torch.eye(12)
    return model


def written(kind, expert, gate):
    """What an expert writes for a token of a class: gate inside, on the input."""
    z = gate * READS[kind, expert] * input_size()
    vector = np.zeros(D_MODEL)
    vector[8 + expert] = STRENGTH[expert] * z * z / (1 + np.exp(-z))
    return vector


def input_size(eps=1e-5):
    """The router's input is the class direction times this: the norm of a unit vector of 64 numbers."""
    return 1 / np.sqrt(1 / D_MODEL + eps)


def logit_diff_of(kind, experts_and_gates, right, wrong):
    resid = np.eye(D_MODEL)[kind] + sum(written(kind, expert, gate) for expert, gate in experts_and_gates)
    normed = resid / np.sqrt((resid**2).mean() + 1e-5)
    return normed[right] - normed[wrong]


def gate_of(kind, expert):
    return 1 / (1 + np.exp(-LOGITS[kind, expert] * input_size()))


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("gate", ["own", "original", 0.3])
def test_planted_experts_have_the_effects_that_they_were_given(new_text_model, top_k, gate):
    model, tokens = planted(new_text_model, top_k), [5, 6, 7, 8]
    prompt = model.prompt([tokens])
    for position, token in enumerate(tokens):
        kind = token % CLASSES
        metric = lab.metrics.logit_diff(8, 9, position=position)
        best = np.argsort(-LOGITS[kind], kind="stable")[:top_k]
        for slot in range(top_k):
            table = counterfactual(model, prompt, layer=0, position=position, metric=metric, gate=gate, slot=slot)
            others = [(int(e), gate_of(kind, e)) for e in best if e != best[slot]]
            assert set(table["expert"]) == set(range(EXPERTS)) - {e for e, _ in others}
            truth = []
            for expert in table["expert"]:
                fed = {"own": gate_of(kind, expert), "original": gate_of(kind, best[slot])}.get(gate, gate)
                truth.append(logit_diff_of(kind, [*others, (expert, fed)], 8, 9))
            assert np.allclose(table["value"], truth, atol=1e-5)
            chosen = list(table["expert"]).index(best[slot])
            assert table["chosen"].tolist().index(True) == chosen
            found = regret(table)
            assert found["regret"].item() == pytest.approx(max(truth) - truth[chosen], abs=1e-5)
            assert found["best"].item() == table["expert"][int(np.argmax(truth))]


def test_the_planted_effects_tell_a_gate_on_the_output_apart(new_text_model):
    """The trap: gate times f(x) is far from f(gate times x) here, so the test above fails for it."""
    model, metric = planted(new_text_model, 1), lab.metrics.logit_diff(8, 9, position=1)
    table = counterfactual(model, model.prompt([[5, 6]]), layer=0, position=1, metric=metric)
    wrong = []
    for expert in range(EXPERTS):
        resid = np.eye(D_MODEL)[2] + gate_of(2, expert) * written(2, expert, 1.0)
        normed = resid / np.sqrt((resid**2).mean() + 1e-5)
        wrong.append(normed[8] - normed[9])
    assert np.abs(table["value"] - wrong).max() > 0.1
