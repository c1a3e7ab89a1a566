"""Rerouting against a mixture of experts worked out token by token, and the laws that it has to keep."""

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.nn.functional import silu

import llama4lab as lab
from llama4lab.run.routes.rerouting import rerouted

TEXT = "When Mary and John went to the store, John gave a drink to"
ROWS = [[5, 9, 17, 3, 8, 44, 21], [7, 7, 2], [90, 14, 33, 6, 60]]
ROUTER = "layers.*.feed_forward.router.*"
FIRST = "layers.1.feed_forward.router."


@pytest.fixture(scope="module")
def single(new_text_model):
    """`small` with one expert a token."""
    return new_text_model(num_hidden_layers=4)


Rule = Callable[[list[float], int], list[tuple[int, float]]]


def order(scores: list[float]) -> list[int]:
    return sorted(range(len(scores)), key=lambda expert: -scores[expert])


def own(logits: list[float], chosen: list[int]) -> list[tuple[int, float]]:
    return [(expert, float(torch.tensor(logits[expert]).sigmoid())) for expert in chosen]


@contextmanager
def by_hand(model, rule: Rule, layers=(1, 3)):
    """Replaces each mixture of experts by one that is worked out token by token; `rule` gives experts and gates."""

    def mixture(module, args, _out):
        x = args[0]
        written = torch.zeros_like(x)
        for place in torch.cartesian_prod(torch.arange(x.shape[0]), torch.arange(x.shape[1])).tolist():
            token = x[tuple(place)]
            logits = (module.router.weight @ token).tolist()
            for expert, gate in rule(logits, place[1]):
                gated, up = (gate * token @ module.experts.gate_up_proj[expert]).chunk(2)
                written[tuple(place)] += (up * silu(gated)) @ module.experts.down_proj[expert]
        shared = module.shared_expert
        return written + shared.down_proj(shared.up_proj(x) * silu(shared.gate_proj(x)))

    handles = [model.text.layers[layer].feed_forward.register_forward_hook(mixture) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def rules(k: int) -> dict[str, tuple[dict[str, Any], Rule]]:
    """Changes, and what they mean for the router logits of one token."""

    def banned(z, _):
        return own(z, [expert for expert in order(z) if expert not in (0, 2)][:k])

    def preferred(z, _):
        liked = [expert for expert in order(z) if expert in (1, 3)]
        return own(z, (liked + [expert for expert in order(z) if expert not in liked])[:k])

    def biased(z, _):
        return own(z, order([score + {0: 3.0, 1: -2.0}.get(expert, 0) for expert, score in enumerate(z)])[:k])

    def forced(z, _):
        return own(z, [2, *[expert for expert in order(z) if expert != 2]][:k])

    def swapped(z, _):
        return own(z, [{0: 3, 3: 0}.get(expert, expert) for expert in order(z)[:k]])

    def circled(z, _):
        return own(z, [{0: 1, 1: 2, 2: 0}.get(expert, expert) for expert in order(z)[:k]])

    def original(z, _):
        new = [2, *[expert for expert in order(z) if expert != 2]][:k]
        return [(expert, gate) for expert, (_, gate) in zip(new, own(z, order(z)[:k]), strict=True)]

    def replaced(z, _):
        held = own(z, order(z)[:k])
        free = [e for e in order(z) if e not in (0, 2) and e not in order(z)[:k]]
        return [(free.pop(0) if expert in (0, 2) else expert, gate) for expert, gate in held]

    def dense(z, _):
        return own(z, order(z))

    def late(z, position):
        return banned(z, position) if position >= 4 else own(z, order(z)[:k])

    return {
        "ban": ({"ban": [0, 2]}, banned),
        "prefer": ({"prefer": [3, 1]}, preferred),
        "bias": ({"prefer": {0: 3.0, 1: -2}}, biased),
        "force": ({"force": 2}, forced),
        "swap": ({"swap": (0, 3)}, swapped),
        "circle": ({"swap": {0: 1, 1: 2, 2: 0}}, circled),
        "force, original gate": ({"force": [2], "gate": "original"}, original),
        "ban, original gate": ({"ban": (0, 2), "gate": "original"}, replaced),
        "all experts": ({"top_k": 4}, dense),
        "gate": ({"gate": 0.25}, lambda z, _: [(expert, 0.25) for expert in order(z)[:k]]),
        "gate above 1": ({"gate": 2}, lambda z, _: [(expert, 2.0) for expert in order(z)[:k]]),
        "halved gate": ({"gate": lambda gates: gates / 2}, lambda z, _: [(e, g / 2) for e, g in own(z, order(z)[:k])]),
        "positions": ({"ban": [0, 2], "positions": slice(4, None)}, late),
    }


@pytest.mark.parametrize("name", list(rules(1)))
@pytest.mark.parametrize("slots", [1, 2])
def test_each_change_is_what_a_mixture_worked_out_by_hand_makes_of_it(small, single, slots, name):
    model, (changes, rule) = (single, small)[slots - 1], rules(slots)[name]
    prompt = model.prompt(ROWS)
    mask = prompt.attention_mask.bool()
    with by_hand(model, rule):
        expected = lab.record(model, prompt)
    with rerouted(model, **changes):
        run = lab.record(model, prompt)
    torch.testing.assert_close(run.logits[mask], expected.logits[mask], atol=1e-4, rtol=1e-4)
    assert (run.logits - lab.record(model, prompt).logits)[mask].abs().max() > 0.01


def test_the_reference_by_hand_is_the_model_where_nothing_is_changed(small):
    prompt = small.prompt(ROWS)
    with by_hand(small, lambda z, _: own(z, order(z)[:2])):
        expected = lab.record(small, prompt)
    torch.testing.assert_close(lab.record(small, prompt).logits, expected.logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("gate", [{}, {"gate": "own"}])
def test_replaying_a_run_gives_the_same_logits_to_the_bit(tiny, small, asked, gate: Any):
    for model, prompt in ((tiny, TEXT), (tiny, asked), (small, small.prompt(ROWS))):
        run = lab.record(model, prompt, at=ROUTER)
        with rerouted(model, replay=run, **gate):
            again = lab.record(model, prompt, at=ROUTER)
        assert torch.equal(again.logits, run.logits)
        assert all(torch.equal(again[name], run[name]) for name in run)


@pytest.mark.parametrize("gate", ["own", "original"])
def test_forcing_the_chosen_experts_changes_no_bit(tiny, small, asked, gate: Any):
    for model, prompt in ((tiny, TEXT), (tiny, asked), (small, small.prompt(ROWS))):
        run = lab.record(model, prompt, at=ROUTER)
        with rerouted(model, force=run.layers("feed_forward.router.indices"), gate=gate):
            assert torch.equal(lab.record(model, prompt).logits, run.logits)


def test_banning_experts_that_nobody_goes_to_changes_no_bit(tiny, asked):
    for prompt in (TEXT, asked):
        run = lab.record(tiny, prompt, at=ROUTER)
        used = run.layers("feed_forward.router.indices")
        unused = {layer: sorted(set(range(8)) - set(chosen.flatten().tolist())) for layer, chosen in used.items()}
        assert any(unused.values())
        with rerouted(tiny, ban=unused, gate="original"):
            assert torch.equal(lab.record(tiny, prompt).logits, run.logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_are_left_as_the_router_broke_them(new_text_model, dtype):
    model = new_text_model(num_local_experts=16, num_experts_per_tok=2, dtype=dtype)
    for layer in (1, 3):
        weight = model.text.layers[layer].feed_forward.router.weight.data
        weight[:] = weight[:1]  # all experts stand equal with every token
    run = lab.record(model, [ROWS[0]], at=ROUTER)
    used = {
        layer: set(chosen.flatten().tolist()) for layer, chosen in run.layers("feed_forward.router.indices").items()
    }
    assert all(len(experts) == 2 for experts in used.values())
    cases: list[dict[str, Any]] = [
        {"ban": {layer: [expert for expert in range(16) if expert not in used[layer]] for layer in used}},
        {"prefer": dict.fromkeys(range(16), 1.5)},
    ]
    for changes in cases:
        with rerouted(model, **changes):
            assert torch.equal(lab.record(model, [ROWS[0]]).logits, run.logits)


def test_swapping_twice_is_nothing(tiny, small):
    for model, prompt, swap in ((tiny, TEXT, (0, 1)), (small, ROWS, (0, 3))):
        run = lab.record(model, prompt, at=ROUTER)
        with rerouted(model, swap=swap):
            once = lab.record(model, prompt)
            with rerouted(model, swap=swap):
                twice = lab.record(model, prompt, at=ROUTER)
        assert torch.equal(twice.logits, run.logits)
        assert all(torch.equal(twice[name], run[name]) for name in run)
        assert not torch.equal(once.logits, run.logits)


@pytest.mark.parametrize("slots", [1, 2, 3, 4])
def test_another_number_of_slots_is_a_model_with_that_many(small, new_text_model, slots):
    other = new_text_model(num_experts_per_tok=slots, num_hidden_layers=4)
    at = [ROUTER, "layers.*.feed_forward.experts.*"]
    expected = lab.record(other, other.prompt(ROWS), at=at)
    with rerouted(small, top_k=slots):
        run = lab.record(small, small.prompt(ROWS), at=at)
    assert torch.equal(run.logits, expected.logits)
    assert all(torch.equal(run[name], expected[name]) for name in expected)
    assert run[f"{FIRST}indices"].shape[-1] == slots


def test_changes_of_several_kinds_work_together(small, new_text_model):
    three = new_text_model(num_experts_per_tok=3, num_hidden_layers=4)
    prompt = small.prompt(ROWS)
    with rerouted(three, ban=[1], gate="original"):
        expected = lab.record(three, prompt)
    with rerouted(small, top_k=3, ban=[1], gate="original"):
        assert torch.equal(lab.record(small, prompt).logits, expected.logits)
    with rerouted(small, top_k=3, force=[2, 0], ban=1, gate=0.5):
        run = lab.record(small, prompt, at=ROUTER)
    mask = prompt.attention_mask.bool()
    for layer in (1, 3):
        chosen = run[f"layers.{layer}.feed_forward.router.indices"][mask]
        assert chosen.tolist() == [[2, 0, 3]] * len(chosen)
        assert (run[f"layers.{layer}.feed_forward.router.gates"][mask] == 0.5).all()


@pytest.mark.parametrize(
    "changes", [{"ban": [0, 1]}, {"prefer": {5: 40.0}}, {"force": 6}, {"swap": (0, 1)}, {"top_k": 3}]
)
def test_the_choice_changes_neither_the_logits_nor_what_a_gate_is(tiny, changes: dict[str, Any]):
    plain = lab.record(tiny, TEXT, at=ROUTER)
    with rerouted(tiny, **changes):
        run = lab.record(tiny, TEXT, at=ROUTER)
    # Nothing before the first router differs; later ones read other vectors.
    assert torch.equal(run[f"{FIRST}logits"], plain[f"{FIRST}logits"])
    assert not torch.equal(run[f"{FIRST}indices"], plain[f"{FIRST}indices"])
    for layer in (1, 3, 5, 7):
        logits, indices, gates = (
            run[f"layers.{layer}.feed_forward.router.{p}"] for p in ("logits", "indices", "gates")
        )
        assert torch.equal(gates, torch.sigmoid(logits.gather(-1, indices)))


@pytest.mark.parametrize("slots", [1, 2])
def test_the_original_gate_is_the_one_that_patching_by_hand_keeps(small, single, slots):
    model, kept = (single, small)[slots - 1], {}
    prompt = model.prompt(ROWS)
    forced = torch.tensor([3, 0])[:slots].expand(3, 7, slots)

    def keep(logits):
        kept["logits"] = logits
        return logits

    def gates_before(_gates):
        return torch.sigmoid(torch.topk(kept["logits"], slots).values)

    with lab.patched(model, {f"{FIRST}logits": keep, f"{FIRST}indices": forced, f"{FIRST}gates": gates_before}):
        expected = lab.record(model, prompt)
    with rerouted(model, layers=1, force=forced, gate="original"):
        run = lab.record(model, prompt)
    mask = prompt.attention_mask.bool()
    assert torch.equal(run.logits[mask], expected.logits[mask])


@pytest.mark.parametrize(("only", "silenced"), [("shared", "experts.out"), ("routed", "shared_expert.out")])
def test_only_one_kind_of_expert_writes(tiny, small, only: Any, silenced):
    for model, prompt in ((tiny, TEXT), (small, small.prompt(ROWS))):
        with lab.patched(model, {f"layers.*.feed_forward.{silenced}": 0.0}):
            expected = lab.record(model, prompt)
        with rerouted(model, only=only):
            run = lab.record(model, prompt)
        mask = run.prompt.attention_mask.bool()
        assert torch.equal(run.logits[mask], expected.logits[mask])


@pytest.mark.parametrize("changes", [{"layers": 3}, {"force": {3: 0}}, {"layers": [3], "ban": {3: [0]}}], ids=str)
def test_only_the_layers_asked_for_are_changed(small, changes: dict[str, Any]):
    with rerouted(small, gate=0.5, **changes):
        run = lab.record(small, [ROWS[0]], at="layers.*.feed_forward.router.gates")
    halves = {layer: bool((gates == 0.5).all()) for layer, gates in run.layers("feed_forward.router.gates").items()}
    assert halves == {1: False, 3: True}
