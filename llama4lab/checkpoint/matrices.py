"""One matrix of a model as a checkpoint stores it: which tensors hold it, and what makes numbers of them."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from llama4lab.checkpoint.schemes.plain import Plain
from llama4lab.checkpoint.schemes.scheme import Scheme
from llama4lab.checkpoint.tensor_files import TensorFiles


@dataclass(frozen=True)
class Part:
    """A tensor on disk, or one expert's slice of it.

    Attributes:
        name: On disk.
        index: Of the slice along the first axis; None for the whole tensor.
        within: The lowest and the highest value that makes sense; None for any number.
    """

    name: str
    index: int | None = None
    within: tuple[float | int, float | int] | None = None


@dataclass(frozen=True)
class Matrix:
    """A matrix [out, in].

    Attributes:
        parts: The stored tensors by what they are for the scheme.
        scheme: What makes numbers of them.
        shape: Out and in.
        turned: Whether the stored tensors are [in, out].
    """

    parts: Mapping[str, Part]
    scheme: Scheme
    shape: tuple[int, int]
    turned: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether it is stored as numbers."""
        return isinstance(self.scheme, Plain)

    def read(self, shards: TensorFiles) -> dict[str, Tensor]:
        """Reads the bytes of the matrix, and no others, into memory of their own.

        Raises:
            ValueError: if a number among them is NaN or infinite, or makes no sense for what it is.
        """
        tensors = {role: shards.read(part.name, part.index) for role, part in self.parts.items()}
        return self._checked(tensors, shards)

    def mapped(self, shards: TensorFiles) -> dict[str, Tensor]:
        """Gives its tensors as views of the file.

        Raises:
            ValueError: if a number among them is NaN or infinite, or makes no sense for what it is.
        """
        tensors: dict[str, Tensor] = {}
        for role, part in self.parts.items():
            whole = shards[part.name]
            tensors[role] = whole if part.index is None else whole[part.index]
        return self._checked(tensors, shards)

    def dense(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Float[Tensor, "d_out d_in"]:
        """Gives the numbers, from what `read` or `mapped` gave, on its device.

        Raises:
            ValueError: if a number is too large for float16.
        """
        stored = {role: tensor.T if self.turned and tensor.ndim == 2 else tensor for role, tensor in tensors.items()}
        numbers = self.scheme.dense(stored, self.shape).to(dtype)
        if dtype == torch.float16 and not _is_finite(numbers):  # the only one with a smaller range than scales have
            name = self.parts[next(iter(self.parts))].name
            raise ValueError(f"{name} holds values too large for {dtype}; load it in another dtype.")
        return numbers

    def _checked(self, tensors: dict[str, Tensor], shards: TensorFiles) -> dict[str, Tensor]:
        for role, tensor in tensors.items():
            if tensor.is_floating_point() and not _is_finite(tensor):
                raise ValueError(
                    f"{shards.place(self.parts[role].name)} holds values that are NaN or infinite; the file is damaged."
                )
            if (within := self.parts[role].within) is not None and tensor.numel():
                low, high = (value.item() for value in torch.aminmax(tensor))
                if low < within[0] or high > within[1]:
                    place, found = shards.place(self.parts[role].name), low if low < within[0] else high
                    raise ValueError(
                        f"{place} holds {found}; it must lie between {within[0]} and {within[1]}. The file is damaged."
                    )
        return tensors

    def nbytes(self, shards: TensorFiles) -> int:
        """How many bytes it takes on disk."""
        return sum(shards.nbytes(part.name, part.index) for part in self.parts.values())


def _is_finite(values: Float[Tensor, "..."]) -> bool:
    if values.dtype == torch.float8_e4m3fn:  # all bits but the sign are set in its NaNs; it has no infinity
        return not bool((values.contiguous().view(torch.uint8) & 0x7F == 0x7F).any())
    if values.dtype.itemsize == 1:
        return bool(values.float().isfinite().all())
    return not values.numel() or bool(torch.stack(torch.aminmax(values)).isfinite().all())
