"""The header of one safetensors file: which tensors it holds, and where their bytes lie."""

import struct
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from llama4lab.checkpoint.strict_json import parse_json
from llama4lab.checkpoint.tensor_files import Spec

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F4": torch.float4_e2m1fn_x2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

# What the first bytes of a file say that is not a safetensors file, whatever its name.
FOREIGN = {
    b"PK\x03\x04": "a pickle of torch.save, which can run any code when it is read",
    b"\x80": "a pickle, which can run any code when it is read",
    b"version https://git-lfs": "a Git LFS pointer; the weights themselves have not been fetched (git lfs pull)",
    b"GGUF": "a GGUF file",
}


def read_header(file: Path) -> dict[str, Spec]:
    """Gives the tensors of a safetensors file without reading their values.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is a pickle, is truncated, or is otherwise not a valid safetensors file.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist.")
    with file.open("rb") as opened:
        beginning = opened.read(24)
        for magic, meaning in FOREIGN.items():
            # A safetensors file starts with the length of its header, which `{` follows.
            if beginning.startswith(magic) and beginning[8:9] != b"{":
                raise ValueError(
                    f"{file} is not a safetensors file: it is {meaning}.\n"
                    "llama4lab reads safetensors files only; ask for the safetensors version of this checkpoint."
                )
        _validate(file)
        (length,) = struct.unpack("<Q", beginning[:8])
        opened.seek(8)
        # safetensors keeps the last of two entries of the same name; parsing strictly refuses them.
        entries = parse_json(opened.read(length), source=f"the header of {file}")
    entries.pop("__metadata__", None)
    return {name: _spec(file, name, entry, offset=8 + length) for name, entry in entries.items()}


def _validate(file: Path) -> None:
    """Lets the safetensors library check the header: no hole, no overlap, and offsets that fit shapes and file."""
    try:
        # numpy, since for torch the library would reserve as much memory as the file is long.
        with safe_open(file, framework="numpy") as opened:
            opened.keys()
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} is not a readable safetensors file: {error}\n"
            "The file is truncated or damaged; download or save it again."
        ) from error


def _spec(file: Path, name: str, entry: dict, *, offset: int) -> Spec:
    if entry["dtype"] not in DTYPES:
        raise ValueError(
            f"{file}: {name} has dtype {entry['dtype']}, which torch does not have.\n"
            f"Readable dtypes: {', '.join(DTYPES)}."
        )
    start, stop = entry["data_offsets"]
    return Spec(DTYPES[entry["dtype"]], tuple(entry["shape"]), offset + start, stop - start)
