import pytest
import torch

import llama4lab as lab
from llama4lab.run.routes.freeze import frozen_routing
from llama4lab.run.steering import steered

TEXT = "When Mary and John went to the store, John gave a drink to"
OTHER = "When Mary and John went to the store, Mary gave a drink to"
ROWS = [[5, 9, 17, 3, 8, 44, 21], [7, 7, 2], [90, 14, 33, 6, 60]]
ROUTER = "layers.*.feed_forward.router.*"
INDICES = "layers.*.feed_forward.router.indices"

pytestmark = pytest.mark.usefixtures("no_hooks_left")


@pytest.fixture(scope="module")
def small(new_text_model):
    return new_text_model(num_experts_per_tok=2, interleave_moe_layer_step=2)


def push(model) -> dict[str, torch.Tensor]:
    width = model.text.config.hidden_size
    return {"layers.0.resid_post": 3 * torch.randn(width, generator=torch.Generator().manual_seed(0))}


@pytest.mark.parametrize("gates", [True, False])
def test_a_run_under_its_own_routes_is_the_same_to_the_bit(tiny, small, asked, gates):
    for model, prompt in ((tiny, TEXT), (tiny, asked), (small, small.prompt(ROWS))):
        run = lab.record(model, prompt, at=ROUTER)
        with frozen_routing(model, run, gates=gates):
            again = lab.record(model, prompt, at=ROUTER)
        assert torch.equal(again.logits, run.logits)
        assert all(torch.equal(again[name], run[name]) for name in run)


def test_steering_under_frozen_routes_sends_no_token_elsewhere(small):
    prompt = small.prompt(ROWS)
    run = lab.record(small, prompt, at=ROUTER)
    with steered(small, push(small)):
        free = lab.record(small, prompt, at=ROUTER)
        with frozen_routing(small, run):
            held = lab.record(small, prompt, at=[ROUTER, "layers.3.resid_post"])
        with frozen_routing(small, run, gates=False):
            open_gates = lab.record(small, prompt, at=ROUTER)
    mask = prompt.attention_mask.bool()
    kinds = {name: name.rsplit(".", 1)[1] for name in run}
    assert any(not torch.equal(free[name][mask], run[name][mask]) for name in run if kinds[name] == "indices")
    for name, kind in kinds.items():
        if kind == "indices":
            assert torch.equal(held[name], run[name])
            assert torch.equal(open_gates[name], run[name])
        if kind == "gates":
            assert torch.equal(held[name], run[name])
            logits = open_gates[name.replace("gates", "logits")]
            assert torch.equal(
                open_gates[name], torch.sigmoid(logits.gather(-1, run[name.replace("gates", "indices")]))
            )
    assert (held.logits - run.logits)[mask].abs().max() > 0.1
    assert (held.logits - free.logits)[mask].abs().max() > 1e-3


def test_another_text_of_the_same_length_takes_the_routes(tiny):
    run = lab.record(tiny, OTHER, at=ROUTER)
    with frozen_routing(tiny, run):
        held = lab.record(tiny, TEXT, at=INDICES)
    with lab.patched(tiny, {name: tensor for name, tensor in run.items() if not name.endswith("logits")}):
        by_hand = lab.record(tiny, TEXT)
    assert all(torch.equal(held[name], run[name]) for name in held)
    assert torch.equal(held.logits, by_hand.logits)


def test_only_the_chosen_layers_are_held(small):
    run = lab.record(small, small.prompt(ROWS), at=ROUTER)
    with steered(small, push(small)), frozen_routing(small, run, layers=[3]):
        held = lab.record(small, small.prompt(ROWS), at=INDICES)
    same = {name: torch.equal(held[name], run[name]) for name in held}
    assert same == {"layers.1.feed_forward.router.indices": False, "layers.3.feed_forward.router.indices": True}


@pytest.mark.parametrize("gates", [True, False])
def test_gradients_reach_the_residual_stream_but_not_through_held_gates(small, gates):
    run = lab.record(small, small.prompt(ROWS), at=ROUTER)
    at = ["layers.0.resid_post", "layers.1.feed_forward.router.logits"]
    with frozen_routing(small, run, gates=gates):
        graph = lab.record(small, small.prompt(ROWS), at=at, grad=True)
    graph.logits[:, -1].sum().backward()
    residual = graph[at[0]].grad
    assert residual is not None
    assert residual.any()
    through = graph[at[1]].grad
    assert (through is None or not through.any()) == gates


