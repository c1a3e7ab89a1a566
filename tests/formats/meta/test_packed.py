"""Meta's fp8 and int4: experts stay packed, and are the numbers that Meta's formulas give."""

import pytest
import torch

import llama4lab as lab
from llama4lab.checkpoint.meta.files import MetaFiles
from llama4lab.checkpoint.schemes.signed_nibbles import SignedNibbles
from llama4lab.model.packed_linear import PackedLinear

FORMS = [("fp8", 1), ("fp8", 2), ("int4", 1), ("int4", 2)]
ERROR = {"fp8": 0.05, "int4": 0.2}


@pytest.fixture(params=FORMS, ids=str)
def packed(request, write, wide_model):
    """A checkpoint, and the model that it was rounded from."""
    method, ranks = request.param
    model = wide_model()
    return write(model, ranks, method), model, method


def dense_twin(model):
    twin = type(model)(model.config).eval()
    twin.load_state_dict(model.state_dict())
    return twin


def by_the_formula(folder, layer: int, key: str, ranks: int, method: str) -> torch.Tensor:
    """[expert, out, in] of one projection, decoded as a whole from what torch.load gives."""
    names = {"w1": "moe_w_in_eD_F", "w3": "moe_w_swiglu_eD_F", "w2": "moe_w_out_eF_D"}
    start, made = f"layers.{layer}.feed_forward.experts.", []
    for rank in range(ranks):
        held = torch.load(folder / f"consolidated.{rank:02d}.pth", weights_only=False)
        scales = torch.load(folder / f"{method}_scales_{rank}.pt")[start + key]
        stored = held[start + names[key]].unflatten(0, (scales.shape[0], -1)).mT
        if method == "fp8":
            made.append(stored.float() * scales[..., None])
            continue
        number = stored.view(torch.int8).int()
        low, high = (number & 15) - 16 * (number & 8 != 0), number >> 4
        values = torch.stack([low, high], -1).flatten(-2).float()
        made.append((values.unflatten(-1, (scales.shape[1], -1)) * scales.mT[..., None]).flatten(-2))
    return torch.cat(made, dim=2 if key == "w2" else 1)


def test_experts_are_those_of_the_formulas(packed, experts_of):
    folder, source, method = packed
    model, ranks = lab.load(folder), MetaFiles(folder).ranks
    for layer in (1, 3):
        experts = experts_of(model, layer)
        gate, up, down = (by_the_formula(folder, layer, key, ranks, method) for key in ("w1", "w3", "w2"))
        ours = experts_of(source, layer)
        for expert in range(4):
            assert experts.gate_up_proj[expert].equal(torch.cat([gate[expert], up[expert]]).T)
            assert experts.down_proj[expert].equal(down[expert].T)
            off = (experts.down_proj[expert] - ours.down_proj[expert]).norm() / ours.down_proj[expert].norm()
            assert 0.001 < off < ERROR[method]


@torch.no_grad()
def test_logits_are_those_of_the_dense_model(packed, image_batch):
    model = lab.load(packed[0])
    batch = image_batch([[2], [1]])
    logits = model(**batch).logits
    torch.testing.assert_close(logits, dense_twin(model)(**batch).logits, rtol=0, atol=1e-5)
    assert logits.std() > 0.1


@pytest.mark.parametrize("method", ["fp8", "int4"])
def test_gradients_reach_activations_and_are_those_of_the_dense_model(write, wide_model, method, random_ids):
    model = lab.load(write(wide_model(), 2, method))
    found = []
    for each in (model, dense_twin(model)):
        embedded = each.text.embed_tokens(random_ids(2, 14)).detach().requires_grad_()
        each(inputs_embeds=embedded).logits[:, -1, 5].sum().backward()
        found.append(embedded.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5 * found[1].abs().max().item())


@torch.no_grad()
def test_only_experts_are_packed_and_they_take_less(packed, random_ids):
    folder, _, method = packed
    model = lab.load(folder, experts="offload")
    assert not [module for module in model.modules() if isinstance(module, PackedLinear)]
    ids = random_ids(1, 3)
    run = lab.record(model, ids, at="layers.*.feed_forward.router.indices")
    used = sum(len(chosen.unique()) for chosen in run.layers("feed_forward.router.indices").values())
    numbers = 3 * 128 * 256
    scales = {"fp8": 4 * (2 * 256 + 128 * MetaFiles(folder).ranks), "int4": 4 * numbers // 128}[method]
    each = numbers // (2 if method == "int4" else 1) + scales
    assert model.store is not None
    assert model.store.traffic.bytes_read == used * each
    torch.testing.assert_close(model(ids).logits, lab.load(folder)(ids).logits, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("method", ["fp8", "int4"])
def test_layers_that_stayed_plain_are_exact(write, wide_model, experts_of, method, random_ids):
    model = wide_model(num_hidden_layers=4, interleave_moe_layer_step=1, dtype=torch.bfloat16)
    loaded = lab.load(write(model, 2, method, kept=(0, 3)))
    for layer in range(4):
        ours, theirs = (experts_of(each, layer).down_proj[2] for each in (model, loaded))
        assert torch.equal(ours.float(), theirs) == (layer in (0, 3))
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(random_ids(2, 9)).logits, dense_twin(loaded)(random_ids(2, 9)).logits, rtol=0, atol=1e-5
        )


def test_every_byte_stands_for_two_numbers_in_twos_complement():
    every = torch.arange(256, dtype=torch.uint8).reshape(2, 128)
    scale = torch.tensor([[0.5, 2.0], [1.0, 3.0]])
    made = SignedNibbles(128).dense({"weight": every, "weight_scale": scale}, (2, 256))
    for row, column in ((0, 0), (0, 255), (1, 17), (1, 200)):
        byte = int(every[row, column // 2])
        nibble = byte >> 4 if column % 2 else byte & 15
        number = nibble - 16 if nibble > 7 else nibble
        assert made[row, column] == number * scale[row, column // 128]
    assert made.unique().numel() > 40
