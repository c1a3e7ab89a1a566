"""The plan of a sweep: what each cell replaces, in which row, at which tokens, and where it begins to differ.

A *unit* is a cell in one row of the pair: unit `cell * rows + row`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.prompt.prompt import Prompt
from llama4lab.run.counterparts import check_counterparts
from llama4lab.run.hook_names import is_vision, layer_of
from llama4lab.run.metrics import BoundMetric
from llama4lab.run.pairing import Pair, Side, other_side
from llama4lab.run.selection import Selector, selected
from llama4lab.run.size import shape as shape_of
from llama4lab.run.substitution import Substitution, Values, as_tokens
from llama4lab.run.sweep_axes import Cells, Over, Target, cells
from llama4lab.run.sweep_engine.vision_pass import check_names, image_places, vision_entry
from llama4lab.run.sweep_entries import OTHER, Entries, axis_sizes, same_tiles, usable_tokens

NEVER = 10**6


@dataclass(frozen=True, eq=False)
class SweepPlan:
    """Everything that an engine has to know.

    Attributes:
        model: The model.
        pair: The two prompts.
        into: The one that is patched, the *base*; the other one is the *source*.
        cells: The cells.
        names: The hook points, in the order of the forward pass.
        values: What is put in; see `substituted`.
        metrics: The metric for the base and for the source prompt; the latter None if there is no source.
        substitutions: Hook point -> what is replaced there.
        source_at: Hook point -> for each entry the token of the source run (or of `constants`).
        constants: Hook point -> values of every token of the base run, where `values` is a mapping.
        row: The row of each unit.
        entry: The text layer in which each unit begins to differ; the number of layers for one behind them.
        columns: The first and the last column that each unit patches; -1 for a unit that patches nothing.
        vision_entry: The layer of the vision tower at which each unit begins; a large number for none.
    """

    model: HookedPreTrainedModel
    pair: Pair
    into: Side
    cells: Cells
    names: list[str]
    values: Values
    metrics: tuple[BoundMetric, BoundMetric | None]
    substitutions: dict[str, Substitution]
    source_at: dict[str, Tensor]
    constants: dict[str, Tensor]
    row: np.ndarray
    entry: np.ndarray
    columns: tuple[np.ndarray, np.ndarray]
    vision_entry: np.ndarray

    @property
    def base(self) -> Prompt:
        """The prompt that is patched."""
        return self.pair.prompt(self.into)

    @property
    def source(self) -> Prompt | None:
        """The prompt that values come from, or None."""
        return None if self.metrics[1] is None else self.pair.prompt(other_side(self.into))

    @property
    def num_rows(self) -> int:
        """Rows of the pair."""
        return len(self.base)


def planned(
    model: HookedPreTrainedModel,
    pair: Pair,
    into: Side,
    at: Selector,
    over: Over,
    values: Values,
    metrics: tuple[BoundMetric, BoundMetric | None],
) -> SweepPlan:
    """Works out the plan.

    Raises:
        ValueError: if hook points, axes or values do not fit each other, the model or the prompts.
    """
    base, points = pair.prompt(into), model.hook_points()
    names = selected(points, at)
    check_names(points, names, base)
    shapes = {name: points[name] for name in names}
    usable = usable_tokens(pair, into, values)
    found = cells(shapes, over, {name: axis_sizes(model, base, name, shapes[name]) for name in names})
    _check_values(values, shapes, pair, metrics[1] is not None)
    other = pair.prompt(other_side(into)).input_ids.shape[1]
    equal = same_tiles(pair) if isinstance(values, str) else np.zeros(0)
    maker = Entries(model, base, usable, pair.sources(into), other, equal)
    by_name: dict[str, list[tuple[int, Target]]] = {name: [] for name in names}
    for cell, targets in enumerate(found.targets):
        for target in targets:
            by_name[target.name].append((cell, target))
    substitutions, source_at = {}, {}
    for name in names:
        substitutions[name] = maker.entries(name, shapes[name], by_name[name])
        source_at[name] = maker.source_at(substitutions[name], constant=isinstance(values, Mapping))
    constants = {}
    if isinstance(values, Mapping):
        constants = {name: _constant(model, base, substitutions[name], values[name]) for name in names}
    units = np.arange(len(found) * len(base))
    return SweepPlan(
        *(model, pair, into, found, names, values, metrics, substitutions, source_at, constants),
        units % len(base),
        *_places(model, substitutions, maker, len(units), whole=not isinstance(values, str)),
    )


def text_entry(name: str, num_layers: int) -> int:
    """The text layer that has to be computed first when a hook point is patched."""
    layer = layer_of(name)
    if is_vision(name) or name in ("embed", "embed_merged"):
        return 0
    if layer is None:
        return num_layers
    return layer + 1 if name.endswith(".resid_post") else layer


def _check_values(values: Values, shapes: Mapping[str, str], pair: Pair, has_source: bool) -> None:
    if isinstance(values, str) and values != OTHER:
        raise ValueError(f'values={values!r} is unknown. Pass "other", a number, a mapping of names, or a function.')
    if isinstance(values, Mapping):
        missing = [name for name in shapes if name not in values]
        if missing:
            raise ValueError(f"values has no tensor for {missing[0]!r}; it has {', '.join(list(values)[:4])}.")
    if (values == OTHER or callable(values)) and not has_source:
        raise ValueError("Without a corrupted prompt there is no other run.\nPass values=0, a mapping, or a prompt.")
    routed = [name for name in shapes if name.endswith("router.indices")]
    if routed and isinstance(values, float):
        raise ValueError(f"{routed[0]!r} holds expert indices; values={values} is no whole number.")
    if values == OTHER or callable(values):
        check_counterparts(pair, shapes)


def _constant(model: HookedPreTrainedModel, base: Prompt, entries: Substitution, value: Tensor) -> Tensor:
    """A given value at every token of the base run; where cells are experts, of what an expert adds, without slots."""
    full, words = shape_of(model, base, entries.name, entries.shape), entries.shape.split()
    if entries.expert is not None:
        full = tuple(size for size, word in zip(full, words, strict=True) if word != "slot")
        words = [word for word in words if word != "slot"]
    value = torch.as_tensor(value)
    try:
        return as_tokens(value.expand(full), " ".join(words))
    except RuntimeError:
        raise ValueError(
            f"The value for {entries.name!r} has shape {list(value.shape)}; it must broadcast to {list(full)} "
            f"({' '.join(words)})."
        ) from None


def _places(
    model: HookedPreTrainedModel,
    substitutions: Mapping[str, Substitution],
    maker: Entries,
    num_units: int,
    *,
    whole: bool,
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray], np.ndarray]:
    """Entry, first and last column and vision entry of every unit."""
    text_layers = len(model.text.layers)
    entry, vision = np.full(num_units, text_layers), np.full(num_units, NEVER)
    first, last = np.full(num_units, NEVER), np.full(num_units, -1)
    image = image_places(model, maker.base)
    for name, entries in substitutions.items():
        unit = entries.unit.numpy()
        np.minimum.at(entry, unit, text_entry(name, text_layers))
        low = high = entries.place.numpy()
        if is_vision(name):
            assert image is not None
            depth = len(cast(Any, model.vision).model.layers)
            np.minimum.at(vision, unit, vision_entry(name, depth))
            low, high = image[entries.lead.numpy(), :, 1].min(1), image[entries.lead.numpy(), :, 1].max(1)
        elif "key" in entries.shape.split() and whole:
            # A function or a number may let a token look anywhere.
            high = np.full(len(unit), maker.usable.shape[1] - 1)
        np.minimum.at(first, unit, low)
        np.maximum.at(last, unit, high)
    return entry, (first, last), vision
