"""The JSON that bitsandbytes stores beside a matrix: whatever else stands there is refused by file and tensor."""

import json

import pytest
import torch
from safetensors.torch import save_file

from llama4lab.checkpoint.recognition import Recognition
from llama4lab.checkpoint.shards import Shards

BASE = "language_model.model.layers.1.feed_forward.experts.1.down_proj"
STATE = f"{BASE}.weight.quant_state.bitsandbytes__nf4"

CHANGES = {
    "another blocksize": {"blocksize": 128},
    "a giant blocksize": {"blocksize": 10**15},
    "a blocksize of 0": {"blocksize": 0},
    "a negative blocksize": {"blocksize": -64},
    "a blocksize in words": {"blocksize": "64"},
    "a blocksize between two": {"blocksize": 64.5},
    "a blocksize that is true": {"blocksize": True},
    "another shape": {"shape": [64, 256]},
    "a shape of three": {"shape": [128, 128, 1]},
    "a giant shape": {"shape": [10**30, 10**30]},
    "a shape in words": {"shape": "128, 128"},
    "a nested shape": {"shape": [[128], [128]]},
    "no shape": {"shape": None},
    "an unknown dtype": {"dtype": "int3"},
    "no dtype": {"dtype": None},
    "another kind than its name": {"quant_type": "fp4"},
    "an unknown kind": {"quant_type": "af4"},
    "a list of kinds": {"quant_type": ["nf4"]},
    "other nested blocks": {"nested_blocksize": 64},
    "giant nested blocks": {"nested_blocksize": 10**12},
    "an offset that is no number": {"nested_offset": float("nan")},
    "an infinite offset": {"nested_offset": float("inf")},
    "an offset in words": {"nested_offset": "much"},
    "an unknown nested dtype": {"nested_dtype": "int"},
}
BYTES = {
    "nothing": b"",
    "no keys": b"{}",
    "a list": b"[]",
    "no JSON": b"nonsense",
    "no UTF-8": b"\xff\xfe\x00",
    "deep nesting": b'{"a":' * 9_000 + b"1" + b"}" * 9_000,
    "a key twice": b'{"quant_type": "nf4", "quant_type": "nf4"}',
    "a number of 60,000 digits": b"9" * 60_000,
    "a text of 70,000 bytes": b" " * 70_000,
}


def refusal(folder, tensors):
    (folder / "config.json").write_text("{}")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors") as error:
        Recognition(Shards(folder)).linear(BASE, (128, 128))
    assert len(str(error.value).splitlines()) <= 3
    assert len(str(error.value)) < 1_000
    assert BASE in str(error.value)
    return str(error.value)


def as_tensor(text: bytes):
    return torch.tensor(list(text), dtype=torch.uint8)


@pytest.fixture
def tensors(damaged):
    return {name: tensor for name, tensor in damaged.tensors("nf4, nested").items() if name.startswith(f"{BASE}.")}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_state_that_says_something_else_is_refused(tmp_path, tensors, change):
    known = json.loads(bytes(tensors[STATE].tolist()))
    assert change.keys() <= known.keys()
    refusal(tmp_path, tensors | {STATE: as_tensor(json.dumps(known | change).encode())})


@pytest.mark.parametrize("text", BYTES.values(), ids=BYTES)
def test_a_state_that_is_not_its_json_is_refused(tmp_path, tensors, text):
    assert STATE in refusal(tmp_path, tensors | {STATE: as_tensor(text)})


@pytest.mark.parametrize("change", [lambda state: state.float(), lambda state: state[None], lambda state: state[:-9]])
def test_a_state_in_another_form_is_refused(tmp_path, tensors, change):
    assert STATE in refusal(tmp_path, tensors | {STATE: change(tensors[STATE]).clone()})


def test_a_state_under_two_kinds_is_refused(tmp_path, damaged):
    second = STATE.replace("nf4", "fp4")
    text = damaged.refusal(
        damaged.copy("nf4", lambda tensors: tensors.update({second: tensors[STATE].clone()})), second
    )
    assert "bitsandbytes" in text


def test_a_state_without_its_values_is_refused(tmp_path, tensors):
    assert "without its" in refusal(tmp_path, {STATE: tensors[STATE]})
