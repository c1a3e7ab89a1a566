"""Damaged GGUF files are refused with the name of the file, whatever was done to them, and in little time."""

import math
import random
import struct
from pathlib import Path

import pytest
import torch

import llama4lab as lab
from llama4lab.checkpoint.gguf.header import read_gguf
from llama4lab.checkpoint.opening import files_of

U32, STRING, ARRAY = 4, 8, 9


def text(value: str | bytes) -> bytes:
    value = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(value)) + value


def setting(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str | bytes, shape: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def gguf_bytes(
    settings: list[bytes], tensors: list[bytes], data: int = 128, magic: bytes = b"GGUF", version: int = 3
) -> bytes:
    head = magic + struct.pack("<IQQ", version, len(tensors), len(settings)) + b"".join(settings) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + bytes(data)


ARCHITECTURE = setting("general.architecture", STRING, text("llama4"))
HUGE = struct.pack("<Q", 2**63)
GOOD = gguf_bytes([ARCHITECTURE], [tensor("a")])
ONE_OF = {
    "no GGUF file": (GOOD.replace(b"GGUF", b"PK\3\4"), "is not a GGUF file"),
    "an empty file": (b"", "is not a readable GGUF file|is not a GGUF file"),
    "a version of the future": (gguf_bytes([], [], version=4), "version 4; versions 2 and 3"),
    "the first version": (gguf_bytes([], [], version=1), "version 1; versions 2 and 3"),
    "for big-endian machines": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "more tensors than bytes": (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "more bytes are announced"),
    "more settings than bytes": (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63), "more bytes are announced"),
    "a string longer than the file": (gguf_bytes([HUGE + b"key"], []), "more bytes are announced"),
    "a string that is not UTF-8": (gguf_bytes([setting("k", STRING, text(b"\xff\xfe"))], []), "is not UTF-8"),
    "a list longer than the file": (
        gguf_bytes([setting("k", ARRAY, struct.pack("<I", U32) + HUGE)], []),
        "more bytes are announced",
    ),
    "a list of long strings": (
        gguf_bytes([setting("k", ARRAY, struct.pack("<I", STRING) + HUGE)], []),
        "more bytes are announced",
    ),
    "a list of lists": (
        gguf_bytes([setting("k", ARRAY, struct.pack("<IQ", ARRAY, 1))], []),
        "values of type 9, which cannot be read",
    ),
    "a setting of an unknown type": (gguf_bytes([setting("k", 99, bytes(8))], []), "unknown type 99"),
    "a truth value of 2": (gguf_bytes([setting("k", 7, b"\2")], []), "neither 0 nor 1"),
    "a setting twice": (gguf_bytes([ARCHITECTURE] * 2, []), "its settings have 'general.architecture' twice"),
    "a setting without a name": (gguf_bytes([setting("", U32, bytes(4))], []), "its settings has no name"),
    "a tensor twice": (gguf_bytes([], [tensor("a"), tensor("a", offset=128)], 256), "its tensors have 'a' twice"),
    "a tensor without axes": (gguf_bytes([], [tensor("a", ())]), "has 0 axes"),
    "a tensor of a billion axes": (gguf_bytes([], [text("a") + struct.pack("<I", 10**9)] * 9), "1,000,000,000 axes"),
    "a tensor of no rows": (gguf_bytes([], [tensor("a", (32, 0))]), r"has shape \[0, 32\]"),
    "a shape that overflows": (gguf_bytes([], [tensor("a", (2**32, 2**32))]), "has shape"),
    "an unknown type of tensor": (gguf_bytes([], [tensor("a", kind=77)]), "a is of type 77, which gguf does not know"),
    "a type that was given up": (gguf_bytes([], [tensor("a", kind=31)]), "a is of type 31"),
    "a type that nothing decodes": (
        gguf_bytes([], [tensor("a", (256,), kind=15)], 512),
        "Q8_K, which gguf cannot decode",
    ),
    "rows of half a block": (
        gguf_bytes([], [tensor("a", (48,), kind=2)]),
        "rows of 48 numbers; blocks of Q4_0 make 32",
    ),
    "a tensor beyond the end": (gguf_bytes([], [tensor("a", (64,))]), "ends within a, which takes 256 bytes"),
    "an overlap": (gguf_bytes([], [tensor("a"), tensor("b", offset=96)], 256), "b is said to lie at 96"),
    "a hole": (gguf_bytes([], [tensor("a"), tensor("b", offset=160)], 512), "b is said to lie at 160"),
    "an offset of 2^63": (gguf_bytes([], [tensor("a", offset=2**63)]), "a is said to lie at"),
    "bytes behind the last tensor": (GOOD + bytes(64), "has 64 bytes after its last tensor"),
    "an alignment of 0": (gguf_bytes([setting("general.alignment", U32, bytes(4))], []), "expected a power of two"),
    "an alignment of 48": (
        gguf_bytes([setting("general.alignment", U32, struct.pack("<I", 48))], []),
        "expected a power of two",
    ),
    "no architecture": (gguf_bytes([], [tensor("a")]), "does not say general.architecture"),
}


