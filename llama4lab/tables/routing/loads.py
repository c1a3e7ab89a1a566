"""How the experts are loaded, and how evenly."""

# pandas declares what it gives as wide unions.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportCallIssue=false, reportOperatorIssue=false, reportIndexIssue=false, reportReturnType=false
# pyright: reportOptionalOperand=false

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from llama4lab.tables.routing.sources import Source, number_of_experts, weighted_choices

Placement = int | Sequence[int] | Mapping[int, int]
LEAST_TOKENS = 1e-5  # what SGLang adds above and below, so that an idle layer counts as balanced


def expert_load(source: Source, by: str | None = None) -> pd.DataFrame:
    """Gives how many tokens went to each expert of each layer; experts without any are there, too.

    Args:
        source: A run with `router.indices` recorded, a table made by `decisions`, possibly filtered, or statistics of a
            corpus.
        by: A column to count apart, for example "modality" or "row", or "group" of statistics; shares then sum to 1 in
            each of its groups.

    Columns:
        layer: layer of the router.
        modality: (or what `by` names) the group; only if `by` is given.
        expert: the expert.
        tokens: how often it was chosen; a token counts once for each slot.
        expert_load: share of the layer's choices, from 0 to 1.
        uniform: the share that each expert would have if all had the same, 1 / num_experts.

    Raises:
        KeyError: if the indices were not recorded, or there is no column `by`.
        ValueError: if the table does not say how many experts there are.
    """
    choices = weighted_choices(source)
    num_experts = number_of_experts(choices)
    if by is not None and by not in choices:
        raise KeyError(f"by={by!r} is no column of the decisions. Columns are {', '.join(choices.columns)}.")
    keys = ["layer"] if by is None else ["layer", by]
    levels = [np.unique(choices[key]) for key in keys] + [np.arange(num_experts)]
    every = pd.MultiIndex.from_product(levels, names=[*keys, "expert"])
    counts = choices.groupby([*keys, "expert"])["tokens"].sum().reindex(every, fill_value=0)
    table = counts.to_frame("tokens").reset_index()
    table["expert_load"] = table["tokens"] / table.groupby(keys)["tokens"].transform("sum")
    table["uniform"] = 1 / num_experts
    return table


def balance(source: Source, by: str | None = None, placement: Placement | None = None) -> pd.DataFrame:
    """Gives how evenly the experts of each layer are loaded.

    Args:
        source: As in `expert_load`.
        by: As in `expert_load`.
        placement: Which rank (GPU) holds each expert, the same in all layers: a list or a mapping of experts to ranks,
            or a number of ranks that hold equally many neighbouring experts. Ranks without an expert do not count.

    Columns:
        layer: layer of the router.
        modality: (or what `by` names) the group; only if `by` is given.
        tokens: choices that were counted; a token counts once for each slot.
        max_violation: MaxVio, the load of the fullest expert over the mean load, less 1; 0 if all have the same.
        cv2: squared coefficient of variation: variance of the loads over their squared mean.
        entropy: of the load shares, divided by log(num_experts): 1 if all have the same, 0 if one has everything.
        gini: Gini coefficient of the loads, from 0 (all the same) to 1 - 1 / num_experts (one has everything).
        dead: number of experts without a token.
        coverage_50: least number of experts that hold half of the tokens.

    And with a placement:
        balancedness: mean load of the ranks over that of the fullest, from 1 / ranks to 1.
        utilization: the same as SGLang has it, with 0.00001 added above and below.

    `attrs["balancedness"]` is then the figure of vLLM, for which both loads are first summed over the layers; with `by`
    a dict of one for each group. Of a layer without tokens all but `tokens` and `dead` are missing.

    Raises:
        KeyError: if the indices were not recorded, or there is no column `by`.
        ValueError: if the table does not say how many experts there are, or the placement is not one of them.
    """
    loads = expert_load(source, by)
    keys = ["layer"] if by is None else ["layer", by]
    num_experts = number_of_experts(weighted_choices(source))
    counts = loads["tokens"].to_numpy().reshape(-1, num_experts)
    table = loads[keys].iloc[::num_experts].reset_index(drop=True)
    table["tokens"] = counts.sum(axis=1)
    for name, column in _evenness(counts).items():
        table[name] = column
    table["coverage_50"] = table["coverage_50"].astype("Int64")
    table.attrs["num_experts"] = num_experts
    if placement is not None:
        on_ranks = counts @ _placed(placement, num_experts)
        mean, fullest = on_ranks.mean(axis=1), on_ranks.max(axis=1)
        table["balancedness"] = _ratio(mean, fullest)
        table["utilization"] = (mean + LEAST_TOKENS) / (fullest + LEAST_TOKENS)
        table.attrs["balancedness"] = _over_layers(table, by, mean, fullest)
    return table


def _evenness(counts: Int[np.ndarray, "layer expert"]) -> dict[str, np.ndarray]:
    """The columns of `balance` that need no placement."""
    num_experts, total = counts.shape[1], counts.sum(axis=1)
    mean = counts.mean(axis=1)
    shares = _ratio(counts, total[:, None])
    # The convention of entropy: what is not there adds nothing.
    surprise = -np.log(np.where(shares > 0, shares, 1.0))
    ordered = np.sort(counts, axis=1)
    ranks = 2 * np.arange(1, num_experts + 1) - num_experts - 1
    held = np.cumsum(ordered[:, ::-1], axis=1)
    needed = (2 * held < total[:, None]).sum(axis=1) + 1.0
    entropy = (shares * surprise).sum(axis=1) / np.log(num_experts) if num_experts > 1 else _ratio(total, total)
    return {
        "max_violation": _ratio(counts.max(axis=1), mean) - 1,
        "cv2": _ratio(counts.var(axis=1), mean**2),
        "entropy": entropy,
        "gini": _ratio(ordered @ ranks, num_experts * total),
        "dead": (counts == 0).sum(axis=1),
        "coverage_50": np.where(total > 0, needed, np.nan),
    }


def _ratio(above: Any, below: Any) -> Any:
    """A quotient; NaN where there is nothing."""
    return above / np.where(below > 0, below, np.nan)


def _placed(placement: Placement, num_experts: int) -> Float[np.ndarray, "expert rank"]:
    """1 where a rank holds an expert."""
    if isinstance(placement, int):
        if placement < 1 or num_experts % placement:
            raise ValueError(
                f"placement={placement} ranks cannot share {num_experts} experts equally.\n"
                "Pass a number that divides them, or the rank of each expert."
            )
        ranks = np.arange(num_experts) // (num_experts // placement)
    else:
        pairs = placement if isinstance(placement, Mapping) else dict(enumerate(placement))
        if sorted(pairs) != list(range(num_experts)):
            raise ValueError(
                f"The placement has a rank for {len(pairs)} experts; it needs one for each of the experts 0 to "
                f"{num_experts - 1}."
            )
        ranks = np.array([pairs[expert] for expert in range(num_experts)])
    return (ranks[:, None] == np.unique(ranks)).astype(float)


def _over_layers(table: pd.DataFrame, by: str | None, mean: np.ndarray, fullest: np.ndarray) -> float | dict:
    """Mean load of the ranks over that of the fullest, each summed over the layers first."""
    if by is None:
        return float(_ratio(mean.sum(), fullest.sum()))
    labels = table[by].to_numpy()
    return {
        label: float(_ratio(mean[labels == label].sum(), fullest[labels == label].sum()))
        for label in table[by].unique().tolist()
    }
