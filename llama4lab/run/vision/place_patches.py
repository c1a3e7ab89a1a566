"""Patches that replace single places of a hook point, given by two indices, and leave all others as they are."""

from collections.abc import Callable

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from llama4lab.run.patching import replacement
from llama4lab.run.run import Run

Places = tuple[Int[Tensor, " place"], Int[Tensor, " place"]]
Patching = Callable[[Tensor], Tensor]


def putting(name: str, places: Places, values: Shaped[Tensor, "place ..."]) -> Patching:
    """Gives a patch that puts one value into each place."""

    def put(old: Tensor) -> Tensor:
        _check_reach(name, old, places)
        if values.shape[1:] != old.shape[2:]:
            raise ValueError(
                f"The values for {name!r} have shape {list(values.shape[1:])} at each place; the hook point has "
                f"{list(old.shape[2:])}.\nTake them from a run of the same model."
            )
        new = old.clone()
        new[_on(old, places)] = values.to(old.device, old.dtype)
        return new

    return put


def filling(name: str, places: Places, value: Shaped[Tensor, "..."]) -> Patching:
    """Gives a patch that fills places with what a tensor, broadcast to the hook point's shape, has there.

    Raises:
        ValueError: if the value holds NaN; the patch raises it if the value does not fit.
    """
    replace = replacement(name, value)

    def fill(old: Tensor) -> Tensor:
        _check_reach(name, old, places)
        index, new = _on(old, places), old.clone()
        new[index] = replace(old)[index]
        return new

    return fill


def taken(run: Run, name: str, places: Places) -> Shaped[Tensor, "place ..."]:
    """Gives what a run has at places that count in its prompt, as tensors of an uncut run do.

    Raises:
        ValueError: if the run was cut and lacks one of them.
    """
    lead, place = places
    if run.shapes[name].startswith("batch"):
        lead, place = _found(run.rows, lead, "row"), _found(run.positions, place, "position")
    values = run[name].detach()
    return values[_on(values, (lead, place))]


def _found(has: list[int], wanted: Int[Tensor, " place"], what: str) -> Int[Tensor, " place"]:
    """The index in a cut run of rows or positions of its prompt."""
    missing = sorted(set(wanted.tolist()) - set(has))
    if missing:
        raise ValueError(f"The region has {what} {missing[0]}, which was cut from the run. Take the whole run.")
    index = {number: i for i, number in enumerate(has)}
    return torch.tensor([index[number] for number in wanted.tolist()], dtype=torch.long)


def _on(tensor: Tensor, places: Places) -> Places:
    lead, place = places
    return lead.to(tensor.device), place.to(tensor.device)


def _check_reach(name: str, old: Tensor, places: Places) -> None:
    """Refuses a pass that does not have all places: another prompt, or a step of generation."""
    needed = [int(index.max()) + 1 for index in places]
    if old.shape[0] < needed[0] or old.shape[1] < needed[1]:
        raise ValueError(
            f"The region reaches to place {[n - 1 for n in needed]} of {name!r}, which has only {list(old.shape[:2])} "
            "in this pass.\nRun the prompt that the region was made for, as a whole."
        )