@pytest.mark.parametrize("what", ONE_OF)
def test_it_is_refused_with_the_name_of_the_file(what, tmp_path):
    written, message = ONE_OF[what]
    (tmp_path / "scout.gguf").write_bytes(written)
    with pytest.raises(ValueError, match=message) as error:
        lab.load(tmp_path / "scout.gguf")
    assert str(tmp_path / "scout.gguf") in str(error.value)
    assert len(str(error.value).splitlines()) <= 3


def test_a_file_that_is_cut_anywhere_is_refused(packed_file, tmp_path):
    whole = packed_file("Q8_0").read_bytes()
    first = min(stored.start for stored in read_gguf(packed_file("Q8_0")).tensors.values())
    for cut in [*range(0, first, max(first // 60, 1)), first, first + 1, len(whole) // 2, len(whole) - 40]:
        (tmp_path / "model.gguf").write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"model\.gguf"):
            read_gguf(tmp_path / "model.gguf")


def test_headers_changed_at_random_never_crash_hang_or_ask_for_much_memory(packed_file, tmp_path):
    whole = packed_file("mixed").read_bytes()
    first = min(stored.start for stored in read_gguf(packed_file("mixed")).tensors.values())
    chance, file, refused = random.Random(7), tmp_path / "model.gguf", 0
    for _ in range(400):
        changed = bytearray(whole)
        for _ in range(chance.choice((1, 1, 2, 8))):
            place = chance.randrange(first)
            width = chance.choice((1, 4, 8))
            changed[place : place + width] = chance.choice((b"\xff" * width, bytes(width), chance.randbytes(width)))
        file.write_bytes(changed)
        found = outcome(file)
        refused += isinstance(found, str)
        assert "model.gguf" in found if isinstance(found, str) else found <= len(whole)
    assert refused > 100


def outcome(file: Path) -> int | str:
    """How many bytes the tensors of a file are said to have, or why it is refused."""
    try:
        files = files_of(file)
    except ValueError as error:
        return str(error)
    return sum(files.nbytes(name) for name in files)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("blk.1.ffn_up_exps.weight"), r"lacks 1 tensors of the model .*experts\.up_proj"),
        (lambda state: state.update({"blk.1.ffn_up.scale": torch.ones(1)}), r"blk\.1\.ffn_up\.scale shows weights"),
        (lambda state: state.update({"v.pre_ln.weight": torch.ones(4)}), r"does not have: v\.pre_ln\.weight"),
        (
            lambda state: state.update({"blk.0.attn_norm.weight": torch.ones(32)}),
            r"blk\.0\.attn_norm\.weight has shape \[32\]",
        ),
        (
            lambda state: state.update({"blk.1.ffn_up_exps.weight": torch.ones(2, 256, 256)}),
            r"blk\.1\.ffn_up_exps\.weight has shape",
        ),
        (
            lambda state: state.update({"blk.0.ffn_up.weight": torch.ones(256, 512)}),
            r"blk\.0\.ffn_up\.weight has shape",
        ),
        (
            lambda state: state["output_norm.weight"].fill_(math.nan),
            r"output_norm\.weight holds 256 values that are NaN",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(gguf_saved, new_text_model, sizes, change, message):
    file = gguf_saved(new_text_model(**sizes), "Q8_0", config=False, change=change)
    with pytest.raises(ValueError, match=message) as error:
        lab.load(file)
    assert str(file) in str(error.value)


@pytest.mark.parametrize("experts", ["resident", "offload"])
@pytest.mark.parametrize("name", ["blk.0.attn_q.weight", "blk.1.ffn_up_exps.weight", "output.weight"])
@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "Q8_0"])
def test_scales_that_are_nan_are_refused(packed_file, tmp_path, random_ids, kind, name, experts):
    file, tensor = tmp_path / "model.gguf", read_gguf(packed_file(kind)).tensors[name]
    (tmp_path / "config.json").write_bytes((packed_file(kind).parent / "config.json").read_bytes())
    changed = bytearray(packed_file(kind).read_bytes())
    for block in range(0, tensor.nbytes, tensor.kind.size):
        place = tensor.start + block + (208 if kind == "Q6_K" else 0)
        changed[place : place + 2] = b"\x00\x7e"
    file.write_bytes(changed)
    with pytest.raises(ValueError, match=rf"model\.gguf: {name} has scales that are NaN or infinite"), torch.no_grad():
        lab.load(file, experts=experts)(random_ids(1, 6))
