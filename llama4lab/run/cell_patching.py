"""One cell of a sweep as patches for a single run."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.run.hook_names import router_of
from llama4lab.run.metrics import BoundMetric
from llama4lab.run.pairing import Mapped, Side, paired
from llama4lab.run.patching import patched
from llama4lab.run.recording import record
from llama4lab.run.run import Run
from llama4lab.run.selection import Selector
from llama4lab.run.size import shape as shape_of
from llama4lab.run.substitution import Source, Substitution, Values, as_tokens, from_tokens, place_axis, substituted
from llama4lab.run.sweep_axes import Value
from llama4lab.run.sweep_plan import SweepPlan, planned

NO_METRIC = BoundMetric("none", [0], lambda logits, rows: logits[:, 0, 0])


def cell_patches(
    model: HookedPreTrainedModel,
    clean: Any,
    corrupted: Any = None,
    *,
    at: Selector,
    cell: Mapping[str, Value],
    values: Values = "other",
    into: Side = "corrupted",
    align: Mapped | None = None,
) -> dict[str, Callable[[Tensor], Tensor]]:
    """Gives what one cell of `sweep` does as patches for `patched`, to look closer at what it changes:

        with lab.patched(model, lab.cell_patches(model, clean, corrupted, at=at, cell={"layer": 3, "head": 1})):
            run = lab.record(model, corrupted, at="layers.*.self_attn.pattern")

    Args:
        model: The model.
        clean: As in `sweep`.
        corrupted: As in `sweep`.
        at: As in `sweep`.
        cell: Axis -> value, for the axes of the sweep.
        values: As in `sweep`.
        into: As in `sweep`.
        align: As in `sweep`.
    """
    pair = paired(model, clean, clean if corrupted is None else corrupted, align)
    has_source = corrupted is not None
    over = {axis: [value] for axis, value in cell.items()}
    plan = planned(model, pair, into, at, over, values, (NO_METRIC, NO_METRIC if has_source else None))
    return patches_of(plan, 0, recorded_source(plan))


def recorded_source(plan: SweepPlan) -> Run | None:
    """The source run, with what the plan takes from it."""
    if plan.source is None or not (isinstance(plan.values, str) or callable(plan.values)):
        return None
    routes = {router_of(name) for name, entries in plan.substitutions.items() if entries.expert is not None}
    return record(plan.model, plan.source, [*plan.names, *routes])


def patches_of(plan: SweepPlan, cell: int, source: Run | None) -> dict[str, Callable[[Tensor], Tensor]]:
    """The patches of one cell: hook point -> function of its tensor."""
    found: dict[str, Callable[[Tensor], Tensor]] = {}
    routes: dict[str, Tensor] = {}
    for name, entries in plan.substitutions.items():
        kept = entries.unit // plan.num_rows == cell
        if not bool(kept.any()):
            continue
        found[name] = _patch(plan, name, kept, source, routes)
        if entries.expert is not None:
            router = router_of(name)
            found[router] = _remembering(router, found.get(router), routes)
    return found


def _patch(
    plan: SweepPlan, name: str, kept: Tensor, source: Run | None, routes: Mapping[str, Tensor]
) -> Callable[[Tensor], Tensor]:
    entries: Substitution = plan.substitutions[name].only(kept)
    places = shape_of(plan.model, plan.base, name, entries.shape)[place_axis(entries.shape.split())]
    router, their_routes = router_of(name), None
    if name in plan.constants:
        tokens = plan.constants[name]
    else:
        tokens = None if source is None else as_tokens(source[name], entries.shape)
        if source is not None and entries.expert is not None:
            their_routes = as_tokens(source[router], source.shapes[router])
    theirs = Source(tokens, plan.source_at[name][kept], their_routes)

    def patch(tensor: Tensor) -> Tensor:
        at = (entries.lead * places + entries.place).to(tensor.device)
        new = substituted(as_tokens(tensor, entries.shape), at, entries, theirs, plan.values, routes.get(router))
        return from_tokens(new, entries.shape, tensor)

    return patch


def _remembering(
    name: str, patch: Callable[[Tensor], Tensor] | None, routes: dict[str, Tensor]
) -> Callable[[Tensor], Tensor]:
    """Notes which experts the tokens are sent to, after a patch of the routes themselves."""

    def note(tensor: Tensor) -> Tensor:
        new = tensor if patch is None else patch(tensor)
        routes[name] = new.flatten(0, 1)
        return new

    return note


@torch.no_grad()
def single_runs(plan: SweepPlan, cell: int, source: Run | None) -> Tensor:
    """The logits `[row, position, vocab]` of one cell, by an ordinary run of the whole model."""
    with patched(plan.model, patches_of(plan, cell, source)):
        return record(plan.model, plan.base).logits[:, plan.metrics[0].positions]
