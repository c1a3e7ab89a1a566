"""Which tokens are rerouted, in which passes, in blocks in which order, and how blocks end."""

from typing import Any

import pytest
import torch

import llama4lab as lab
from llama4lab.run.routes.rerouting import rerouted
from llama4lab.run.steering import steered

TEXT = "When Mary and John went to the store, John gave a drink to"
OTHER = "When Mary and John went to the store, Mary gave a drink to"
ROWS = [[5, 9, 17, 3, 8, 44, 21], [7, 7, 2], [90, 14, 33, 6, 60]]
ROUTER = "layers.*.feed_forward.router.*"
FIRST = "layers.1.feed_forward.router."


@pytest.fixture(autouse=True)
def _nothing_left(tiny, small):
    """No hook and no changed number of slots, however the test ends."""

    def state() -> list:
        found = []
        for model in (tiny, small):
            hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
            found.append((sum(hooks), [getattr(m, "top_k", None) for m in model.modules()]))
        return found

    before = state()
    yield
    assert state() == before


@pytest.mark.parametrize(
    ("positions", "meant"),
    [
        (3, [3]),
        ([0, -2], [0, 13]),
        (slice(2, 9, 3), [2, 5, 8]),
        (slice(-3, None), [12, 13, 14]),
        (torch.arange(15)[None] == 4, [4]),
        (None, list(range(15))),
    ],
)
@pytest.mark.parametrize("changes", [{}, {"gate": 0.125}, {"only": "routed"}], ids=str)
def test_only_the_chosen_positions_are_changed(tiny, positions: Any, meant, changes: dict[str, Any]):
    at = [f"{FIRST}indices", f"{FIRST}gates", "layers.1.feed_forward.shared_expert.out"]
    plain = lab.record(tiny, TEXT, at=at)
    unused = sorted(set(range(8)) - set(plain[f"{FIRST}indices"].flatten().tolist()))
    changes = changes or {"ban": set(range(8)) - {unused[0]}}
    with rerouted(tiny, positions=positions, layers=1, **changes):
        run = lab.record(tiny, TEXT, at=at)
    changed = torch.stack([(run[name] != plain[name]).any(-1)[0] for name in at])
    assert changed.any(0).nonzero().flatten().tolist() == meant


