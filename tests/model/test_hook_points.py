"""Walks every hook point of small models with text and images, dense and routed layers, one and two experts a token."""

from functools import cache

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

LAYERS, MOE_LAYERS, VISION_LAYERS = 4, (1, 3), 2

ATTENTION = {
    "resid_pre": "batch seq d_model",
    "self_attn.q": "batch seq head d_head",
    "self_attn.k": "batch seq kv_head d_head",
    "self_attn.v": "batch seq kv_head d_head",
    "self_attn.q_rot": "batch seq head d_head",
    "self_attn.k_rot": "batch seq kv_head d_head",
    "self_attn.scores": "batch head query key",
    "self_attn.pattern": "batch head query key",
    "self_attn.z": "batch seq head d_head",
    "self_attn.head_out": "batch seq head d_model",
    "self_attn.out": "batch seq d_model",
    "resid_mid": "batch seq d_model",
}
DENSE = {"feed_forward.hidden": "batch seq d_ff", "feed_forward.out": "batch seq d_model"}
ROUTED = {
    "feed_forward.router.logits": "batch seq expert",
    "feed_forward.router.indices": "batch seq slot",
    "feed_forward.router.gates": "batch seq slot",
    "feed_forward.experts.hidden": "batch seq slot d_ff",
    "feed_forward.experts.out": "batch seq slot d_model",
    "feed_forward.shared_expert.hidden": "batch seq d_ff",
    "feed_forward.shared_expert.out": "batch seq d_model",
    "feed_forward.out": "batch seq d_model",
}
VISION = {
    "resid_pre": "tile patch d_vision",
    "self_attn.q": "tile patch head d_head",
    "self_attn.k": "tile patch head d_head",
    "self_attn.v": "tile patch head d_head",
    "self_attn.q_rot": "tile patch head d_head",
    "self_attn.k_rot": "tile patch head d_head",
    "self_attn.scores": "tile head query key",
    "self_attn.pattern": "tile head query key",
    "self_attn.z": "tile patch head d_head",
    "self_attn.out": "tile patch d_vision",
    "resid_mid": "tile patch d_vision",
    "mlp.hidden": "tile patch d_ff",
    "mlp.out": "tile patch d_vision",
    "resid_post": "tile patch d_vision",
}


def contract() -> dict[str, str]:
    """Every hook point that the models of this file must have -> its shape in words, in the order of the pass."""
    points = {"vision_model.patch_embed": "tile patch d_vision", "vision_model.embed": "tile patch d_vision"}
    for layer in range(VISION_LAYERS):
        points |= {f"vision_model.layers.{layer}.{name}": shape for name, shape in VISION.items()}
    points |= {
        "vision_model.final_norm": "tile patch d_vision",
        "vision_model.shuffled": "tile image_token d_shuffled",
        "vision_model.adapter": "tile image_token d_adapter",
        "image_features": "tile image_token d_model",
        "embed": "batch seq d_model",
        "embed_merged": "batch seq d_model",
    }
    for layer in range(LAYERS):
        feed_forward = ROUTED if layer in MOE_LAYERS else DENSE
        family = ATTENTION | feed_forward | {"resid_post": "batch seq d_model"}
        points |= {f"layers.{layer}.{name}": shape for name, shape in family.items()}
    return points | {"final_norm": "batch seq d_model", "logits": "batch seq vocab"}


POINTS = contract()
LAZY = [name for name in POINTS if name.endswith((".scores", ".pattern", ".head_out", ".experts.hidden"))]

# All sizes differ, so that no two words can be taken for each other.
SIZES = {"batch": 2, "seq": 15, "query": 15, "key": 15, "head": 6, "kv_head": 3, "d_head": 10, "d_model": 64}
SIZES |= {"expert": 5, "vocab": 128, "d_ff": 48}
VISION_SIZES = {"tile": 3, "patch": 17, "query": 17, "key": 17, "head": 4, "d_head": 8, "d_vision": 32, "d_ff": 128}
VISION_SIZES |= {"image_token": 4, "d_shuffled": 128, "d_adapter": 40, "d_model": 64}
DENSE_D_FF, NUM_PATCHES = 80, 16


def declared_size(name: str, word: str, slots: int) -> int:
    if name == "vision_model.patch_embed" and word == "patch":
        return NUM_PATCHES  # the class token is not there yet
    if name.endswith("feed_forward.hidden"):
        return {**SIZES, "d_ff": DENSE_D_FF}[word]
    if name.startswith("vision_model") or name == "image_features":
        return VISION_SIZES[word]
    return {**SIZES, "slot": slots}[word]


@pytest.fixture(scope="module", params=[1, 2], ids=["top-1", "top-2"])
def slots(request) -> int:
    return request.param


@pytest.fixture(scope="module")
def model(slots, new_model):
    return new_model(
        num_hidden_layers=LAYERS,
        num_experts_per_tok=slots,
        num_attention_heads=SIZES["head"],
        num_key_value_heads=SIZES["kv_head"],
        head_dim=SIZES["d_head"],
        num_local_experts=SIZES["expert"],
        vision={"num_attention_heads": VISION_SIZES["head"]},
    )


@pytest.fixture(scope="module")
def inputs(image_batch) -> dict[str, torch.Tensor]:
    """Row 0 has one tile and four tokens of text more, row 1 two tiles; the sequences cross a chunk border."""
    batch = image_batch([[2], [1]])
    batch["input_ids"][1, :5] = torch.arange(20, 25)  # text where the padding was
    assert batch["input_ids"].shape == (2, 15)
    return {"input_ids": batch["input_ids"], "pixel_values": batch["pixel_values"]}


