"""A stored tensor whose numbers are asked for one by one."""

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from llama4lab.checkpoint.second.small_floats import E4M3, E5M2
from llama4lab.checkpoint.tensor_files import TensorFiles

# How numpy names what is stored; small floats are their bits, and words have no sign, so that they can be shifted.
STORED = {
    "float64": "<f8", "float32": "<f4", "float16": "<f2", "bfloat16": "<u2", "float8_e4m3fn": "u1",
    "float8_e5m2": "u1", "int64": "<i8", "int32": "<u4", "uint32": "<u4", "int16": "<i2", "int8": "i1", "uint8": "u1",
}  # fmt: skip


@dataclass(frozen=True)
class RawTensor:
    """Bytes of a file, and what they are.

    Attributes:
        bits: What is stored, as a view of the file.
        dtype: torch's name of its dtype.
    """

    bits: np.ndarray
    dtype: str

    @classmethod
    def of(cls, files: TensorFiles, name: str) -> "RawTensor":
        """Opens a tensor; nothing is read before its numbers are asked for."""
        spec = files.spec(name)
        dtype = str(spec.dtype).removeprefix("torch.")
        if dtype not in STORED:
            raise ValueError(f"{files.file(name)}: {name} is stored as {dtype}, for which there is no second decoder.")
        size = prod(spec.shape) * np.dtype(STORED[dtype]).itemsize
        raw = np.memmap(files.file(name), np.uint8, "r", offset=spec.start, shape=(size,)) if size else b""
        return cls(np.frombuffer(raw, STORED[dtype]).reshape(spec.shape), dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the stored tensor, or of what was taken of it."""
        return self.bits.shape

    def of_expert(self, expert: int | None) -> "RawTensor":
        """Gives the slice of an expert; the whole of what all experts share."""
        shared = expert is None or self.bits.ndim < 2
        return self if shared else replace(self, bits=self.bits[expert])

    def turned(self) -> "RawTensor":
        """Gives [out, in] of what is stored as [in, out]."""
        return replace(self, bits=self.bits.T)

    def rows_of(self, columns: int) -> "RawTensor":
        """Gives it as a matrix of so many columns."""
        return self if self.bits.ndim == 2 else replace(self, bits=self.bits.reshape(-1, columns))

    def flat(self) -> "RawTensor":
        """Gives all numbers in a row."""
        return replace(self, bits=self.bits.reshape(-1))

    def __getitem__(self, place: Any) -> np.ndarray:
        """The numbers at some places, in float32, or in float64 if they are stored so."""
        return numbers(self.bits[place], self.dtype)


def numbers(bits: np.ndarray, dtype: str) -> np.ndarray:
    """Gives what stored bits mean."""
    if dtype == "bfloat16":  # the upper half of a float32
        return (bits.astype(np.uint32) << 16).view(np.float32)
    if dtype == "float8_e4m3fn":
        return E4M3[bits]
    if dtype == "float8_e5m2":
        return E5M2[bits]
    return bits if dtype == "float64" else bits.astype(np.float32)
