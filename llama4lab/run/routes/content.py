"""Route against content: does a difference act by sending tokens to other experts, or by what flows through them?

A mixture-of-experts layer gets a vector for each token, decides on a route (experts and gates), and sends the vector
along it. Two runs differ in both. Here a layer of the base run gets the route of the source run and keeps its own
vector, or the other way round, or gets both, which makes the layer write what it writes in the source run.
"""

from collections.abc import Callable
from itertools import product
from typing import Any

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from llama4lab.model.facts import facts
from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.prompt.prompt import Prompt
from llama4lab.run.metrics import Metric, as_metric
from llama4lab.run.pairing import Side, other_side, paired
from llama4lab.run.routes.variants import VARIANTS, Cell, Observed, measured, observed

EFFECTS = ("route_effect", "content_effect", "total_effect", "gate_effect", "interaction")


def route_and_content(
    model: HookedPreTrainedModel,
    clean: Any,
    corrupted: Any,
    *,
    metric: Metric | Callable[[Tensor], Tensor],
    into: Side = "corrupted",
    together: bool = False,
    by_position: bool = False,
    by_row: bool = False,
) -> pd.DataFrame:
    """Splits the effect of every layer with experts into the part of its route and the part of its content.

    In the base run a layer gets from the source run its route (indices and gates of the experts), its content (the
    normed residual stream that goes into the router, the experts and the shared expert, while the route stays that of
    the base run), or both. The residual stream beside the layer always stays that of the base run.

    Args:
        model: The model.
        clean: A `Prompt`, or anything that `model.prompt` takes.
        corrupted: The same; with as many rows, and every token in its place.
        metric: What is measured.
        into: Which of the two is the base run; the other one is the source.
        together: Whether all layers are changed at once, instead of one after the other; `layer` is then "all".
        by_position: Whether positions are changed one after the other, instead of all at once.
        by_row: Whether each row (pair of prompts) has lines of its own, instead of means over the rows.

    Columns:
        layer: the layer, or "all".
        position, token: position in the base run and its token ("" where rows differ); with `by_position`.
        row: row of the prompts; with `by_row`.
        none: the metric in the base run.
        source: the metric in the source run.
        route, content, both: the metric with what the column is named for.
        gate: the metric with the experts of the base run and the gates that the source run has for them.
        route_effect: route - none.
        content_effect: content - none.
        total_effect: both - none.
        gate_effect: gate - none; the part of a change of route that needs no other expert.
        interaction: both - route - content + none; what neither does alone.
        ..._std: standard deviation of the effect over the rows (0 for one); without `by_row`.
        pairs: how many rows the means are over; without `by_row`.

    Raises:
        ValueError: if the prompts do not match position by position, or the model has no layer with experts.
    """
    pair = paired(model, clean, corrupted)
    base_prompt, source_prompt = pair.prompt(into), pair.prompt(other_side(into))
    layers = facts(model.config)["moe_layers"]
    if not layers:
        raise ValueError("Route against content was asked for, but no layer of this model has experts.")
    bound = as_metric(metric).bound(base_prompt)
    base = observed(model, base_prompt, layers, bound)
    source = observed(model, source_prompt, layers, as_metric(metric).bound(source_prompt))
    groups = [tuple(layers)] if together else [(layer,) for layer in layers]
    places = base_prompt.attention_mask.any(0).nonzero().flatten().tolist() if by_position else [None]
    cells = [Cell(variant, group, place) for group, place, variant in product(groups, places, VARIANTS)]
    values = measured(model, base_prompt, base, source, cells, bound).unflatten(0, (-1, len(VARIANTS)))
    lines = []
    for (group, place), of_cell in zip(product(groups, places), values, strict=True):
        lines += _lines("all" if together else group[0], place, base_prompt, base, source, of_cell)
    table = pd.DataFrame(lines) if by_row else _over_rows(pd.DataFrame(lines), by_position)
    table.attrs["metric"] = bound.name
    return table


def _lines(
    layer: int | str,
    position: int | None,
    prompt: Prompt,
    base: Observed,
    source: Observed,
    values: Float[Tensor, "variant row"],
) -> list[dict[str, Any]]:
    """A line for each row that has a token at the position."""
    lines = []
    for row in range(len(prompt)):
        if position is not None and not prompt.attention_mask[row, position]:
            continue
        place = {} if position is None else {"position": position, "token": prompt.tokens[row][position]}
        value = dict(zip(VARIANTS, values[:, row].tolist(), strict=True))
        none = base.values[row].item()
        line = {"layer": layer, **place, "row": row, "none": none, "source": source.values[row].item(), **value}
        line |= {"route_effect": value["route"] - none, "content_effect": value["content"] - none}
        line |= {"total_effect": value["both"] - none, "gate_effect": value["gate"] - none}
        line["interaction"] = value["both"] - value["route"] - value["content"] + none
        lines.append(line)
    return lines


def _over_rows(table: pd.DataFrame, by_position: bool) -> pd.DataFrame:
    lines = []
    for _, own in table.groupby(["layer", "position"] if by_position else ["layer"], sort=False):
        line = {column: own[column].iloc[0] for column in ("layer", "position") if column in own}
        if by_position:
            line["token"] = own["token"].iloc[0] if len(set(own["token"])) == 1 else ""
        line |= {column: own[column].mean() for column in ("none", "source", *VARIANTS, *EFFECTS)}
        line |= {f"{column}_std": own[column].std() if len(own) > 1 else 0.0 for column in EFFECTS}
        lines.append({**line, "pairs": len(own)})
    return pd.DataFrame(lines)
