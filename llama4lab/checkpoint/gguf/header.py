"""The header of one GGUF file: what it says of the model, and where the bytes of its tensors lie.

It is read by its own few lines, since the reader of the gguf package believes every length that a file states: a
damaged one can make it run for hours, ask for all memory, or give a view of other bytes.
"""

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np

from llama4lab.checkpoint.gguf.blocks import GgmlType, ggml_type

MAGIC = b"GGUF"
VERSIONS = (2, 3)
# Bytes that a header may have; with 200,000 tokens and twice as many merges it has about 12 MB.
LARGEST = 64 * 2**20
MOST_AXES = 4
NUMBERS = {
    **{0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "|b1", 10: "<u8", 11: "<i8", 12: "<f8"}
}
STRING, ARRAY = 8, 9

Value = TypeVar("Value")


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies, and what its bytes are.

    Attributes:
        kind: How its numbers are packed.
        shape: As in torch; GGUF itself writes the axes in the other order.
        start: Position of the first byte in the file.
        nbytes: How many bytes there are.
    """

    kind: GgmlType
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """What stands at the beginning of a GGUF file.

    Attributes:
        file: Which one.
        metadata: Settings by their keys: numbers, strings and lists of them.
        tensors: By the names that the file gives them.
    """

    file: Path
    metadata: dict[str, Any]
    tensors: dict[str, Stored]

    def get(self, key: str, kind: type[Value], default: Value | None = None) -> Value:
        """Gives a setting, or the default where the file does not say.

        Raises:
            ValueError: if it is of another kind, or missing without a default.
        """
        value = self.metadata.get(key, default)
        if kind is float and type(value) is int:
            value = float(value)
        if value is None:
            raise ValueError(f"{self.file} does not say {key}, which a Llama 4 needs.")
        if type(value) is not kind:
            raise ValueError(f"{self.file}: {key} is {value!r:.80}; expected {kind.__name__}.")
        return value  # pyright: ignore[reportReturnType]


def read_gguf(file: Path) -> Header:
    """Gives the header of a GGUF file. Nothing of the tensors is read.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a GGUF file of a known version, is truncated, or contradicts itself.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist.")
    with file.open("rb") as opened:
        cursor = Cursor(file, opened, min(file.stat().st_size, LARGEST))
        _check_version(file, cursor)
        num_tensors, num_settings = cursor.number("<Q"), cursor.number("<Q")
        metadata = cursor.unique(num_settings, 13, "settings", cursor.value)
        tensors = cursor.unique(num_tensors, 24, "tensors", cursor.entry)
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1) or alignment > LARGEST:
        raise ValueError(f"{file}: general.alignment is {alignment!r:.80}; expected a power of two.")
    return Header(file, metadata, _placed(file, tensors, cursor.position, alignment))


def _check_version(file: Path, cursor: "Cursor") -> None:
    magic = cursor.take(4)
    if magic != MAGIC:
        raise ValueError(f"{file} is not a GGUF file: it begins with {magic!r}.")
    version = cursor.number("<I")
    if version in (value << 24 for value in (1, *VERSIONS)):
        raise ValueError(f"{file} is a GGUF file for big-endian machines.\nConvert it with gguf-convert-endian.")
    if version not in VERSIONS:
        raise ValueError(f"{file} is a GGUF file of version {version}; versions 2 and 3 can be read.")


def _placed(file: Path, entries: dict[str, Any], stop: int, alignment: int) -> dict[str, Stored]:
    """Checks that the tensors lie one after the other, and where the file says."""
    first = _aligned(stop, alignment)
    tensors: dict[str, Stored] = {}
    expected, size = 0, file.stat().st_size
    for name, (number, shape, offset) in entries.items():
        try:
            kind = ggml_type(number)
            nbytes = kind.nbytes(shape)
        except ValueError as error:
            raise ValueError(f"{file}: {name} {error}.") from error
        if offset != expected:
            raise ValueError(f"{file}: {name} is said to lie at {offset:,}; the tensor before it ends at {expected:,}.")
        if first + offset + nbytes > size:
            raise ValueError(
                f"{file} ends within {name}, which takes {nbytes:,} bytes from {first + offset:,} on.\n"
                f"It has {size:,} bytes: it is truncated or damaged; download it again."
            )
        tensors[name] = Stored(kind, shape, first + offset, nbytes)
        expected = _aligned(offset + nbytes, alignment)
    if size > first + expected:
        raise ValueError(
            f"{file} has {size - first - expected:,} bytes after its last tensor, of which it says nothing."
        )
    return tensors


