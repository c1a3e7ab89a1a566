"""Under which names the matrices of a model are stored, found without `layouts`."""

import re
from collections.abc import Container
from typing import NamedTuple

BANK = re.compile(r"^(.*\.experts)\.(gate_up|down)_proj$")
TEXT = "language_model."


class Stored(NamedTuple):
    """Where a matrix is.

    Attributes:
        roles: Names on disk by what they are.
        expert: Which slice of them it is; None for all.
        turned: Whether they are [in, out].
    """

    roles: dict[str, str]
    expert: int | None = None
    turned: bool = False


ROLES = (
    *("weight", "weight_packed", "weight_scale", "weight_scale_2", "weight_global_scale", "weight_zero_point"),
    *("weight_g_idx", "scales", "biases", "weight.absmax", "weight.quant_map", "weight.nested_absmax"),
    *("weight.nested_quant_map", "weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4"),
)


def places(names: Container[str], name: str, expert: int | None) -> list[Stored]:
    """Gives where a tensor of the model, or one expert of it, is stored: one place, or gate and up.

    Args:
        names: All names on disk.
        name: Of the tensor in the model, as transformers calls it.
        expert: Which expert of a bank; None for any other tensor.

    Raises:
        KeyError: if it is stored in no way that is known here.
    """
    for spelled in (name, TEXT + name, name.removeprefix(TEXT)):
        if found := _places(names, spelled, expert):
            return found
    raise KeyError(f"{name} is stored in no way that the second decoder knows.")


def _places(names: Container[str], name: str, expert: int | None) -> list[Stored]:
    bank = BANK.match(name)
    if bank is None or expert is None:
        return _linear(names, name.removesuffix(".weight")) or [Stored({"weight": name})] * (name in names)
    if name in names:
        ends = {"weight": "", "weight_scale": "_weight_scale", "weight_scale_2": "_weight_scale_2"}
        roles = {role: name + end for role, end in ends.items() if name + end in names}
        if f"{name}_scale" in names:
            roles["weight_scale"] = f"{name}_scale"
        return [Stored(roles, expert, turned=True)]
    parts = ("down_proj",) if bank[2] == "down" else ("gate_proj", "up_proj")
    own = [_linear(names, f"{bank[1]}.{expert}.{part}") for part in parts]
    stacked = [_linear(names, f"{bank[1]}.{part}", expert) for part in parts]
    return next(([place for found in each for place in found] for each in (own, stacked) if all(each)), [])


def _linear(names: Container[str], base: str, expert: int | None = None) -> list[Stored]:
    roles = {role: f"{base}.{role}" for role in ROLES if f"{base}.{role}" in names}
    return [Stored(roles, expert)] * ("weight" in roles or "weight_packed" in roles)
