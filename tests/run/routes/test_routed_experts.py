"""Routes as arrays: what engines give is read, written and replayed."""

import base64
import io

import numpy as np
import pytest
import torch

import llama4lab as lab
from llama4lab.run.routes.replay import run_of_routes
from llama4lab.run.routes.rerouting import rerouted
from llama4lab.run.routes.routed_experts import RoutedExperts
from llama4lab.run.steering import steered

ROWS = [[5, 9, 17, 3, 8, 44, 21], [7, 7, 2], [90, 14, 33, 6, 60]]
ROUTER = "layers.*.feed_forward.router.*"
INDICES = "feed_forward.router.indices"


@pytest.fixture(scope="module")
def routes(small) -> RoutedExperts:
    return RoutedExperts.from_run(lab.record(small, [ROWS[0]], at=ROUTER))


def npy(array: np.ndarray) -> str:
    file = io.BytesIO()
    np.save(file, array)
    return base64.b64encode(file.getvalue()).decode()


def push(model):
    return {"layers.0.resid_post": 3 * torch.randn(64, generator=torch.Generator().manual_seed(0))}


def test_the_routes_of_a_row_are_those_of_its_tokens_without_padding(small):
    run = lab.record(small, small.prompt(ROWS), at=ROUTER)
    for row, ids in enumerate(ROWS):
        routes = RoutedExperts.from_run(run, row)
        assert routes.token_ids is not None
        assert routes.token_ids.tolist() == ids
        assert routes.experts.shape == (len(ids), 2, 2)
        for column, layer in enumerate((1, 3)):
            expected = run[f"layers.{layer}.{INDICES}"][row, 7 - len(ids) :]
            assert routes.experts[:, column].tolist() == expected.tolist()


def test_what_is_written_as_an_engine_would_is_read_back(small, routes):
    vllm, sglang = routes.to_vllm(), routes.to_sglang()
    assert vllm.shape == (7, 4, 2)
    assert vllm.dtype == np.uint8
    assert (vllm[:, [0, 2]] == 0).all()  # the dense layers
    flat = np.frombuffer(base64.b64decode(sglang), dtype=np.int32)
    assert np.array_equal(flat.reshape(7, 4, 2), vllm)
    readings = [
        *(RoutedExperts.from_vllm(form, small) for form in (vllm, vllm.tolist(), npy(vllm), vllm[:, [1, 3]])),
        RoutedExperts.from_vllm(vllm[4:, [1, 3]], small, prompt=vllm[:4, [1, 3]].astype(np.int16).tolist()),
        *(RoutedExperts.from_sglang(form, small) for form in (sglang, flat, torch.from_numpy(flat.copy()), vllm)),
    ]
    for read in readings:
        assert np.array_equal(read.experts, routes.experts)
        assert read.layers == [1, 3]
        assert (read.num_layers, read.num_experts, read.top_k) == (4, 4, 2)
        assert np.array_equal(read.to_vllm(), vllm)


def test_the_route_that_engines_leave_out_and_a_cached_beginning_are_unknown(small, routes):
    ids = ROWS[0]
    short = RoutedExperts.from_vllm(routes.to_vllm()[:-1], small, token_ids=ids)
    assert short.experts[-1].tolist() == [[-1, -1], [-1, -1]]
    assert np.array_equal(short.experts[:-1], routes.experts[:-1])
    late = RoutedExperts.from_sglang(routes.to_vllm()[3:-1], small, start=3, token_ids=torch.tensor(ids))
    assert (late.experts[[0, 1, 2, 6]] == -1).all()
    assert np.array_equal(late.experts[3:6], routes.experts[3:6])
    assert "4 tokens with unknown routes" in repr(late)
    cached = RoutedExperts.from_vllm(late.to_vllm(), small)
    assert cached.to_vllm().dtype == np.int16
    assert np.array_equal(cached.experts, late.experts)


def test_routes_of_one_row_or_several_are_replayed_token_by_token(small):
    prompt = small.prompt(ROWS)
    run = lab.record(small, prompt, at=ROUTER)
    routes = [RoutedExperts.from_run(run, row) for row in range(3)]
    with rerouted(small, replay=routes):
        assert torch.equal(lab.record(small, prompt).logits, run.logits)
    with steered(small, push(small)):
        free = lab.record(small, prompt, at=ROUTER)
        with rerouted(small, replay=routes):
            held = lab.record(small, prompt, at=ROUTER)
        with rerouted(small, replay=routes[1]):  # the padding of the row is another now
            alone = lab.record(small, [ROWS[1]], at=ROUTER)
    mask, name = prompt.attention_mask.bool(), f"layers.3.{INDICES}"
    assert not torch.equal(free[name][mask], run[name][mask])
    assert torch.equal(held[name][mask], run[name][mask])
    assert torch.equal(alone[name][0], run[name][1, 4:])
    gates = torch.sigmoid(held[name.replace("indices", "logits")].gather(-1, held[name]))
    assert torch.equal(held[name.replace("indices", "gates")], gates)


