"""The second decoder, by bits whose meaning is written down here, and by what torch makes of them."""

import json

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from llama4lab.checkpoint.second.ggml_blocks import KNOWN, ggml_blocks
from llama4lab.checkpoint.second.raw_tensor import RawTensor
from llama4lab.checkpoint.second.reading import STRIP, SecondDecoder
from llama4lab.checkpoint.second.small_floats import E2M1, E4M3, E5M2
from llama4lab.checkpoint.shards import Shards

NAME = "model.layers.0.self_attn.q_proj.weight"
BASE = NAME.removesuffix(".weight")


@pytest.fixture
def decoded(tmp_path):
    """The numbers and the scheme of one matrix, from the tensors that are stored for it."""

    def decode(shape, **parts):
        stored = {f"{BASE}.{role.replace('__', '.')}": part for role, part in parts.items()}
        save_file(stored, tmp_path / "model.safetensors")
        matrix = SecondDecoder(Shards(tmp_path)).matrix(NAME, shape)
        assert matrix.shape == shape
        return torch.from_numpy(np.concatenate([strip for _, strip in matrix.strips()])), matrix.scheme

    return decode


def test_small_floats_are_those_of_torch():
    every = torch.arange(256, dtype=torch.uint8)
    for table, dtype in ((E4M3, torch.float8_e4m3fn), (E5M2, torch.float8_e5m2)):
        torch.testing.assert_close(torch.from_numpy(table), every.view(dtype).float(), rtol=0, atol=0, equal_nan=True)
    assert E2M1[:8].tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert E2M1[8:].tolist() == [-number for number in E2M1[:8].tolist()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_plain_numbers_are_those_of_torch(decoded, dtype):
    values = torch.randn(5, 12, dtype=torch.float64).to(dtype)
    numbers, scheme = decoded((5, 12), weight=values)
    assert torch.equal(numbers, values.double() if dtype == torch.float64 else values.float())
    assert scheme == "plain"


def test_the_first_of_eight_integers_is_in_the_lowest_bits(decoded):
    words = torch.tensor([[0x76543210, -0x01234568]], dtype=torch.int32)  # the second is 0xFEDCBA98
    numbers, scheme = decoded((1, 16), weight_packed=words, weight_scale=torch.tensor([[2.0]]))
    assert numbers.tolist() == [[2.0 * (value - 8) for value in range(16)]]
    assert scheme == "int4, groups of 16"


def test_groups_zero_points_and_the_order_of_columns_count(decoded):
    words = torch.full((8, 2), 0x11111111, dtype=torch.int32)
    scale = torch.arange(1, 17.0).reshape(8, 2)
    zeros = torch.tensor([[0x76543210, 0x11111111]], dtype=torch.int32)  # of 8 rows, the first in the lowest bits
    numbers, _ = decoded((8, 16), weight_packed=words, weight_scale=scale, weight_zero_point=zeros)
    assert numbers[:, 0].tolist() == [(1 - row) * scale[row, 0].item() for row in range(8)]
    assert not numbers[:, 8:].any()
    order = torch.tensor([1, 0] * 8, dtype=torch.int32)
    numbers, _ = decoded((8, 16), weight_packed=words, weight_scale=scale, weight_g_idx=order)
    assert numbers[3, :4].tolist() == [-7 * scale[3, 1].item(), -7 * scale[3, 0].item()] * 2


def test_a_scale_is_that_of_its_tensor_row_or_block(decoded):
    values = torch.randn(256, 384).to(torch.float8_e4m3fn)
    scales = {(): "tensor", (256,): "row", (256, 1): "row", (2, 3): "block of 128 x 128"}
    for shape, grain in scales.items():
        scale = torch.rand(shape)
        numbers, scheme = decoded((256, 384), weight=values, weight_scale=scale)
        assert scheme == f"float8_e4m3fn by {grain}"
        for row, column in ((0, 0), (127, 128), (128, 383), (255, 200)):
            own = scale if not shape else scale.flatten()[row] if shape != (2, 3) else scale[row // 128, column // 128]
            assert numbers[row, column] == values[row, column].float() * own
    numbers, _ = decoded((1, 2), weight=torch.tensor([[-128, 127]], dtype=torch.int8), weight_scale=torch.tensor(0.5))
    assert numbers.tolist() == [[-64, 63.5]]


def test_halves_of_bytes_come_in_the_order_of_their_format(decoded):
    pairs = torch.tensor([[0x21] * 8], dtype=torch.uint8)
    scale = torch.tensor([[2.0]]).to(torch.float8_e4m3fn)
    numbers, _ = decoded((1, 16), weight_packed=pairs, weight_scale=scale, weight_global_scale=torch.tensor([4.0]))
    assert numbers.tolist() == [[0.25, 0.5] * 8], "the low half first, divided by the global scale"
    numbers, _ = decoded((1, 16), weight=pairs, weight_scale=scale, weight_scale_2=torch.tensor(4.0))
    assert numbers.tolist() == [[4.0, 8.0] * 8], "the low half first, times the second scale"
    words = torch.tensor([[0x21212121]], dtype=torch.int64).to(torch.uint32)
    affine = {"scales": torch.tensor([[3.0]]), "biases": torch.tensor([[0.5]])}
    numbers, scheme = decoded((1, 8), weight=words, **affine)
    assert (numbers.tolist(), scheme) == ([[3.5, 6.5] * 4], "affine int4, groups of 8")


def test_blocks_of_bitsandbytes_run_across_rows(tmp_path):
    state = {"quant_type": "nf4", "blocksize": 4, "shape": [2, 6], "nested_blocksize": 2, "nested_offset": 0.5}
    parts = {
        "weight": torch.tensor([[0x21]] * 6, dtype=torch.uint8),
        "weight.quant_map": torch.arange(16.0),
        "weight.absmax": torch.tensor([0, 1, 2], dtype=torch.uint8),
        "weight.nested_quant_map": torch.arange(256.0),
        "weight.nested_absmax": torch.tensor([1.0, 10.0]),
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }
    save_file({f"{BASE}.{role}": part for role, part in parts.items()}, tmp_path / "model.safetensors")
    ((_, numbers),) = SecondDecoder(Shards(tmp_path)).matrix(NAME, (2, 6)).strips()
    largest = [0.5, 1.5, 20.5]  # of numbers 0 to 3, 4 to 7 and 8 to 11
    wanted = [[2, 1][place % 2] * largest[place // 4] for place in range(12)]
    assert numbers.flatten().tolist() == wanted


@pytest.mark.parametrize("kind", [*KNOWN, "Q3_K", "IQ4_XS", "MXFP4"])
def test_blocks_of_gguf_are_those_of_the_gguf_package(kind):
    number = gguf.GGMLQuantizationType[kind]
    width, size = gguf.GGML_QUANT_SIZES[number]
    blocks = np.random.default_rng(0).integers(0, 256, (5, 512 // width, size), dtype=np.uint8)
    # Any two bytes that a float16 can be in are made small numbers, so that none is infinite.
    blocks[..., 1::2] = blocks[..., 1::2] & 0xBF
    raw = RawTensor(blocks.reshape(5, -1), "uint8")
    formula = ggml_blocks(raw, 512, kind)
    numbers = formula.at(np.arange(1, 5)[:, None], np.arange(512)[None])
    with np.errstate(all="ignore"):
        wanted = gguf.quants.dequantize(raw.bits, number)[1:]
    assert np.array_equal(numbers, wanted)
    assert formula.scheme == f"GGUF {kind}"


@pytest.mark.parametrize("unfused", [False, True])
def test_experts_are_found_fused_and_unfused_under_either_name(make, tmp_path, text_only, unfused):
    tensors = make.tensors(text_only)
    stored = make.unfused(tensors) if unfused else tensors
    folder = make.saved(tmp_path / "made", text_only, {f"language_model.{n}": t for n, t in stored.items()})
    files = Shards(folder)
    for name, values in tensors.items():
        each = enumerate(values) if values.ndim == 3 else [(None, values)]
        for expert, own in each:
            matrix = SecondDecoder(files).matrix(name, tuple(values.shape), expert)
            numbers = np.concatenate([strip for _, strip in matrix.strips()])
            wanted = (own.T if expert is not None else own).float().reshape(matrix.shape)
            assert np.array_equal(numbers, wanted.numpy()), name


def test_large_matrices_come_in_strips(decoded, tmp_path):
    values = torch.randn(2100, 1024).bfloat16()
    numbers, _ = decoded(tuple(values.shape), weight=values)
    assert torch.equal(numbers, values.float())
    strips = list(SecondDecoder(Shards(tmp_path)).matrix(NAME, tuple(values.shape)).strips())
    assert [first for first, _ in strips] == [0, 1024, 2048]
    assert all(strip.size <= STRIP for _, strip in strips)


def test_what_is_stored_otherwise_is_refused(tmp_path):
    save_file(
        {NAME: torch.zeros(3, 4), f"{BASE}.bias": torch.zeros(4, dtype=torch.bool)}, tmp_path / "model.safetensors"
    )
    files = Shards(tmp_path)
    with pytest.raises(ValueError, match=r"has shape \[3, 4\]; 4 x 4 were expected"):
        SecondDecoder(files).matrix(NAME, (4, 4))
    with pytest.raises(KeyError, match="stored in no way that the second decoder knows"):
        SecondDecoder(files).matrix(NAME.replace("q_proj", "k_proj"), (3, 4))
    with pytest.raises(ValueError, match="stored as bool, for which there is no second decoder"):
        SecondDecoder(files).matrix(f"{BASE}.bias", (4,))