def test_padding_is_routed_as_before_and_padded_rows_as_if_alone(small):
    prompt = small.prompt(ROWS)
    padding = prompt.attention_mask == 0
    plain = lab.record(small, prompt, at=ROUTER)
    with rerouted(small, force=[3, 0], gate=0.75):
        run = lab.record(small, prompt, at=ROUTER)
    for point in ("indices", "gates"):
        assert torch.equal(run[f"{FIRST}{point}"][padding], plain[f"{FIRST}{point}"][padding])
    for row, ids in enumerate(ROWS):
        with rerouted(small, force=[3, 0], gate=0.75):
            alone = lab.record(small, [ids]).logits
        torch.testing.assert_close(run.logits[row, 7 - len(ids) :], alone[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("positions", "of_the_text"), [(None, None), ("new", slice(7, None)), (slice(3, 12), slice(3, 12)), (-1, 6)]
)
@pytest.mark.parametrize(
    "changes", [{"ban": [0, 2]}, {"swap": (0, 1), "gate": "original"}, {"prefer": {3: 5.0}, "gate": 0.9}]
)
def test_generation_is_rerouted_like_one_pass_over_its_text(
    small, positions: Any, of_the_text, changes: dict[str, Any]
):
    prompt = small.prompt(ROWS)
    with rerouted(small, positions=positions, **changes):
        run = lab.generate(small, prompt, max_new_tokens=8, at=ROUTER)
    with rerouted(small, positions=of_the_text, **changes):
        whole = lab.record(small, run.prompt, at=ROUTER)
    torch.testing.assert_close(run.logits, whole.logits[:, run.logit_positions], atol=1e-4, rtol=1e-4)
    mask = run.prompt.attention_mask.bool()[:, :-1]
    for name in run:
        if name.endswith("indices"):
            assert torch.equal(run[name][mask], whole[name][:, :-1][mask])


def test_generation_with_more_slots_and_with_routes_of_its_prompt(small):
    prompt = small.prompt(ROWS)
    with rerouted(small, top_k=3):
        run = lab.generate(small, prompt, max_new_tokens=5, at=ROUTER)
        whole = lab.record(small, run.prompt)
    torch.testing.assert_close(run.logits, whole.logits[:, run.logit_positions], atol=1e-4, rtol=1e-4)
    forced = torch.tensor([1, 3]).expand(3, 7, 2)
    with rerouted(small, force=forced):
        run = lab.generate(small, prompt, max_new_tokens=5, at=f"{FIRST}*")
    best = torch.topk(run[f"{FIRST}logits"], 2).indices
    mask = prompt.attention_mask.bool()
    assert torch.equal(run[f"{FIRST}indices"][:, :7][mask], forced[mask])
    assert torch.equal(run[f"{FIRST}indices"][:, 7:], best[:, 7:])


def test_a_run_with_other_slots_is_replayed_with_its_slots(small):
    prompt = small.prompt(ROWS)
    with rerouted(small, top_k=3, gate=0.3):
        run = lab.record(small, prompt, at=ROUTER)
    with rerouted(small, replay=run):
        again = lab.record(small, prompt, at=ROUTER)
    mask = prompt.attention_mask.bool()
    assert torch.equal(again.logits[mask], run.logits[mask])
    assert again[f"{FIRST}indices"].shape[-1] == 3


def test_a_replay_at_some_positions_leaves_the_others_to_the_router(tiny):
    run = lab.record(tiny, OTHER, at=ROUTER)
    name = "layers.3.feed_forward.router.indices"
    with steered(tiny, {"layers.0.resid_post": 3 * torch.randn(128, generator=torch.Generator().manual_seed(0))}):
        free = lab.record(tiny, TEXT, at=ROUTER)
        with rerouted(tiny, replay=run, positions=[9, 14], layers=3):
            held = lab.record(tiny, TEXT, at=ROUTER)
    assert torch.equal(held[name][:, [9, 14]], run[name][:, [9, 14]])
    others = [place for place in range(15) if place not in (9, 14)]
    assert torch.equal(held[name][:, others], free[name][:, others])
    gates = name.replace("indices", "gates")
    assert torch.equal(held[gates][:, [9, 14]], run[gates][:, [9, 14]])
    assert torch.equal(held[gates][:, others], free[gates][:, others])


def test_blocks_in_blocks_add_up(tiny):
    with rerouted(tiny, ban=[0, 1, 2]):
        together = lab.record(tiny, TEXT, at=ROUTER)
    with rerouted(tiny, ban=0), rerouted(tiny, ban=1), rerouted(tiny, ban=2):
        nested = lab.record(tiny, TEXT, at=ROUTER)
    assert all(torch.equal(nested[name], together[name]) for name in together)
    assert torch.equal(nested.logits, together.logits)
    with rerouted(tiny, force=5), rerouted(tiny, ban=[0, 1]):
        held = lab.record(tiny, TEXT, at=f"{FIRST}indices")[f"{FIRST}indices"]
    assert (held == 5).all()
    with rerouted(tiny, force=5), rerouted(tiny, ban=[5, 0]):
        replaced = lab.record(tiny, TEXT, at=f"{FIRST}*")
    logits = replaced[f"{FIRST}logits"].clone()
    logits[..., [5, 0]] = -torch.inf
    assert torch.equal(replaced[f"{FIRST}indices"], torch.topk(logits, 1).indices)
    with rerouted(tiny, ban=[0, 1, 2, 3, 4, 5, 6]), rerouted(tiny, prefer=3):
        asked = lab.record(tiny, TEXT, at=f"{FIRST}indices")[f"{FIRST}indices"]
    assert (asked == 3).all()
    with (
        pytest.raises(ValueError, match="lacks 1 to go to"),
        rerouted(tiny, ban=[0, 1, 2, 3]),
        rerouted(tiny, ban=[4, 5, 6, 7]),
    ):
        lab.record(tiny, TEXT)


def test_logits_that_are_patched_inside_the_block_decide(tiny):
    def push(logits):
        logits = logits.clone()
        logits[..., 6] += 50
        return logits

    with rerouted(tiny, ban=[0, 1], gate="original"), lab.patched(tiny, {f"{FIRST}logits": push}):
        inside = lab.record(tiny, TEXT, at=f"{FIRST}*")
    with lab.patched(tiny, {f"{FIRST}logits": push}), rerouted(tiny, ban=[0, 1], gate="original"):
        outside = lab.record(tiny, TEXT, at=f"{FIRST}*")
    assert (inside[f"{FIRST}indices"] == 6).all()
    assert all(torch.equal(inside[name], outside[name]) for name in inside)


def test_patches_of_the_choice_inside_the_block_come_after_it(tiny):
    with rerouted(tiny, ban=[0, 1]), lab.patched(tiny, {f"{FIRST}indices": torch.tensor(4)}):
        run = lab.record(tiny, TEXT, at=f"{FIRST}indices")
    assert (run[f"{FIRST}indices"] == 4).all()
    with lab.patched(tiny, {f"{FIRST}indices": torch.tensor(4)}), rerouted(tiny, ban=[0, 1]):
        run = lab.record(tiny, TEXT, at=f"{FIRST}indices")
    assert (run[f"{FIRST}indices"] == 4).all()


def test_a_sweep_inside_the_block_is_rerouted_in_every_cell(small):
    clean, corrupted, metric = [ROWS[0]], [[5, 9, 18, 3, 8, 44, 21]], lab.metrics.logit_diff(3, 4)
    at, name = "layers.*.resid_post", "layers.2.resid_post"
    with rerouted(small, ban=[0], gate=0.5):
        sweep = lab.sweep(small, clean, corrupted, at=at, over={"layer": [2], "position": [1, 2]}, metric=metric)
        source = lab.record(small, clean, at=at)

        def put(x):
            x = x.clone()
            x[:, 2] = source[name][:, 2]
            return x

        with lab.patched(small, {name: put}):
            logits = lab.record(small, corrupted).logits[0, -1]
    table = sweep.table
    cell = table[table.position == 2]
    assert cell.patched.item() == pytest.approx((logits[3] - logits[4]).item(), abs=1e-4)


def test_gradients_flow_through_own_gates_and_not_through_given_ones(small):
    at = f"{FIRST}logits"
    for gate, flows in (("own", True), ("original", True), (0.5, False)):
        with rerouted(small, layers=1, ban=[0], gate=gate):
            run = lab.record(small, [ROWS[0]], at=at, grad=True)
        run.logits[:, -1].sum().backward()
        gradient = run[at].grad
        assert (gradient is not None and bool(gradient.any())) == flows


@pytest.mark.parametrize("failure", [RuntimeError("stop"), KeyboardInterrupt(), GeneratorExit()])
def test_whatever_ends_the_block_leaves_the_model_as_it_was(tiny, failure):
    plain = lab.record(tiny, TEXT).logits

    def fail(_):
        raise failure

    with (
        pytest.raises(type(failure)),
        rerouted(tiny, top_k=3, ban=[0], gate=0.5, only="routed"),
        lab.patched(tiny, {"layers.3.feed_forward.router.indices": fail}),
    ):
        lab.record(tiny, TEXT)
    with pytest.raises(ZeroDivisionError), rerouted(tiny, top_k=3, gate="own"):
        _ = 1 / 0
    assert torch.equal(lab.record(tiny, TEXT).logits, plain)