def _aligned(position: int, alignment: int) -> int:
    return position + -position % alignment


class Cursor:
    """Takes a header apart from front to back, and never believes a length that the file is too short for.

    Args:
        file: The file, for messages.
        opened: The same, open at its start.
        size: How many bytes may be taken.
    """

    def __init__(self, file: Path, opened: BinaryIO, size: int):
        self.file, self.opened, self.size, self.position = file, opened, size, 0

    def take(self, count: int) -> bytes:
        """Gives the next bytes."""
        self.reserve(count)
        taken = self.opened.read(count)
        self.position += len(taken)
        if len(taken) < count:
            raise self.damaged("it ends within its header")
        return taken

    def reserve(self, count: int) -> None:
        """Raises ValueError if there are not so many bytes left."""
        if count > self.size - self.position:
            left = self.size - self.position
            raise self.damaged(f"{count:,} more bytes are announced at {self.position:,}, and {left:,} are left")

    def number(self, format: str) -> int:
        """Gives the next number."""
        return struct.unpack(format, self.take(struct.calcsize(format)))[0]

    def text(self) -> str:
        """Gives the next string."""
        start, taken = self.position, self.take(self.number("<Q"))
        try:
            return taken.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.damaged(f"the string at {start:,} is not UTF-8") from error

    def unique(self, count: int, smallest: int, what: str, read: Callable[[], Value]) -> dict[str, Value]:
        """Gives so many named entries of at least a number of bytes each."""
        self.reserve(count * smallest)
        found: dict[str, Value] = {}
        for _ in range(count):
            name = self.text()
            if not name or name in found:
                raise self.damaged(f"its {what} have {name!r:.80} twice" if name else f"one of its {what} has no name")
            found[name] = read()
        return found

    def value(self, kind: int | None = None) -> Any:
        """Gives the next setting: its type, if that is not known, and its value."""
        kind = self.number("<I") if kind is None else kind
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            return self.array()
        if kind not in NUMBERS:
            raise self.damaged(f"a setting before {self.position:,} has the unknown type {kind}")
        return self.numbers(kind, 1)[0]

    def array(self) -> list[Any]:
        """Gives the next list of numbers or of strings."""
        kind, count = self.number("<I"), self.number("<Q")
        if kind == STRING:
            self.reserve(8 * count)
            return [self.text() for _ in range(count)]
        if kind not in NUMBERS:
            raise self.damaged(f"a list before {self.position:,} holds values of type {kind}, which cannot be read")
        return self.numbers(kind, count)

    def numbers(self, kind: int, count: int) -> list[Any]:
        """Gives the next numbers of one type."""
        dtype = np.dtype(NUMBERS[kind])
        taken = self.take(count * dtype.itemsize)
        if kind == 7 and taken.strip(b"\0\1"):
            raise self.damaged(f"a truth value before {self.position:,} is neither 0 nor 1")
        values = np.frombuffer(taken, dtype=dtype)
        # The decimal that was meant, 1e-05 and not 9.999999747378752e-06.
        return [float(str(value)) for value in values] if kind == 6 else values.tolist()

    def entry(self) -> tuple[int, tuple[int, ...], int]:
        """Gives what the header says of one tensor: its type, its shape and its place."""
        axes = self.number("<I")
        if not 1 <= axes <= MOST_AXES:
            raise self.damaged(f"a tensor before {self.position:,} has {axes:,} axes")
        shape = tuple(self.number("<Q") for _ in range(axes))[::-1]
        if not all(shape) or math.prod(shape) >= 2**63:
            raise self.damaged(f"a tensor before {self.position:,} has shape {list(shape)}")
        return self.number("<I"), shape, self.number("<Q")

    def damaged(self, found: str) -> ValueError:
        """What to raise."""
        return ValueError(f"{self.file} is not a readable GGUF file: {found}.\nIt is truncated or damaged.")