def test_generation_of_the_same_text_is_held_step_by_step(small):
    prompt = small.prompt(ROWS)
    run = lab.generate(small, prompt, max_new_tokens=9, at=ROUTER)
    with frozen_routing(small, run):
        again = lab.generate(small, prompt, max_new_tokens=9, at=ROUTER)
    assert torch.equal(again.prompt.input_ids, run.prompt.input_ids)
    assert torch.equal(again.logits, run.logits)
    with frozen_routing(small, run):
        uncached = lab.generate(small, prompt, max_new_tokens=9, use_cache=False)
    torch.testing.assert_close(uncached.logits, run.logits, atol=1e-4, rtol=1e-4)


def test_rows_of_a_generation_that_end_early_are_held_as_well(tiny):
    run = lab.generate(tiny, [TEXT, "The capital of France is"], max_new_tokens=12, at=ROUTER)
    assert "pad" in {kind for row in run.prompt.modality for kind in row[15:]}
    with frozen_routing(tiny, run):
        again = lab.generate(tiny, [TEXT, "The capital of France is"], max_new_tokens=12)
    assert torch.equal(again.logits, run.logits)


def test_generation_that_goes_on_beyond_the_run_or_leaves_its_text_is_refused(small):
    prompt = small.prompt(ROWS)
    run = lab.generate(small, prompt, max_new_tokens=9, at=ROUTER)
    with pytest.raises(ValueError, match=r"(?s)positions 0 to 14.*position 15\.\n.*fewer"), frozen_routing(small, run):
        lab.generate(small, prompt, max_new_tokens=12)
    with (
        pytest.raises(ValueError, match=r"position \d+ of the pass in row \d holds token \d+ instead of \d+"),
        steered(small, push(small)),
        frozen_routing(small, run),
    ):
        lab.generate(small, prompt, max_new_tokens=9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: run.cut(rows=[0, 1]), "a run of 2 rows, but the pass has 3"),
        (lambda run: run.cut(positions=slice(1, None)), "positions 1 to 6, but the pass has position 0"),
        (lambda run: run.cut(rows=[1, 1, 1]), "padding where the pass has tokens"),
    ],
)
def test_a_run_of_other_rows_or_positions_is_refused(small, change, message):
    run = change(lab.record(small, small.prompt(ROWS), at=ROUTER))
    with pytest.raises(ValueError, match=message), frozen_routing(small, run):
        lab.record(small, small.prompt(ROWS))


def test_a_shorter_text_has_to_be_a_beginning_of_the_run(small):
    run = lab.record(small, [ROWS[0]], at=ROUTER)
    with frozen_routing(small, run):
        begun = lab.record(small, [ROWS[0][:4]])
    torch.testing.assert_close(begun.logits, run.logits[:, :4], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="row 0 holds token 99 instead of 17"), frozen_routing(small, run):
        lab.record(small, [[5, 9, 99]])


def test_a_run_without_routes_is_refused_before_anything_runs(small, tiny, new_text_model):
    run = lab.record(small, [ROWS[0]], at=INDICES)
    with (
        pytest.raises(ValueError, match=r"does not have layers.1.feed_forward.router.gates"),
        frozen_routing(small, run),
    ):
        pass
    with frozen_routing(small, run, gates=False):
        lab.record(small, [ROWS[0]])
    message = "frozen in layer 2; the layers with a router are 1, 3"
    with pytest.raises(ValueError, match=message), frozen_routing(small, run, layers=[2]):
        pass
    dense = new_text_model(moe_layers=[])
    with pytest.raises(ValueError, match="are none"), frozen_routing(dense, lab.record(dense, [ROWS[0]])):
        pass


def test_a_block_in_which_nothing_ran_is_an_error(small):
    run = lab.record(small, [ROWS[0]], at=ROUTER)
    with pytest.raises(RuntimeError, match="no pass of the model ran"), frozen_routing(small, run):
        pass