def test_an_array_that_is_one_token_short_leaves_the_last_token_to_the_router(small, routes):
    plain = lab.record(small, [ROWS[0]], at=ROUTER)
    other = (routes.experts + 1) % 4
    short = RoutedExperts(other[:-1], [1, 3], 4, 4)
    with rerouted(small, replay=short):
        run = lab.record(small, [ROWS[0]], at=ROUTER)
    for column, layer in enumerate((1, 3)):
        name = f"layers.{layer}.feed_forward.router"
        assert run[f"{name}.indices"][0, :-1].tolist() == other[:-1, column].tolist()
        assert torch.equal(run[f"{name}.indices"][0, -1], torch.topk(run[f"{name}.logits"][0, -1], 2).indices)
    assert not torch.equal(run.logits, plain.logits)
    with (
        pytest.raises(ValueError, match=r"(?s)Row 0 has routes for 5 tokens, but its token 6 .*last token may lack"),
        rerouted(small, replay=RoutedExperts(other[:5], [1, 3], 4, 4)),
    ):
        lab.record(small, [ROWS[0]])
    with rerouted(small, replay=RoutedExperts(other[:5], [1, 3], 4, 4), positions=slice(0, 5)):
        lab.record(small, [ROWS[0]])


def test_a_generation_is_replayed_from_the_routes_that_an_engine_gives_for_it(small, tiny):
    for model, content in ((small, small.prompt(ROWS)), (tiny, ["The capital of France is", "When Mary and"])):
        run = lab.generate(model, content, max_new_tokens=9, at=ROUTER)
        rows = len(run.prompt)
        routes = [RoutedExperts.from_run(run, row) for row in range(rows)]
        lengths = run.prompt.attention_mask.sum(1).tolist()
        assert all(len(own) in (length - 1, length) for own, length in zip(routes, lengths, strict=True))
        routes = [RoutedExperts.from_sglang(own.to_sglang(), model) for own in routes]
        with rerouted(model, replay=routes):
            again = lab.generate(model, content, max_new_tokens=9, at=ROUTER)
            whole = lab.record(model, run.prompt)
        assert torch.equal(again.prompt.input_ids, run.prompt.input_ids)
        assert torch.equal(again.logits, run.logits)
        valid = run.prompt.attention_mask.bool()[:, run.logit_positions]
        expected, found = run.logits[valid], whole.logits[:, run.logit_positions][valid]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="generate fewer tokens"), rerouted(small, replay=routes_of(small)):
        lab.generate(small, [ROWS[0]], max_new_tokens=4)


def routes_of(model) -> RoutedExperts:
    run = lab.record(model, [ROWS[0]], at=ROUTER)
    return RoutedExperts(RoutedExperts.from_run(run).experts, [1, 3], 4, 4)


def test_routes_of_an_image_and_its_question_are_replayed(tiny, asked):
    run = lab.record(tiny, asked, at=ROUTER)
    routes = RoutedExperts.from_vllm(RoutedExperts.from_run(run).to_vllm(), tiny)
    with rerouted(tiny, replay=routes):
        assert torch.equal(lab.record(tiny, asked).logits, run.logits)


def test_routes_become_a_run_that_tables_read(small):
    prompt = small.prompt(ROWS)
    run = lab.record(small, prompt, at=ROUTER)
    routes = [RoutedExperts.from_run(run, row) for row in range(3)]
    back = run_of_routes(small, prompt, routes)
    assert back.positions == list(range(7))
    mask = prompt.attention_mask.bool()
    for name, tensor in back.items():
        assert torch.equal(tensor[mask], run[name][mask])
    short = [RoutedExperts(own.experts[:-1], own.layers, 4, 4) for own in routes]
    assert run_of_routes(small, prompt, short).positions == list(range(6))
    load = lab.tables.routing.expert_load(back)
    assert load.equals(lab.tables.routing.expert_load(run))


