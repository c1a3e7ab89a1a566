"""Damaged and hostile checkpoints. Each is refused with an error that names the file and, where it can, the tensor."""

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
NORM = "model.norm.weight"
Damage = Callable[[Path, Any], object]


def cut(length: int | float) -> Damage:
    """Truncates the weights to so many bytes, or to that share of them."""

    def damage(folder, make):
        data = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(data[: length if isinstance(length, int) else int(len(data) * length)])

    return damage


def headed(header: dict | bytes, data: bytes = b"", length: int | None = None) -> Damage:
    """Replaces the weights by a file with this header."""
    return lambda folder, make: (folder / WEIGHTS).write_bytes(make.file_bytes(header, data, length=length))


def entry(dtype: str = "F32", shape: object = (1,), offsets: object = (0, 4)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def with_tensors(change: Callable[[dict], object]) -> Damage:
    """Saves the weights again after a change to the tensors."""

    def damage(folder, make):
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)

    return damage


def renamed(old: str, new: str) -> Damage:
    return with_tensors(lambda tensors: tensors.update({new: tensors.pop(old)}))


def written(data: bytes, name: str = WEIGHTS) -> Damage:
    return lambda folder, make: (folder / name).write_bytes(data)


def archive() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("archive/data.pkl", b"\0" * 10_000_000)  # ten megabytes out of ten kilobytes
    return buffer.getvalue()


def torch_saved() -> bytes:
    buffer = io.BytesIO()
    torch.save({NORM: torch.ones(16)}, buffer)
    return buffer.getvalue()


