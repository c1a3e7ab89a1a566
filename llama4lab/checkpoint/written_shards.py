"""Writing safetensors files, one or many with an index, tensor after tensor: no file is ever whole in memory."""

import json
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from llama4lab.checkpoint.header import DTYPES
from llama4lab.checkpoint.shards import INDEX, SINGLE

NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Wide ones first, so that every tensor lies at a multiple of its own width: the order of the safetensors library.
ORDER = ["U64", "I64", "F64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16"]
ORDER += ["F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "F4", "BOOL"]


@dataclass(frozen=True)
class Entry:
    """A tensor that is to be written.

    Attributes:
        dtype: Of its values.
        shape: Its shape.
        pieces: Gives its values in their order: the whole tensor, or one slice along the first axis after the other.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[Tensor]]

    @classmethod
    def of(cls, tensor: Tensor) -> "Entry":
        """Gives the entry of a tensor that is in memory."""
        return cls(tensor.dtype, tuple(tensor.shape), lambda: [tensor])

    @property
    def nbytes(self) -> int:
        """How many bytes it takes in its file."""
        return prod(self.shape) * self.dtype.itemsize


def write_shards(folder: Path, entries: Mapping[str, Entry], max_shard_size: int, num_parameters: int) -> None:
    """Writes tensors as transformers does: in their order into files of at most a size; the index comes last.

    Args:
        folder: Where to.
        entries: The tensors by name.
        max_shard_size: Bytes in a file; a larger tensor has a file of its own.
        num_parameters: How many numbers they stand for, which the index tells.

    Raises:
        ValueError: if an entry gives other values than it says; what was written until then is no checkpoint.
    """
    shards = _split(entries, max_shard_size)
    if len(shards) == 1:
        _write(folder / SINGLE, shards[0])
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write(folder / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(entry.nbytes for entry in entries.values())
    index = {"metadata": {"total_parameters": num_parameters, "total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _split(entries: Mapping[str, Entry], largest: int) -> list[dict[str, Entry]]:
    shards: list[dict[str, Entry]] = [{}]
    filled = 0
    for name, entry in entries.items():
        if shards[-1] and filled + entry.nbytes > largest:
            shards.append({})
            filled = 0
        shards[-1][name] = entry
        filled += entry.nbytes
    return shards


def _write(file: Path, entries: Mapping[str, Entry]) -> None:
    ordered = sorted(entries.items(), key=lambda item: (ORDER.index(NAMES[item[1].dtype]), item[0]))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, entry in ordered:
        stop = start + entry.nbytes
        header[name] = {"dtype": NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [start, stop]}
        start = stop
    written = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    written += b" " * (-len(written) % 8)
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", len(written)) + written)
        for name, entry in ordered:
            count = 0
            for piece in entry.pieces():
                if piece.dtype != entry.dtype:
                    raise ValueError(f"{name} was to be written in {entry.dtype}; its values are {piece.dtype}.")
                count += opened.write(_bytes(piece))
            if count != entry.nbytes:
                raise ValueError(f"{name} was to be {entry.nbytes:,} bytes for {list(entry.shape)}; it is {count:,}.")


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
