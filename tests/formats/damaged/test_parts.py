"""Every part of a stored matrix, damaged in every way: it is refused by name, or no number changes.

These look at single matrices, without a model: a part that goes wrong must not get past the recognition.
"""

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from llama4lab.checkpoint.recognition import Recognition
from llama4lab.checkpoint.shards import Shards

EXPERT = re.compile(r".*layers\.1\.feed_forward\.experts(\.0)?\.down_proj")
SHAPE = (128, 128)


def half(tensor, axis):
    return tensor.narrow(axis, 0, tensor.shape[axis] // 2).contiguous() if has_axes(tensor, axis) else None


def has_axes(tensor, axis):
    return tensor.ndim > max(axis, 0) and tensor.shape[axis] > 1


def with_last(tensor, value):
    """Lets the last number be no number, where the dtype has such a value."""
    if not tensor.is_floating_point() or (tensor.dtype == torch.float8_e4m3fn and value == float("inf")):
        return None
    wide = tensor.float().clone()
    wide.flatten()[-1] = value
    return wide.to(tensor.dtype)


def is_scale(tensor):
    return tensor.dtype in (torch.bfloat16, torch.float32) and tensor.numel() <= 4 * SHAPE[0] * 2


def other_kind(tensor):
    if tensor.is_floating_point():
        return tensor.float().to(torch.int32)
    return tensor.to(torch.int8 if tensor.dtype == torch.uint8 else torch.float32)


# None is for what cannot be done to a tensor.
DAMAGES = {
    "half of the rows": lambda tensor: half(tensor, 0),
    "half of the columns": lambda tensor: half(tensor, -1) if tensor.ndim > 1 else None,
    "one row more": lambda tensor: torch.cat([tensor, tensor[:1]]) if tensor.ndim else None,
    "an axis before": lambda tensor: tensor[None],
    "an axis after": lambda tensor: tensor[..., None],
    "one number of many": lambda tensor: tensor.flatten()[0] if tensor.numel() > 1 else None,
    "no rows": lambda tensor: tensor[:0] if tensor.ndim else tensor.reshape(1)[:0],
    "no columns": lambda tensor: tensor[..., :0] if tensor.ndim else None,
    "turned": lambda tensor: tensor.mT if tensor.ndim > 1 and tensor.shape[-1] != tensor.shape[-2] else None,
    "without axes": lambda tensor: tensor.flatten() if tensor.ndim > 1 else None,
    "floats as integers, integers as floats": other_kind,
    "as bytes": lambda tensor: tensor.float().to(torch.uint8) if tensor.dtype != torch.uint8 else tensor.bfloat16(),
    "as 64 bits": lambda tensor: tensor.double() if tensor.dtype.itemsize == 1 else tensor.long(),
    "NaN": lambda tensor: with_last(tensor, float("nan")),
    "infinity": lambda tensor: with_last(tensor, float("inf")),
    "beyond reason": lambda tensor: torch.full_like(tensor, 1e38) if is_scale(tensor) else None,
}


def matrix_of(folder, settings, tensors, base):
    """The numbers of one matrix, from a file that holds nothing but its parts."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    shards = Shards(folder)
    recognition = Recognition(shards)
    if base in tensors:
        found = [recognition.fused(base, (4, *SHAPE), expert) for expert in range(4)]
    elif base.endswith("experts.down_proj"):
        found = [recognition.linear(base, SHAPE, expert, 4) for expert in range(4)]
    else:
        found = [recognition.linear(base, SHAPE)]
    known = [matrix for matrix in found if matrix is not None]
    if len(known) < len(found):
        return None  # loading refuses what is in no known form: see test_quantization.py
    return torch.stack([matrix.dense(matrix.read(shards), torch.float32) for matrix in known])


@pytest.fixture
def parts(damaged, format):
    """The name of a matrix of an expert, or of all, and the tensors that it is stored in."""
    found = {name: EXPERT.match(name) for name in damaged.tensors(format) if not name.endswith("input_scale")}
    own = {name: match[0] for name, match in found.items() if match is not None}
    return next(iter(own.values())), {name: damaged.tensors(format)[name] for name in own}


def outcome(folder, settings, tensors, base):
    """The numbers, or what the refusal says."""
    try:
        return matrix_of(folder, settings, tensors, base), ""
    except ValueError as error:
        return None, str(error)


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_part_that_is_damaged_is_refused_by_name_or_changes_no_number(tmp_path, damaged, format, parts, kind):
    base, tensors = parts
    settings = damaged.settings(format)
    good = matrix_of(tmp_path / "good", settings, tensors, base)
    for name, tensor in tensors.items():
        changed = DAMAGES[kind](tensor)
        if changed is None or ("quant_state" in name and kind != "an axis after"):
            continue
        numbers, refusal = outcome(tmp_path / "bad", settings, tensors | {name: changed}, base)
        assert numbers is None or (good is not None and torch.equal(numbers, good)), (
            f"{kind}: {name} {list(tensor.shape)}"
        )
        if refusal:
            assert f"{tmp_path / 'bad' / 'model.safetensors'}: {base}" in refusal
            assert len(refusal.splitlines()) <= 3


def test_a_part_that_is_missing_is_refused_by_name(tmp_path, damaged, format, parts):
    base, tensors = parts
    if len(tensors) == 1:
        pytest.skip("a plain matrix is one tensor")
    for name in tensors:
        left = {other: tensor for other, tensor in tensors.items() if other != name}
        numbers, refusal = outcome(tmp_path / "bad", damaged.settings(format), left, base)
        if name.endswith("weight_shape"):
            assert numbers is not None  # it says nothing that the others do not say
        else:
            assert numbers is None
            assert not refusal or f"{tmp_path / 'bad' / 'model.safetensors'}: {base}" in refusal


def test_numbers_are_found_with_and_without_settings(tmp_path, damaged, format, parts):
    base, tensors = parts
    said = matrix_of(tmp_path / "said", damaged.settings(format), tensors, base)
    silent = matrix_of(tmp_path / "silent", {}, tensors, base)
    assert said is not None
    assert silent is not None
    assert torch.equal(said, silent)
