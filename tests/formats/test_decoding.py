"""One matrix in each format: our decoder gives the numbers that the format's own library gives."""

import pytest
import torch
from safetensors.torch import save_file

from llama4lab.checkpoint.recognition import Recognition
from llama4lab.checkpoint.schemes.encoding import encoded, packed
from llama4lab.checkpoint.schemes.integers import PackedIntegers, unpacked
from llama4lab.checkpoint.shards import Shards

BASE = "model.layers.1.feed_forward.experts.3.up_proj"


def decoded(folder, parts, shape):
    (folder / "config.json").write_text("{}")
    save_file({f"{BASE}.{name}": part.contiguous() for name, part in parts.items()}, folder / "model.safetensors")
    shards = Shards(folder)
    matrix = Recognition(shards).linear(BASE, shape)
    assert matrix is not None
    assert torch.equal(
        matrix.dense(matrix.read(shards), torch.float32), matrix.dense(matrix.mapped(shards), torch.float32)
    )
    return matrix, matrix.dense(matrix.read(shards), torch.float32), shards


@pytest.mark.parametrize("shape", [(128, 256), (72, 128), (256, 384)])
def test_the_numbers_are_those_of_the_formats_own_library(tmp_path, write, shape):
    values = 0.1 * torch.randn(shape)
    written = write(values)
    matrix, numbers, shards = decoded(tmp_path, written.parts, shape)
    assert matrix.shape == numbers.shape == shape
    # Ours are not rounded to bfloat16; rounded, they are equal to the bit.
    assert torch.equal(numbers.to(written.numbers.dtype), written.numbers)
    assert (numbers - values).norm() < 0.2 * values.norm()
    assert matrix.nbytes(shards) < 0.6 * 4 * values.numel()


@pytest.mark.parametrize(("method", "error"), [("int8", 0.008), ("int4", 0.12), ("fp8", 0.03)])
@pytest.mark.parametrize("shape", [(40, 256), (16, 96)])
def test_what_is_encoded_here_is_decoded_by_compressed_tensors(tmp_path, method, error, shape):
    values = torch.randn(shape)
    values[3] = 0
    parts, scheme = encoded(values, method)
    matrix, numbers, _ = decoded(tmp_path, parts, shape)
    assert matrix.scheme == scheme
    assert (numbers - values).norm() < error * values.norm()
    assert not numbers[3].any()
    compressors = pytest.importorskip("compressed_tensors.compressors").BaseCompressor
    quantization = pytest.importorskip("compressed_tensors.quantization")
    preset, format = {"int8": ("W8A16", "pack-quantized"), "int4": ("W4A16", "pack-quantized")}.get(
        method, ("FP8_DYNAMIC", "float-quantized")
    )
    settings = quantization.preset_name_to_scheme(preset, ["Linear"])
    if isinstance(scheme, PackedIntegers):
        settings.weights.group_size = scheme.group
    theirs = compressors.get_value_from_registry(format).decompress(dict(parts), settings)["weight"]
    assert torch.equal(numbers.to(theirs.dtype), theirs)


def test_rounding_is_to_the_nearest(tmp_path):
    values = torch.randn(8, 128)
    parts, scheme = encoded(values, "int4")
    numbers = scheme.dense(parts, (8, 128))
    step = parts["weight_scale"].float()
    inside = values.abs() < 7.4 * step
    assert ((numbers - values).abs() <= step / 2 + 1e-6)[inside].all()


def test_columns_in_another_order_find_their_groups(tmp_path):
    values = torch.randn(16, 256)
    parts, _ = encoded(values, "int4")
    order = torch.randperm(256)
    codes_of = {name: part for name, part in parts.items() if name != "weight_packed"}
    from_groups = torch.arange(256) // 128
    _, plain, _ = decoded(tmp_path, parts, (16, 256))
    (tmp_path / "turned").mkdir()
    shuffled = packed(unpacked(parts["weight_packed"], 4)[:, order], 4)
    indexed = codes_of | {"weight_packed": shuffled, "weight_g_idx": from_groups[order].int()}
    _, numbers, _ = decoded(tmp_path / "turned", indexed, (16, 256))
    assert torch.equal(numbers, plain[:, order])
