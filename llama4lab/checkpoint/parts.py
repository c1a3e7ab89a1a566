"""The parts of a stored matrix: which must be there, in which shape and dtype, before it is read."""

from collections.abc import Mapping
from typing import NamedTuple

import torch

from llama4lab.checkpoint.matrices import Matrix, Part
from llama4lab.checkpoint.schemes.scheme import Scheme, Shape
from llama4lab.checkpoint.tensor_files import TensorFiles

PLAIN_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
WHOLE = (torch.int32, torch.int64)


class Wanted(NamedTuple):
    """What a part must be.

    Attributes:
        name: On disk.
        shape: Of one matrix.
        dtypes: In which it may be stored.
        within: The lowest and the highest value that makes sense; None for any number.
    """

    name: str
    shape: Shape
    dtypes: tuple[torch.dtype, ...] = PLAIN_DTYPES
    within: tuple[float | int, float | int] | None = None


class Slice(NamedTuple):
    """Which of several matrices that are stacked in the same tensors.

    Attributes:
        index: Of it; None if it is stored by itself.
        count: How many there are; None if that is not known.
    """

    index: int | None = None
    count: int | None = None


def assembled(
    files: TensorFiles,
    wanted: Mapping[str, Wanted],
    scheme: Scheme,
    shape: tuple[int, int],
    which: Slice,
) -> Matrix:
    """Gives a matrix whose parts are all there as they must be.

    Args:
        files: The files.
        wanted: The parts by what they are for the scheme.
        scheme: What makes numbers of them.
        shape: Of the matrix, out and in.
        which: Of those that are stacked.

    Raises:
        ValueError: if a part is missing, or has another shape or dtype.
    """
    found: dict[str, Part] = {}
    for role, part in wanted.items():
        if part.name not in files:
            beside = next(other.name for other in wanted.values() if other.name in files)
            raise without(files, beside, part.name)
        _check_shape(files, part, scheme, shape, which)
        dtype = files.spec(part.name).dtype
        if dtype not in part.dtypes:
            raise ValueError(
                f"{files.place(part.name)} is stored as {_short(dtype)}; for a matrix in {scheme.name} it "
                f"is {' or '.join(map(_short, part.dtypes))}."
            )
        single = len(files.spec(part.name).shape) == len(part.shape)
        found[role] = Part(part.name, None if single else which.index, part.within)
    return Matrix(found, scheme, shape)


def without(files: TensorFiles, name: str, missing: str) -> ValueError:
    """What to raise for a tensor that cannot be read without another one."""
    return ValueError(
        f"{files.place(name)} is stored without its {missing}; it cannot be read.\n"
        "The file is damaged or belongs to another one; download or save it again."
    )


def columns_of(files: TensorFiles, scale: str, groups: int, columns: int) -> int:
    """Gives how many columns each of so many groups has.

    Raises:
        ValueError: if they do not divide.
    """
    if groups < 1 or columns % groups:
        raise ValueError(
            f"{files.file(scale)}: {scale} has {groups} groups for {columns} columns, which do not divide.\n"
            "The file is damaged, or config.json belongs to another one."
        )
    return columns // groups


def must_divide(files: TensorFiles, name: str, columns: int, group: int) -> None:
    """Raises ValueError when columns cannot be split into groups of that size."""
    if columns % group:
        raise ValueError(
            f"{files.place(name)} has {columns} columns by config.json, which groups of {group} do not divide."
        )


def _check_shape(files: TensorFiles, part: Wanted, scheme: Scheme, shape: tuple[int, int], which: Slice) -> None:
    """A number for the whole tensor has no axis of experts; anything else has one if matrices are stacked."""
    stored = files.spec(part.name).shape
    count = which.count or (stored or (0,))[0]
    stacked = which.index is not None and which.index < count and stored == (count, *part.shape)
    single = stored == part.shape and (which.index is None or not part.shape)
    if not (stacked or single):
        each = "" if which.index is None else f" for each of {which.count or 'all'} experts"
        raise ValueError(
            f"{files.place(part.name)} has shape {list(stored)}; for a matrix {list(shape)} in "
            f"{scheme.name} it is {list(part.shape)}{each}."
        )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
