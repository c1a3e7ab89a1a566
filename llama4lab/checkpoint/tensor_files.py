"""`TensorFiles`: what every kind of weight file offers, whatever its format."""

import mmap
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Shaped
from torch import Tensor

from llama4lab.checkpoint.schemes.scheme import Scheme
from llama4lab.checkpoint.spelling import near_misses

PIECE = 2**22
OWN_PAGES = 2**20  # bytes from which on a tensor has pages of its own


class Spec(NamedTuple):
    """What a header says of a tensor.

    Attributes:
        dtype: Of the stored values; of bytes that a scheme makes numbers of, uint8.
        shape: Of the stored values.
        start: Position of the first byte, counted from the start of the file.
        nbytes: How many bytes there are.
        scheme: What makes numbers of the bytes, if that stands in the file itself; None for values of the dtype.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int
    scheme: Scheme | None = None


class TensorFiles(Mapping[str, Tensor]):
    """Every tensor of a checkpoint by its name. Opening reads headers only; `files[name]` is a view of the file.

    Names are those that transformers gives the tensors, or those of one of the `layouts`; a format with names of its
    own translates them.

    Attributes:
        folder: Where the checkpoint is: a folder, or the file that it is.
    """

    folder: Path

    @abstractmethod
    def spec(self, name: str) -> Spec:
        """Gives dtype, shape and place of a tensor, from the header alone."""

    @abstractmethod
    def file(self, name: str) -> Path:
        """Gives the file that holds the tensor."""

    @abstractmethod
    def read(self, name: str, index: int | None = None) -> Shaped[Tensor, "..."]:
        """Gives a tensor, or one slice along its first axis, in memory of its own: exactly these bytes are read.

        A mapping would let the system read much more ahead. Threads may read at the same time.

        Raises:
            IndexError: if there is no such slice.
            OSError: if the file has become shorter, or cannot be read any more.
        """

    def extremes(self, name: str) -> tuple[Shaped[Tensor, ""], Shaped[Tensor, ""]]:
        """Gives the smallest and the largest value of a tensor; both are NaN if one value is."""
        return torch.aminmax(self[name])

    def own_name(self, name: str) -> str:
        """Gives the name that the file itself has for a tensor."""
        return name

    def place(self, name: str) -> str:
        """Gives file and name of a tensor, for messages."""
        return f"{self.file(name)}: {self.own_name(name)}"

    def nbytes(self, name: str, index: int | None = None) -> int:
        """Gives how many bytes a tensor, or one slice along its first axis, takes in its file."""
        spec = self.spec(name)
        return spec.nbytes if index is None else spec.nbytes // spec.shape[0]


def read_slice(spec: Spec, file: Path, name: str, index: int | None = None) -> Shaped[Tensor, "..."]:
    """Reads a tensor, or one slice along its first axis, that lies in one piece in a file.

    Raises:
        IndexError: if there is no such slice.
        OSError: if the file has become shorter, or cannot be read any more.
    """
    shape = spec.shape if index is None else spec.shape[1:]
    if index is not None and not 0 <= index < spec.shape[0]:
        raise IndexError(f"{file}: slice {index} of {name} was asked for; it has {spec.shape[0]}.")
    size = spec.nbytes if index is None else spec.nbytes // spec.shape[0]
    # Pages of their own go back to the system with the tensor; those of a heap may stay.
    values = bytearray(size) if size < OWN_PAGES else mmap.mmap(-1, size)
    start = spec.start + (index or 0) * size
    with file.open("rb", buffering=0) as opened:
        opened.seek(start)
        done = 0
        while done < size:
            count = opened.readinto(memoryview(values)[done:])
            if not count:
                raise OSError(f"{file} ends before {name} does; it has changed since it was opened.")
            done += count
    return torch.frombuffer(values, dtype=spec.dtype).view(shape) if size else torch.empty(shape, dtype=spec.dtype)


def read_extremes(spec: Spec, file: Path) -> tuple[Shaped[Tensor, ""], Shaped[Tensor, ""]]:
    """Gives the smallest and the largest value of a tensor, piece by piece: a view would leave all of it in memory."""
    buffer, left, found = memoryview(bytearray(PIECE)), spec.nbytes, list[Tensor]()
    with file.open("rb", buffering=0) as opened:
        opened.seek(spec.start)
        while left:
            part = buffer[: min(PIECE, left)]
            if opened.readinto(part) != len(part):
                raise OSError(f"{file} is shorter than its header says; it has changed since it was opened.")
            found.extend(torch.aminmax(torch.frombuffer(part, dtype=spec.dtype)))
            left -= len(part)
    return torch.aminmax(torch.stack(found))


def no_tensor(folder: Path, name: str, names: Iterable[str]) -> KeyError:
    """What to raise for a name that is not there."""
    near = near_misses(name, names)
    return KeyError(f"{folder} holds no tensor {name}" + (f"; near misses: {near}" if near else ""))
