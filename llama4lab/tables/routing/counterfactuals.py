"""What would have happened if a token had gone to another expert."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Unpack

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.prompt.tokenizer import token_strings
from llama4lab.run.alternatives import Given, Running, alone_in_its_row, line_outcomes
from llama4lab.run.metrics import Metric, as_metric, loss
from llama4lab.run.routes.expert_outputs import ROUTED, RoutedSlots, routed_slots

PLACE = ("row", "layer", "position", "token", "slot")
Gate = Literal["own", "original"] | float | int
LOWER_IS_BETTER = {
    "loss": True,
    "KL divergence": True,
    "rank": True,
    "logit difference": False,
    "log probability": False,
    "probability": False,
}


class Options(Running, total=False):
    """How experts are exchanged; see `counterfactual`."""

    gate: Gate
    slot: int | None


def counterfactual(
    model: HookedPreTrainedModel,
    prompt: Any,
    *,
    layer: int | Sequence[int] | None,
    position: int | Sequence[int] | None,
    metric: Metric | Callable[[Tensor], Tensor] | None = None,
    **options: Unpack[Options],
) -> pd.DataFrame:
    """Sends one token at a time to each expert of a layer, and gives the metric and the next token that follow.

    Nothing else is held fixed: later layers, and later tokens, route by what they then read. All lines come from one
    packed pass; each equals a run with `router.indices` of that layer patched at that place.

    The default metric is `lab.metrics.loss()`, the mean over all tokens of the row. A token cannot change what comes
    before it, so an effect is the change of the loss of the tokens after it, divided by the number of tokens of the
    row; that of the last position is 0.

    Args:
        model: The model.
        prompt: A `Prompt`, or anything that `model.prompt` takes.
        layer: A layer with experts, several, or None for all.
        position: A position, several, or None for all; negative ones count from the end.
        metric: One of `lab.metrics`, or a function of the logits. By default the loss.
        options: `gate`: how strongly the other expert is fed: "own", the sigmoid of its own logit, which is what
            routing there would do; "original", the gate that the chosen expert has, which compares experts at the same
            strength; or a number, for the chosen expert too. `slot`: which of the token's choices is exchanged, 0 (the
            best) by default, None for each in turn. `memory` and `progress`: as in `lab.sweep`, without a bar by
            default.

    Columns:
        row, layer, position: the place; padding is left out.
        token: text of the token.
        slot: which of its choices is exchanged. Experts that it has in other slots are no alternatives.
        expert: where it goes.
        chosen: whether that is the expert that the model chose.
        logit: router logit of the expert.
        gate: the factor on its input.
        value: the metric of the row.
        effect: `value` minus that of the chosen expert.
        top_token, top_prob: the most probable next token at the last position that the metric reads (of the loss: at
            the end), and its probability.

    `attrs` has `metric` (its name), `num_experts`, `gate` and `lower_is_better` (None for a function of the logits).

    Raises:
        ValueError: if a layer is dense, or `gate` is unknown.
        IndexError: if there is no such layer, position or slot.
    """
    metric = loss() if metric is None else metric
    slots = routed_slots(model, prompt, layer, position, options.get("slot", 0))
    gate = _checked(options.get("gate", "own"))
    place, expert = _alternatives(slots)
    chosen = expert == slots.expert[place]
    gates = _gates(slots, place, expert, gate)
    row = slots.row[place]
    cell = alone_in_its_row(row, ~chosen | (not isinstance(gate, str)), metric)
    given = _given(slots, place, expert, cell, None if gate == "own" else gates)
    prompt = slots.run.prompt
    found = line_outcomes(model, prompt, given, row, cell, metric, **running(options))
    value = found.value.double().numpy()
    columns = {
        **placed(slots, place),
        "expert": expert,
        "chosen": chosen,
        "logit": slots.logits[place, expert].double().numpy(),
        "gate": gates.double().numpy(),
        "value": value,
        "effect": value - value[chosen][place],
        "top_token": token_strings(prompt.tokenizer, found.top_ids[:, 0].tolist()),
        "top_prob": found.top_log_probs[:, 0].double().exp().numpy(),
    }
    lines = pd.DataFrame(columns)
    lines.attrs |= {**about(metric), "num_experts": slots.logits.shape[1], "gate": gate}
    return lines


def regret(table: pd.DataFrame, *, lower_is_better: bool | None = None) -> pd.DataFrame:
    """Gives how much better than the chosen expert the best one would have been, for every place of a table.

    Args:
        table: Made by `counterfactual`, possibly filtered.
        lower_is_better: Whether a small value of the metric is a good one; by default as the table's attrs say.

    Columns:
        row, layer, position, token, slot: the place.
        expert: the chosen expert.
        best: the best one; the chosen one where no other is better.
        regret: how much better the best one is, at least 0.
        better: how many experts are better than the chosen one.

    Raises:
        ValueError: if nobody says which values are good, or a place has no line of its chosen expert.
    """
    lower = table.attrs.get("lower_is_better") if lower_is_better is None else lower_is_better
    if lower is None:
        raise ValueError(
            f"Whether a low {table.attrs.get('metric', 'value')} is good is not known.\n"
            "Pass lower_is_better=True or False."
        )
    place = table.groupby(["row", "layer", "position", "slot"]).ngroup().to_numpy()
    chosen, expert = table["chosen"].to_numpy(), table["expert"].to_numpy()
    if (np.bincount(place[chosen], minlength=place.max(initial=-1) + 1) != 1).any():
        raise ValueError("A place of the table has not one line of its chosen expert. Filter places, not experts.")
    gain = table["effect"].to_numpy() * (-1 if lower else 1)
    # Of equal ones the chosen expert comes first, then the lower number.
    order = np.lexsort((expert, ~chosen, -gain, place))
    best = order[np.unique(place[order], return_index=True)[1]]
    own = np.flatnonzero(chosen)[np.argsort(place[chosen])]
    found = table.iloc[own].reset_index(drop=True)
    found = found.drop(columns=[name for name in found if name not in PLACE and name != "expert"])
    found["best"], found["regret"] = expert[best], gain[best]
    found["better"] = np.bincount(place[gain > 0], minlength=len(own))
    found.attrs |= {**table.attrs, "lower_is_better": lower}
    return found


def about(metric: Metric | Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """What tables say about their metric: its name, and whether low values are good ones (None if not known)."""
    name = as_metric(metric).name
    known = LOWER_IS_BETTER.get(name) if isinstance(metric, Metric) else None
    return {"metric": name, "lower_is_better": known}


def running(options: Mapping[str, Any]) -> Running:
    """The options that say how cells are run."""
    return {"memory": options.get("memory"), "progress": options.get("progress", False)}


def placed(slots: RoutedSlots, place: Int[np.ndarray, " line"]) -> dict[str, Any]:
    """The first columns of a table: where each line is."""
    tokens = np.array(slots.tokens, dtype=object)[place]
    columns = {"row": slots.row, "layer": slots.layer, "position": slots.position}
    return {**{name: column[place] for name, column in columns.items()}, "token": tokens, "slot": slots.slot[place]}


def _checked(gate: Any) -> Gate:
    if isinstance(gate, str) and gate not in ("own", "original"):
        raise ValueError(f'gate={gate!r} is unknown. Pass "own", "original", or a number.')
    return gate


def _alternatives(slots: RoutedSlots) -> tuple[Int[np.ndarray, " line"], Int[np.ndarray, " line"]]:
    """Place and expert of every line: all experts but those that the token has in other slots."""
    num_experts = slots.logits.shape[1]
    place, expert = (axis.ravel() for axis in np.indices((len(slots), num_experts)))
    taken = (slots.experts[place] == expert[:, None]).any(1) & (expert != slots.expert[place])
    return place[~taken], expert[~taken]


def _gates(
    slots: RoutedSlots, place: Int[np.ndarray, " line"], expert: Int[np.ndarray, " line"], gate: Gate
) -> Float[Tensor, " line"]:
    was = slots.gate[place]
    if not isinstance(gate, str):
        return torch.full_like(was, gate)
    if gate == "original":
        return was
    own = torch.sigmoid(slots.logits[place, expert].float()).to(was.dtype)
    return torch.where(torch.from_numpy(expert == slots.expert[place]), was, own)


def _given(
    slots: RoutedSlots,
    place: Int[np.ndarray, " line"],
    expert: Int[np.ndarray, " line"],
    cell: Int[np.ndarray, " line"],
    gates: Float[Tensor, " line"] | None,
) -> list[Given]:
    """What the cells put in, layer by layer: the expert, and its gate unless it is its own."""
    found = []
    num_experts, layer = slots.logits.shape[1], slots.layer[place]
    for each in np.unique(layer[cell >= 0]):
        here = (cell >= 0) & (layer == each)
        at, name = slots.entries(cell, place, here), ROUTED.format(each) + "router."
        found.append(Given(name + "indices", *at, torch.arange(num_experts), torch.from_numpy(expert[here])))
        if gates is not None:
            values = gates[torch.from_numpy(here)]
            found.append(Given(name + "gates", *at, values, torch.arange(len(values))))
    return found
