"""Numbers that the running model uses, beside those that a second decoder makes of the bytes on disk."""

import copy
import math
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import pandas as pd
import torch
from accelerate.utils import align_module_device
from jaxtyping import Float
from torch import Tensor

from llama4lab.checkpoint.layouts import Shape, is_bank
from llama4lab.checkpoint.second.reading import SecondDecoder, SecondMatrix
from llama4lab.checkpoint.tensor_files import TensorFiles
from llama4lab.model.expert_bank import ExpertBank, Source
from llama4lab.model.expert_store import Stored
from llama4lab.model.packed_linear import PackedLinear
from llama4lab.model.packed_matrix import PackedMatrix
from llama4lab.model.pretrained import HookedPreTrainedModel

SHARE_OF_EXPERTS = 0.75
# How far rounding to a method moves a number at most, as a share of the largest of its row; see `schemes.encoding`.
STEPS = {"int4": 1 / 7.5, "int8": 1 / 127.5, "float8": 1 / 16}
COLUMNS = ["name", "expert", "scheme", "rounded_to", "shape", "max_abs_difference", "relative_error", "equal", "ok"]


class Choice(NamedTuple):
    """A tensor of the model, or one expert's matrix of it."""

    name: str
    expert: int | None


def chosen(shapes: Mapping[str, Shape], count: int | None, seed: int) -> list[Choice]:
    """Chooses what is checked, in the order of the model: every vector and router, and matrices at random.

    Args:
        shapes: Of the tensors of the model.
        count: How many matrices; three in four are those of experts, as far as there are so many. None takes all.
        seed: Of the random choice.
    """
    every = [
        Choice(name, expert)
        for name, shape in shapes.items()
        for expert in (range(shape[0]) if is_bank(name, shape) else [None])
    ]
    fixed = [choice for choice in every if len(shapes[choice.name]) == 1 or choice.name.endswith(".router.weight")]
    experts = [choice for choice in every if choice.expert is not None]
    others = [choice for choice in every if choice.expert is None and choice not in fixed]
    if count is None or count >= len(experts) + len(others):
        return every
    rng = random.Random(seed)
    most = max(math.ceil(SHARE_OF_EXPERTS * count), count - len(others))
    drawn = rng.sample(experts, min(most, len(experts)))
    drawn += rng.sample(others, count - len(drawn))
    wanted = {*fixed, *drawn}
    return [choice for choice in every if choice in wanted]


def checked_numbers(
    model: HookedPreTrainedModel, files: TensorFiles, shapes: Mapping[str, Shape], choices: list[Choice]
) -> pd.DataFrame:
    """Compares chosen tensors of a model with the files it came from; columns as in `verify`."""
    lines, decoder = [], SecondDecoder(files)
    with torch.no_grad():
        for name, expert in choices:
            second = decoder.matrix(name, shapes[name], expert)
            used, scheme = used_numbers(model, name, expert)
            rounded_to = scheme if second.scheme == "plain" else ""
            found = _differences(used.reshape(second.shape) if expert is None else used, second, rounded_to)
            kind = {"name": name, "expert": expert, "scheme": second.scheme, "rounded_to": rounded_to}
            shape = second.shape if expert is not None else shapes[name]
            lines.append(kind | {"shape": str(list(shape))} | found)
    table = pd.DataFrame(lines, columns=COLUMNS)
    return table.astype({"expert": "Int64", "equal": bool, "ok": bool})


def used_numbers(model: HookedPreTrainedModel, name: str, expert: int | None) -> tuple[Float[Tensor, "..."], str]:
    """Gives a tensor as the model uses it now, an expert's matrix as [out, in], and its scheme; "" for plain numbers.

    Raises:
        ValueError: if the model does not have it any more.
    """
    path, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(path)
        holder = module if isinstance(module, PackedLinear) and leaf == "weight" else getattr(module, leaf)
        if isinstance(holder, PackedLinear | ExpertBank):
            packed = _fetched(holder.source, expert or 0)
            scheme = "" if packed.matrices[0].is_plain else packed.matrices[0].scheme.name
            return packed.dense(holder.dtype).cpu(), scheme
        with align_module_device(module):
            numbers = getattr(module, leaf).detach()
            return (numbers if expert is None else numbers[expert].T).cpu(), ""
    except AttributeError as error:
        raise ValueError(f"The checkpoint has {name}, the model does not: its modules were exchanged.") from error


def _fetched(source: Source, expert: int) -> PackedMatrix:
    """What the next pass would use. A store is left as it is: what it holds is looked at, all else read past it."""
    if not isinstance(source, Stored):
        return source.matrix(expert)
    held = (tier.held.get(source.wanted[expert].key) for tier in source.store.tiers.values())
    return next((matrix for matrix in held if matrix is not None), None) or source.fresh(expert)


def _differences(used: Float[Tensor, "d_out d_in"], second: SecondMatrix, rounded_to: str) -> dict[str, object]:
    """Compares strip by strip, so that little is in memory twice."""
    step = next((step for method, step in STEPS.items() if rounded_to.startswith(method)), 0.0)
    largest, squares, norm, equal, near = 0.0, 0.0, 0.0, True, True
    for first, strip in second.strips():
        own = used[first : first + len(strip)]
        other = torch.from_numpy(strip).to(used.dtype)
        norm += float(other.float().norm()) ** 2
        if torch.equal(own, other):
            continue
        equal = False
        apart = (own.double() - other.double()).abs().nan_to_num(nan=torch.inf)
        largest, squares = max(largest, float(apart.max())), squares + float(apart.square().sum())
        limit = 1.01 * (step + torch.finfo(used.dtype).eps) * other.double().abs().amax(1)
        near = near and bool((apart.amax(1) <= limit).all())
    relative = math.sqrt(squares / norm) if norm else (0.0 if equal else math.inf)
    fine = near if rounded_to else equal
    return {"max_abs_difference": largest, "relative_error": relative, "equal": equal, "ok": fine}


@contextmanager
def uncounted(model: HookedPreTrainedModel) -> Iterator[None]:
    """Leaves the counts of a model's store as they were."""
    before = None if model.store is None else copy.copy(model.store.traffic)
    try:
        yield
    finally:
        if model.store is not None and before is not None:
            vars(model.store.traffic).update(vars(before))
