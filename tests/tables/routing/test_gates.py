# pandas declares what it gives as wide unions.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportIndexIssue=false

import accelerate
import numpy as np
import pytest
import torch

import llama4lab as lab
from llama4lab.run.metrics import evaluated
from llama4lab.tables.routing.counterfactuals import counterfactual
from llama4lab.tables.routing.gates import gate_curve

TOLERANCE = 2e-5
LOSS = lab.metrics.loss()
KEYS = ["row", "layer", "position", "slot"]


@pytest.fixture(scope="module")
def top_2(new_text_model):
    """Two experts a token, dense layers between."""
    return new_text_model(num_experts_per_tok=2, num_hidden_layers=4)


@pytest.fixture(scope="module")
def padded(top_2, random_ids):
    """Two rows of different length, longer than a chunk."""
    ids = random_ids(2, 11)
    return top_2.prompt([ids[0].tolist(), ids[1, 4:].tolist()])


def read(model, prompt, line):
    """What the router and the experts of a layer read at a place, and the weights of the place's expert."""
    name = f"layers.{line.layer}.resid_mid"
    resid, layer = lab.record(model, prompt, at=name)[name], model.text.layers[line.layer]
    x = layer.post_attention_layernorm(resid)[line.row, line.position].detach().double()
    experts = layer.feed_forward.experts
    return x, experts.gate_up_proj[line.expert].detach().double(), experts.down_proj[line.expert].detach().double()


def write(x, gate_up, down, gate):
    """An expert by its definition, the gate on its input."""
    first, second = (gate * x @ gate_up).chunk(2)
    return torch.nn.functional.silu(first) * second @ down


@pytest.mark.parametrize("slot", [0, 1])
def test_gain_and_cosine_are_those_of_the_expert_by_its_definition(top_2, padded, slot):
    table = gate_curve(top_2, padded, layer=None, position=-1, gates=[0.1, 1.5, -0.5], slot=slot)
    own = table[table["own"]].set_index(KEYS)["gate"]
    for line in table.itertuples():
        parts = read(top_2, padded, line)
        now = write(*parts, line.gate)
        was = write(*parts, own[(line.row, line.layer, line.position, line.slot)])
        assert line.gain == pytest.approx(float(now.norm() / was.norm()), abs=1e-4)
        assert line.cosine == pytest.approx(float(torch.cosine_similarity(now, was, dim=0)), abs=1e-5)
    # The trap: as a factor on the output, a gate would be the gain itself, up to the own gate.
    factor = table["gate"].abs() / table["gate"].where(table["own"]).groupby([table[k] for k in KEYS]).transform("max")
    assert (table["gain"] - factor).abs().max() > 0.3


@pytest.mark.parametrize("slot", [0, 1])
def test_every_value_equals_a_run_with_that_gate(top_2, padded, slot):
    table = gate_curve(top_2, padded, layer=None, position=[5, 8], gates=[0, 1.5], slot=slot)
    base = evaluated(LOSS, lab.record(top_2, padded))
    for line in table.itertuples():
        place = (line.row, line.position, line.slot)

        def patch(gates, place=place, line=line):
            new = gates.clone()
            new[place] = line.gate
            return new

        with lab.patched(top_2, {f"layers.{line.layer}.feed_forward.router.gates": patch}):
            value = float(evaluated(LOSS, lab.record(top_2, padded))[line.row])
        assert line.value == pytest.approx(value, abs=TOLERANCE)
        assert line.effect == pytest.approx(value - float(base[line.row]), abs=TOLERANCE)
    assert table["effect"].abs().max() > 1e-3


def test_at_the_own_gate_nothing_changes(top_2, padded):
    table = gate_curve(top_2, padded, layer=[1, 3], position=None, gates=[0.5], slot=None)
    own = table[table["own"]].reset_index(drop=True)
    assert np.allclose(own[["gain", "cosine"]], 1)
    assert (own["effect"] == 0).all()
    chosen = counterfactual(top_2, padded, layer=[1, 3], position=None, slot=None)
    chosen = chosen[chosen["chosen"]].reset_index(drop=True)
    assert own[[*KEYS, "token", "expert"]].equals(chosen[[*KEYS, "token", "expert"]])
    assert np.allclose(own[["gate", "value"]], chosen[["gate", "value"]])