def test_saved_routes_are_loaded_again(small, routes, tmp_path):
    path = tmp_path / "routes.npz"
    routes.save(path)
    loaded = RoutedExperts.load(path)
    assert np.array_equal(loaded.experts, routes.experts)
    assert loaded.token_ids is not None
    assert loaded.token_ids.tolist() == ROWS[0]
    assert (loaded.layers, loaded.num_layers, loaded.num_experts) == ([1, 3], 4, 4)
    assert [file.name for file in tmp_path.iterdir()] == ["routes.npz"]
    np.savez(tmp_path / "other.npz", x=np.zeros(2))
    (tmp_path / "text.npz").write_text("no archive")
    for name in ("other.npz", "text.npz"):
        with pytest.raises(ValueError, match="holds no routed experts"):
            RoutedExperts.load(tmp_path / name)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda m: RoutedExperts(np.zeros((2, 3, 1), int), [1, 3], 4, 4),
            r"shape \[2, 3, 1\] were given for the layers",
        ),
        (lambda m: RoutedExperts(np.full((2, 1, 1), 4), [1], 4, 4), r"Token 0 goes to \[4\] in layer 1; .* 0 to 3"),
        (lambda m: RoutedExperts(np.full((2, 1, 2), 1), [3], 4, 4), r"goes to \[1, 1\] in layer 3; its slots need"),
        (lambda m: RoutedExperts(np.array([[[1, -1]]]), [3], 4, 4), "-1 in every slot"),
        (
            lambda m: RoutedExperts(np.array([[[1]]]), [3], 4, 4, np.array([1, 2])),
            "1 tokens .* with 2 token ids",
        ),
        (
            lambda m: RoutedExperts.from_vllm(np.zeros((3, 5, 2), int), m),
            "of 5 layers were given; the model has 4",
        ),
        (lambda m: RoutedExperts.from_vllm(np.ones((3, 4, 2), int), m), r"Routes in some of the layers \[0, 2\]"),
        (lambda m: RoutedExperts.from_vllm(np.zeros((3, 4), int), m), r"vLLM gives \[token, layer, slot\]"),
        (lambda m: RoutedExperts.from_vllm(np.zeros((3, 4, 2)), m), "float64 was given"),
        (lambda m: RoutedExperts.from_vllm("AAAA", m), "no base64 of a .npy file"),
        (lambda m: RoutedExperts.from_vllm("!", m), "is no base64"),
        (lambda m: RoutedExperts.from_sglang(np.zeros(9, np.int32), m), "(?s)9 numbers were given.*multiple of 8"),
        (lambda m: RoutedExperts.from_sglang(np.zeros((3, 4), int), m), r"SGLang gives \[token, layer, slot\]"),
    ],
)
def test_arrays_that_are_no_routes_of_the_model_are_refused(small, make, message):
    with pytest.raises(ValueError, match=message):
        make(small)


def test_routes_that_do_not_fit_the_pass_are_refused(small, tiny, routes):
    with (
        pytest.raises(ValueError, match="Routes of 1 rows were given; the prompt has 3"),
        rerouted(small, replay=routes),
    ):
        lab.record(small, small.prompt(ROWS))
    with (
        pytest.raises(ValueError, match=r"(?s)a text whose token 2 is 17; here it is 18.*without token_ids"),
        rerouted(small, replay=routes),
    ):
        lab.record(small, [[5, 9, 18, 3, 8, 44, 21]])
    with pytest.raises(ValueError, match="a model of 4 layers and 4 experts"), rerouted(tiny, replay=routes):
        pass
    one = RoutedExperts(routes.experts[..., :1], [1, 3], 4, 4)
    with pytest.raises(ValueError, match=r"\[1, 2\] experts a token"), rerouted(small, replay=[one, routes]):
        pass
    part = RoutedExperts(routes.experts[:, :1], [1], 4, 4)
    with pytest.raises(ValueError, match=r"Layer 3 was to be replayed, but .* \[1\]"):  # noqa: SIM117
        with rerouted(small, replay=part, layers=3):
            pass
    with rerouted(small, replay=part):
        lab.record(small, [ROWS[0]])
    with rerouted(small, replay=one):
        assert lab.record(small, [ROWS[0]], at=f"layers.1.{INDICES}")[f"layers.1.{INDICES}"].shape[-1] == 1
    run = lab.record(small, [ROWS[0]], at=ROUTER).cut(positions=slice(2, None))
    with pytest.raises(ValueError, match="lacks position 0 of row 0"):
        RoutedExperts.from_run(run)
