"""How strongly an expert answers to its gate."""

from collections.abc import Callable, Sequence
from typing import Any, Unpack

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.run.alternatives import Given, Running, alone_in_its_row, line_outcomes
from llama4lab.run.metrics import Metric, loss
from llama4lab.run.routes.expert_outputs import ROUTED, RoutedSlots, expert_outputs, routed_slots
from llama4lab.tables.routing.counterfactuals import about, placed, running

GATES = tuple(np.linspace(0, 1.5, 16).tolist())


class CurveOptions(Running, total=False):
    """What is fed otherwise; see `gate_curve`."""

    slot: int | None


def gate_curve(
    model: HookedPreTrainedModel,
    prompt: Any,
    *,
    layer: int | Sequence[int] | None,
    position: int | Sequence[int] | None,
    gates: Sequence[float | int] | np.ndarray | None = None,
    metric: Metric | Callable[[Tensor], Tensor] | None = None,
    **options: Unpack[CurveOptions],
) -> pd.DataFrame:
    """Feeds the chosen expert of one token at a time with other gates: what it writes, and the metric that follows.

    The gate of Llama 4 multiplies the input x of an expert f, so an expert writes f(g x), not g f(x). An expert is a
    gated MLP, a product of two factors which both shrink with g: for small gates it answers nearly by the square.

    Args:
        model: The model.
        prompt: A `Prompt`, or anything that `model.prompt` takes.
        layer: A layer with experts, several, or None for all.
        position: A position, several, or None for all; negative ones count from the end.
        gates: The gates; by default 16 from 0 to 1.5. A router gives gates between 0 and 1. The own gate is added.
        metric: One of `lab.metrics`, or a function of the logits. By default `lab.metrics.loss()`; see
            `counterfactual`.
        options: `slot`: which of the token's choices is fed otherwise, 0 (the best) by default, None for each in turn.
            `memory` and `progress`: as in `counterfactual`.

    Columns:
        row, layer, position, token, slot: the place; padding is left out.
        expert: the chosen expert.
        gate: the factor on its input.
        own: whether it is the gate that the router gave; each place has one such line.
        gain: |f(gate x)| / |f(own gate x)|; missing if the expert writes nothing by its own gate.
        cosine: between both; missing where one of them is 0.
        value: the metric of the row.
        effect: `value` minus that with the own gate.

    Lines of a place are in the order of their gates. `attrs` has `metric`, `lower_is_better` and `num_experts`.

    Raises:
        ValueError: if a layer is dense, or gates are no finite numbers.
        IndexError: if there is no such layer, position or slot.
    """
    metric = loss() if metric is None else metric
    slots = routed_slots(model, prompt, layer, position, options.get("slot", 0))
    place, gate, own = _lines(slots, _checked(GATES if gates is None else gates))
    cell = alone_in_its_row(slots.row[place], ~own, metric)
    given = _given(slots, place, gate, cell)
    found = line_outcomes(model, slots.run.prompt, given, slots.row[place], cell, metric, **running(options))
    gain, cosine = _answers(model, slots, place, gate, own)
    value = found.value.double().numpy()
    columns = {
        **placed(slots, place),
        "expert": slots.expert[place],
        "gate": gate,
        "own": own,
        "gain": gain,
        "cosine": cosine,
        "value": value,
        "effect": value - value[own][place],
    }
    table = pd.DataFrame(columns).sort_values(["row", "layer", "position", "slot", "gate"], ignore_index=True)
    table.attrs |= {**about(metric), "num_experts": slots.logits.shape[1]}
    return table


def _checked(gates: Sequence[float | int] | np.ndarray) -> Float[np.ndarray, " gate"]:
    found = np.unique(np.asarray(gates, dtype=np.float64))
    if not len(found) or not np.isfinite(found).all():
        raise ValueError(f"gates={gates!r}: finite numbers are asked for, for example np.linspace(0, 1.5, 16).")
    return found


def _lines(
    slots: RoutedSlots, gates: Float[np.ndarray, " gate"]
) -> tuple[Int[np.ndarray, " line"], Float[np.ndarray, " line"], Bool[np.ndarray, " line"]]:
    """Place and gate of every line, and whether it is the own gate, which comes first for each place."""
    count = len(slots)
    gate = np.column_stack([slots.gate.double().numpy(), np.tile(gates, (count, 1))])
    own = np.zeros(gate.shape, dtype=bool)
    own[:, 0] = True
    kept = own | (gate != gate[:, :1])
    place = np.repeat(np.arange(count), gate.shape[1]).reshape(gate.shape)
    return place[kept], gate[kept], own[kept]


def _given(
    slots: RoutedSlots,
    place: Int[np.ndarray, " line"],
    gate: Float[np.ndarray, " line"],
    cell: Int[np.ndarray, " line"],
) -> list[Given]:
    found, layer = [], slots.layer[place]
    for each in np.unique(layer[cell >= 0]):
        here = (cell >= 0) & (layer == each)
        values, at = torch.from_numpy(gate[here]), torch.arange(int(here.sum()))
        found.append(Given(ROUTED.format(each) + "router.gates", *slots.entries(cell, place, here), values, at))
    return found


def _answers(
    model: HookedPreTrainedModel,
    slots: RoutedSlots,
    place: Int[np.ndarray, " line"],
    gate: Float[np.ndarray, " line"],
    own: Bool[np.ndarray, " line"],
) -> tuple[Float[np.ndarray, " line"], Float[np.ndarray, " line"]]:
    """Gain and cosine of what the expert writes by the gate of each line."""
    gain, cosine = np.empty(len(place)), np.empty(len(place))
    layer = slots.layer[place]
    for each in np.unique(layer):
        here = np.flatnonzero(slots.layer == each)
        router = slots.run[ROUTED.format(each) + "router.gates"]
        was = _written(model, slots, here, router)
        for value in [None, *np.unique(gate[~own])]:
            wanted = own if value is None else ~own & (gate == value)
            lines = np.flatnonzero((layer == each) & wanted)
            now = was if value is None else _written(model, slots, here, torch.full_like(router, float(value)))
            index = np.searchsorted(here, place[lines])
            a, b = now[index], was[index]
            gain[lines] = (a.norm(dim=-1) / b.norm(dim=-1)).numpy()
            cosine[lines] = ((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).numpy()
    return gain, cosine


def _written(
    model: HookedPreTrainedModel,
    slots: RoutedSlots,
    here: Int[np.ndarray, " chosen"],
    gates: Float[Tensor, "batch seq slot"],
) -> Float[Tensor, "chosen d_model"]:
    """What the experts of some places of one layer write by other gates."""
    positions, column = np.unique(slots.position[here], return_inverse=True)
    written = expert_outputs(model, slots.run, int(slots.layer[here[0]]), gates, positions.tolist())
    return written[slots.row[here], column, slots.slot[here]].cpu().double()