def test_lines_are_in_order_and_padding_has_none(top_2, padded):
    table = gate_curve(top_2, padded, layer=1, position=None)
    assert set(map(tuple, table[["row", "position"]].to_numpy())) == set(
        map(tuple, padded.attention_mask.nonzero().tolist())
    )
    for _, lines in table.groupby(KEYS):
        assert lines["gate"].is_monotonic_increasing
        assert lines["own"].sum() == 1
        assert np.allclose(lines.loc[~lines["own"], "gate"], np.linspace(0, 1.5, 16))
    assert table[KEYS].equals(table[KEYS].sort_values(KEYS, ignore_index=True))
    assert table.attrs == {"metric": "loss", "lower_is_better": True, "num_experts": 4}


def test_the_gain_of_one_neuron_is_known_in_closed_form(new_text_model, random_ids):
    """With one neuron that reads z = u x twice, |f(g x)| is g^2 z^2 sigmoid(g z) |v|: near quadratic for small g."""
    model = new_text_model(num_hidden_layers=2)
    layer = model.text.layers[1]
    with torch.no_grad():
        bank, down = layer.feed_forward.experts.gate_up_proj, layer.feed_forward.experts.down_proj
        read_by = torch.randn(bank.shape[1], generator=torch.Generator().manual_seed(3)) / 8
        bank.zero_()
        bank[:, :, 0] = bank[:, :, bank.shape[2] // 2] = read_by
        down[:, 1:] = 0
    prompt = model.prompt([random_ids(6).tolist()])
    name = "layers.1.resid_mid"
    x = layer.post_attention_layernorm(lab.record(model, prompt, at=name)[name])[0].detach()
    z = (x.double() @ read_by.double()).numpy()
    table = gate_curve(model, prompt, layer=1, position=None, gates=[0, 1e-3, 2e-3, 0.5, 1.0, 1.5])
    own = table[table["own"]].set_index("position")["gate"]
    for line in table.itertuples():
        g, g0, at = line.gate, own[line.position], z[line.position]
        closed = (g * g / (1 + np.exp(-g * at))) / (g0 * g0 / (1 + np.exp(-g0 * at)))
        assert line.gain == pytest.approx(closed, rel=1e-4)
        assert np.isnan(line.cosine) if g == 0 else line.cosine == pytest.approx(1, abs=1e-6)
    curve = table.pivot(index="position", columns="gate", values="gain")
    assert np.allclose(curve[2e-3] / curve[1e-3], 4, rtol=5e-3)


def test_an_expert_that_writes_nothing_has_no_gain(new_text_model):
    model = new_text_model(num_hidden_layers=2)
    with torch.no_grad():
        model.text.layers[1].feed_forward.experts.down_proj.zero_()
    table = gate_curve(model, model.prompt([[5, 6, 7]]), layer=1, position=1, gates=[0.5])
    assert table["gain"].isna().all()
    assert table["cosine"].isna().all()
    assert np.allclose(table["effect"], 0, atol=1e-6)


def test_inside_somebody_elses_edits_the_curve_is_of_the_edited_model(top_2, padded):
    plain = gate_curve(top_2, padded, layer=1, position=[6], gates=[0.5])
    moved = torch.zeros(2, 11, 1, 64)
    moved[:, :, 0, 0] = 1.0  # of the shape of the whole prompt, which a call for some tokens would not fit

    with lab.patched(top_2, {"layers.1.feed_forward.experts.out": lambda x: x + moved}):
        edited = gate_curve(top_2, padded, layer=1, position=[6], gates=[0.5])
    assert (edited["gain"] - plain["gain"]).abs().max() > 1e-4
    assert (edited["value"] - plain["value"]).abs().max() > 1e-4


def test_an_offloaded_model_gives_the_same(new_text_model, top_2, padded):
    away = new_text_model(num_experts_per_tok=2, num_hidden_layers=4)
    accelerate.cpu_offload(away, execution_device=torch.device("cpu"))
    here, there = (gate_curve(model, padded, layer=None, position=[5, 6]) for model in (top_2, away))
    names = ["gain", "cosine", "value"]
    assert np.allclose(here[names], there[names], atol=1e-6, equal_nan=True)


def test_gates_that_are_no_numbers_are_refused(top_2, padded):
    for gates in ([], [0.5, float("nan")], [float("inf")]):
        with pytest.raises(ValueError, match="finite numbers"):
            gate_curve(top_2, padded, layer=1, position=5, gates=gates)
    with pytest.raises(ValueError, match="layer 0, which is dense"):
        gate_curve(top_2, padded, layer=0, position=5)
