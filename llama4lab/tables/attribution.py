"""Attribution patching against true patching: how far estimates can be trusted."""

import numpy as np
import pandas as pd

from llama4lab.run.attribution_result import Attribution
from llama4lab.run.sweep_axes import component_of
from llama4lab.run.sweep_result import Sweep
from llama4lab.tables.comparison import check_comparable, correlation

SMALL = 0.01  # effects below this share of the largest one have no sign worth comparing


def compare(attribution: Attribution, sweep: Sweep) -> pd.DataFrame:
    """Puts estimates beside the effects that a sweep measured; one line for each cell of the sweep.

    Args:
        attribution: Of the same prompts, metric and direction, with all hook points of the sweep.
        sweep: A sweep with values of the other run.

    Columns:
        layer, position, head, ...: the axes of the sweep.
        token: beside `position`, its text; "" where rows differ.
        component: the hook point without its layer; joined by " + " where a cell is of several.
        estimate: the estimated effect.
        first_order: the part of it that the slope tells.
        jump: the part that the exact recomputation of a block adds.
        effect: the true effect.

    Raises:
        ValueError: if the two are not about the same thing, the sweep is not complete, or a cell of it joins several
            values of an axis or chooses among those of an axis that the sweep does not have.
    """
    _check(attribution, sweep)
    axes = list(sweep.axes)
    own = attribution.only(sweep.at).table(axes)
    effects = sweep.table[[*axes, "effect"]]
    table = own.merge(effects, on=axes, how="right", validate="one_to_one")
    if len(table) != len(effects) or bool(table["estimate"].isna().any()):
        lost = table[table["estimate"].isna()].iloc[0][axes].to_dict()
        raise ValueError(f"The attribution has no estimate for the cell {lost}.\nAttribute the prompts of the sweep.")
    if "component" not in axes:
        parts = list(dict.fromkeys(component_of(name) for name in sweep.at))
        table.insert(len(axes) + ("position" in axes), "component", " + ".join(parts))
    known = [*axes, "token", "component", "estimate", "first_order", "jump", "effect"]
    table = table.loc[:, [column for column in dict.fromkeys(known) if column in table]]
    table.attrs = {"metric": sweep.metric, "into": sweep.into}
    return table


def agreement(table: pd.DataFrame) -> pd.DataFrame:
    """Gives how well estimates follow the effects, for each component.

    Args:
        table: As `compare` gives it; tables of several sweeps may be joined with `pandas.concat`.

    Columns:
        component: the hook point without its layer.
        cells: number of cells.
        pearson: correlation of `estimate` and `effect`; NaN where one of them does not vary.
        pearson_first_order: the same for the first order alone.
        spearman: correlation of their ranks.
        same_sign: share of the cells in which both have the same sign, among those whose effect is at least 1 % of the
            largest.
    """
    lines = []
    for component, own in table.groupby("component", sort=False):
        effect, estimate = own["effect"].to_numpy(dtype=float), own["estimate"].to_numpy(dtype=float)
        large = np.abs(effect) > SMALL * np.abs(effect).max()
        lines.append(
            {
                "component": component,
                "cells": len(own),
                "pearson": correlation(estimate, effect),
                "pearson_first_order": correlation(own["first_order"].to_numpy(dtype=float), effect),
                "spearman": correlation(own["estimate"].rank().to_numpy(), own["effect"].rank().to_numpy()),
                "same_sign": float(np.mean(np.sign(estimate[large]) == np.sign(effect[large]))) if large.any() else 1.0,
            }
        )
    return pd.DataFrame(lines)


def _check(attribution: Attribution, sweep: Sweep) -> None:
    check_comparable(attribution, sweep, "the sweep")
    missing = [name for name in sweep.at if name not in attribution.names]
    if missing:
        raise ValueError(f"The sweep patches {missing[0]!r}, which was not attributed.")
    if sweep.values != "other":
        raise ValueError(f'The sweep puts in {sweep.values}; estimates are for values="other".')
    if not sweep.complete:
        raise ValueError("The sweep is not complete; run it again with the same path.")
    joined = [value for values in sweep.axes.values() for value in values if isinstance(value, tuple)]
    if joined:
        raise ValueError(f"A cell of the sweep joins the values {joined[0]}; estimates are for single places.")