@torch.no_grad()
def logits_with(model, inputs, hooks: dict) -> torch.Tensor:
    """The logits of a run in which each named hook point has a torch hook `(module, args, output)`."""
    handles = [model.hook_points().module(name).register_forward_hook(hook) for name, hook in hooks.items()]
    try:
        return model(**inputs).logits
    finally:
        for handle in handles:
            handle.remove()


@pytest.fixture(scope="module")
def plain(model, inputs) -> torch.Tensor:
    return logits_with(model, inputs, {})


@pytest.fixture(scope="module")
def reading(model, inputs):
    """Gives the logits of a run in which somebody only reads the named hook point."""
    return cache(lambda name: logits_with(model, inputs, {name: lambda module, args, x: None}))


def disturbed(name: str, x: torch.Tensor) -> torch.Tensor:
    """Another value that the hook point may hold."""
    if name.endswith("router.indices"):
        return (x + 1) % SIZES["expert"]
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    return (x * (1 + 0.5 * noise.abs())) if name.endswith(".pattern") else x + 0.5 * noise


def test_the_catalogue_is_the_contract_in_the_order_of_the_pass(model):
    assert dict(model.hook_points()) == POINTS
    assert list(model.hook_points()) == list(POINTS)
    assert [name for name in POINTS if model.hook_points().module(name).lazy] == LAZY


@pytest.mark.parametrize("name", POINTS)
def test_it_fires_once_with_the_declared_shape(name, model, inputs, slots):
    seen = []
    logits_with(model, inputs, {name: lambda module, args, x: seen.append(x.shape)})
    assert seen == [tuple(declared_size(name, word, slots) for word in POINTS[name].split())]


@pytest.mark.parametrize("name", POINTS)
def test_replacing_it_with_itself_gives_the_bits_of_a_run_that_reads_it(name, model, inputs, reading):
    same = logits_with(model, inputs, {name: lambda module, args, x: x})
    copy = logits_with(model, inputs, {name: lambda module, args, x: x.clone()})
    assert torch.equal(same, reading(name))
    assert torch.equal(copy, reading(name))


@pytest.mark.parametrize("name", POINTS)
def test_reading_it_leaves_the_logits_as_they_are(name, plain, reading):
    if name in LAZY:  # computed step by step now
        torch.testing.assert_close(reading(name), plain, atol=1e-5, rtol=0)
    else:
        assert torch.equal(reading(name), plain)


@pytest.mark.parametrize("name", POINTS)
def test_disturbing_it_changes_the_logits_of_every_row(name, model, inputs, plain):
    changed = logits_with(model, inputs, {name: lambda module, args, x: disturbed(name, x)})
    assert changed.isfinite().all()
    assert ((changed - plain).abs().amax((1, 2)) > 1e-3).all()


@pytest.mark.parametrize("name", POINTS)
def test_disturbing_row_0_leaves_row_1_as_it_was(name, model, inputs, plain):
    # Row 0 owns the first two tiles. Groups of tokens at an expert change, so sums may differ in the last bits.
    own = slice(0, 2) if POINTS[name].startswith("tile") else slice(0, 1)

    def disturb(module, args, x):
        x = x.clone()
        x[own] = disturbed(name, x)[own]
        return x

    changed = logits_with(model, inputs, {name: disturb})
    assert (changed[0] - plain[0]).abs().max() > 1e-3
    torch.testing.assert_close(changed[1], plain[1], atol=1e-5, rtol=0)


def test_nothing_is_modified_after_a_hook_point_has_seen_it(model, inputs):
    seen, copies = {}, {}

    def keep(name):
        def hook(module, args, x):
            seen[name], copies[name] = x, x.clone()

        return hook

    before = {name: value.clone() for name, value in inputs.items()}
    logits_with(model, inputs, {name: keep(name) for name in POINTS})
    assert set(seen) == set(POINTS)
    assert [name for name in POINTS if not torch.equal(seen[name], copies[name])] == []
    assert all(torch.equal(inputs[name], before[name]) for name in inputs)


def test_all_hook_points_fire_in_the_order_of_the_catalogue(model, inputs):
    order = []
    logits_with(model, inputs, {name: lambda module, args, x, name=name: order.append(name) for name in POINTS})
    assert order == list(POINTS)


class OutputShapes(TorchDispatchMode):
    """Notes the shape of every tensor that an operation gives."""

    def __init__(self):
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        results = result if isinstance(result, (tuple, list)) else [result]
        self.shapes |= {tuple(x.shape) for x in results if isinstance(x, torch.Tensor)}
        return result


@pytest.mark.parametrize("name", LAZY)
def test_a_lazy_one_is_computed_only_where_somebody_listens(name, model, inputs, slots):
    shape = tuple(declared_size(name, word, slots) for word in POINTS[name].split())
    with OutputShapes() as unheard:
        logits_with(model, inputs, {})
    with OutputShapes() as heard:
        logits_with(model, inputs, {name: lambda module, args, x: None})
    assert shape not in unheard.shapes
    assert shape in heard.shapes


def test_an_unknown_name_is_an_error_with_near_names(model):
    with pytest.raises(KeyError, match=r"layers\.1\.self_attn\.pattern"):
        model.hook_points().module("layers.1.self_attn.patern")