def edited(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


TWICE = b'{"a":' + json.dumps(entry()).encode() + b',"a":' + json.dumps(entry("I32")).encode() + b"}"
GATE_UP = "model.layers.1.feed_forward.experts.gate_up_proj"

IN_ONE_FILE: dict[str, tuple[Damage, str]] = {
    **{f"cut to {length} bytes": (cut(length), f"{WEIGHTS} is not a readable") for length in (0, 1, 7, 8, 9, 100)},
    **{f"cut to {share:.0%}": (cut(share), f"{WEIGHTS} is not a readable") for share in (0.1, 0.5, 0.9, 0.999)},
    "trailing bytes": (
        lambda folder, make: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes() + b"\0"),
        f"{WEIGHTS} is not a readable",
    ),
    "header over 100 MB": (headed(b"{}", length=100_000_001), f"{WEIGHTS} is not a readable"),
    "header of 2^63 bytes": (headed(b"{}", length=2**63), f"{WEIGHTS} is not a readable"),
    "header not JSON": (headed(b'{"a": '), f"{WEIGHTS} is not a readable"),
    "header not UTF-8": (headed(b'{"\xff": 1}'), f"{WEIGHTS} is not a readable"),
    "header a list": (headed(b"[]"), f"{WEIGHTS} is not a readable"),
    "header nested deeply": (headed(b'{"a":' * 10_000 + b"1" + b"}" * 10_000), f"{WEIGHTS} is not a readable"),
    "overlap": (headed({"a": entry(), "b": entry(offsets=(0, 4))}, b"\0" * 4), f"{WEIGHTS} is not a readable"),
    "hole": (headed({"a": entry(offsets=(4, 8))}, b"\0" * 8), f"{WEIGHTS} is not a readable"),
    "offsets turned round": (headed({"a": entry(offsets=(4, 0))}, b"\0" * 4), f"{WEIGHTS} is not a readable"),
    "negative offset": (headed({"a": entry(offsets=(-4, 0))}), f"{WEIGHTS} is not a readable"),
    "negative size": (headed({"a": entry(shape=(-1,))}, b"\0" * 4), f"{WEIGHTS} is not a readable"),
    "shape beyond 2^64": (headed({"a": entry(shape=(2**40, 2**40))}, b"\0" * 4), f"{WEIGHTS} is not a readable"),
    "shape against bytes": (headed({"a": entry(shape=(2,))}, b"\0" * 4), f"{WEIGHTS} is not a readable"),
    "unknown dtype": (headed({"a": entry("F31")}, b"\0" * 4), f"{WEIGHTS} is not a readable"),
    "dtype torch lacks": (headed({"a": entry("F6_E2M3", (4,), (0, 3))}, b"\0" * 3), r"a has dtype F6_E2M3"),
    "name twice in one header": (headed(TWICE, b"\0" * 4), r"the header of .*safetensors.*'a' appears twice"),
    "no tensors": (headed({}), r"lacks \d+ tensors"),
    "metadata only": (headed({"__metadata__": {"format": "pt"}}), r"lacks \d+ tensors"),
    "torch.save under our name": (written(torch_saved()), f"{WEIGHTS} is not a safetensors file: .* pickle"),
    "bare pickle under our name": (written(pickle.dumps({"a": 1})), f"{WEIGHTS} is not a safetensors file: .* pickle"),
    "zip bomb under our name": (written(archive()), f"{WEIGHTS} is not a safetensors file: .* pickle"),
    "GGUF under our name": (written(b"GGUF" + bytes(64)), f"{WEIGHTS} is not a safetensors file: .* GGUF"),
    "Git LFS pointer": (written(b"version https://git-lfs.github.com/spec/v1\n"), r"Git LFS pointer"),
    "both kinds of weights": (
        written(b'{"weight_map": {"a": "b.safetensors"}}', INDEX),
        f"holds both {WEIGHTS} and {INDEX}",
    ),
    "missing tensor": (with_tensors(lambda tensors: tensors.pop(NORM)), rf"lacks 1 tensors .*: {NORM}"),
    "misspelt tensor": (renamed(NORM, "model.nrom.weight"), rf"lacks 1 .*{NORM}.*\n.*no use for: model\.nrom\.weight"),
    "extra tensor": (
        with_tensors(lambda tensors: tensors.update({"model.layers.4.input_layernorm.weight": torch.ones(16)})),
        rf"{WEIGHTS} holds 1 tensors that the model does not have: model\.layers\.4",
    ),
    "vision weights under a text config": (
        with_tensors(lambda tensors: tensors.update({"vision_model.class_embedding": torch.ones(16)})),
        r'vision_model\.class_embedding.*\n.*config\.json says "llama4_text"',
    ),
    "longer tensor": (
        with_tensors(lambda tensors: tensors.update({NORM: torch.ones(17)})),
        rf"{WEIGHTS}: {NORM} has shape \[17\]; by config.json it is \[16\]",
    ),
    "transposed experts": (
        with_tensors(lambda tensors: tensors.update({GATE_UP: tensors[GATE_UP].transpose(1, 2)})),
        rf"{GATE_UP} has shape \[3, 24, 16\].*\[3, 16, 24\]\.\n.*axes .* another order",
    ),
    "one expert too few": (
        with_tensors(lambda tensors: tensors.update({GATE_UP: tensors[GATE_UP][:2]})),
        rf"{GATE_UP} has shape \[2, 16, 24\]",
    ),
    "integer weights": (
        with_tensors(lambda tensors: tensors.update({NORM: torch.ones(16, dtype=torch.int8)})),
        rf"{WEIGHTS}: {NORM} is stored as int8",
    ),
    "NaN": (
        with_tensors(lambda tensors: tensors[NORM].fill_(float("nan"))),
        rf"{WEIGHTS}: {NORM} holds 16 values that are NaN or infinite",
    ),
    "infinity": (
        with_tensors(lambda tensors: tensors["lm_head.weight"][0, 0].fill_(float("inf"))),
        rf"{WEIGHTS}: lm_head\.weight holds 1 values",
    ),
    "other sizes in config.json": (
        lambda folder, make: edited(folder / "config.json", vocab_size=25),
        r"(embed_tokens|lm_head)\.weight has shape \[24, 16\]; by config.json it is \[25, 16\]",
    ),
    "another layer in config.json": (
        lambda folder, make: edited(
            folder / "config.json", num_hidden_layers=5, no_rope_layers=None, layer_types=None, moe_layers=None
        ),
        r"lacks \d+ tensors.*model\.layers\.4",
    ),
    "config.json damaged": (written(b'{"model_type": ', "config.json"), r"config\.json is not valid JSON"),
    "config.json not UTF-8": (written(b'{"\xff": 1}', "config.json"), r"config\.json is not valid JSON"),
    "config.json a list": (written(b"[]", "config.json"), r"config\.json holds a JSON list"),
    "config.json nested deeply": (
        written(b'{"a":' * 200_000 + b"1" + b"}" * 200_000, "config.json"),
        r"config\.json is nested too deeply",
    ),
    "config.json with a key twice": (
        written(b'{"model_type": "llama4_text", "model_type": "llama4"}', "config.json"),
        r"config\.json is not valid JSON: the key 'model_type' appears twice",
    ),
    "config.json with NaN": (written(b'{"a": NaN}', "config.json"), r"config\.json is not valid JSON: NaN"),
}


@pytest.mark.parametrize(("damage", "message"), IN_ONE_FILE.values(), ids=IN_ONE_FILE.keys())
def test_a_damaged_file_is_refused(make, checkpoint, damage, message):
    make.refuses(checkpoint, ValueError, damage, message)
