"""The weights of a layer's experts that are not held as one tensor: packed in memory, or fetched when they are used."""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from llama4lab.model.packed_matrix import PackedMatrix, product


@runtime_checkable
class Source(Protocol):
    """Where the matrices of experts come from, or the one matrix of a linear map, which is asked for as 0."""

    @property
    def shape(self) -> tuple[int, int]:
        """Out and in, of one matrix."""
        ...

    @property
    def scheme(self) -> str:
        """How they are stored, in words."""
        ...

    @property
    def device(self) -> torch.device:
        """Where they are used."""
        ...

    def expect(self, experts: Sequence[int]) -> None:
        """Is told which will be asked for next, in that order."""
        ...

    def matrix(self, expert: int) -> PackedMatrix:
        """Gives the matrix of an expert, on the device to compute on."""
        ...

    def to(self, device: torch.device) -> "Source":
        """Gives the same for another device."""
        ...


class Held:
    """Matrices that are all in memory."""

    def __init__(self, matrices: Sequence[PackedMatrix]):
        self.matrices = list(matrices)

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrices[0].shape

    @property
    def scheme(self) -> str:
        return self.matrices[0].matrices[0].scheme.name

    @property
    def device(self) -> torch.device:
        return self.matrices[0].device

    def expect(self, experts: Sequence[int]) -> None:
        pass

    def matrix(self, expert: int) -> PackedMatrix:
        return self.matrices[expert]

    def to(self, device: torch.device) -> "Held":
        return Held([matrix.to(device) for matrix in self.matrices])


class ExpertBank:
    """Reads like a tensor [expert, in, out] of which one expert is taken at a time: `bank[expert]` makes its numbers.

    Args:
        source: Where the matrices come from.
        shape: Experts, in, out.
        dtype: To compute in.
        device: To compute on.
    """

    requires_grad = False

    def __init__(self, source: Source, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device):
        self.source, self.shape, self.dtype, self.device = source, shape, dtype, device

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, expert: int) -> Float[Tensor, "d_in d_out"]:
        """The numbers of one expert.

        Raises:
            IndexError: if there is no such expert.
        """
        return self._dense(expert, self.dtype).T

    def detach(self) -> "ExpertBank":
        """The bank: its numbers carry no gradient."""
        return self

    def products(
        self, parts: Sequence[Float[Tensor, "_ d_in"]], experts: Sequence[int]
    ) -> list[Float[Tensor, "_ d_out"]]:
        """Gives the rows of each part times the weight of its expert. Each expert is fetched once."""
        own: dict[int, list[int]] = {}
        for place, expert in enumerate(experts):
            own.setdefault(expert, []).append(place)
        self.source.expect(list(own))
        found: dict[int, Tensor] = {}
        for expert, places in own.items():
            make = self._maker(expert, parts[places[0]])
            weight = make()
            found |= {place: product(parts[place], made_once(weight, make)) for place in places}
            del weight
        return [found[place] for place in range(len(parts))]

    def moved(self, fn: Callable[[Tensor], Tensor]) -> "ExpertBank":
        """Gives the bank for another device or dtype, as `nn.Module.to` asks for it."""
        like = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        return ExpertBank(self.source.to(like.device), self.shape, like.dtype, like.device)

    def _maker(self, expert: int, like: Tensor) -> Callable[[], Tensor]:
        dtype, device = like.dtype, like.device
        return lambda: self._dense(expert, dtype).to(device)

    def _dense(self, expert: int, dtype: torch.dtype) -> Float[Tensor, "d_out d_in"]:
        if not -len(self) <= expert < len(self):
            raise IndexError(f"Expert {expert} was asked for; there are experts 0 to {len(self) - 1}.")
        return self.source.matrix(expert % len(self)).dense(dtype)


def made_once(weight: Tensor, make: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Gives what is there already on the first call, and makes it anew on each later one: nothing is kept."""
    given = [weight]
    return lambda: given.pop() if given else make()
