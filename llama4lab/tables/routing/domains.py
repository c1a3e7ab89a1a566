"""Which experts serve which domain or modality, and how two corpora differ."""

import numpy as np
import pandas as pd

from llama4lab.tables.routing.sources import Source, check_groups, number_of_experts, weighted_choices


def specialization(source: Source, by: str = "group") -> pd.DataFrame:
    """Gives the share of each group's tokens that each expert gets: domain specialization as in OLMoE.

    A token counts for every expert that it is sent to, in whichever slot, so that the shares of a layer and group sum
    to the number of experts a token, not to 1.

    Args:
        source: Statistics of a corpus; or a run with `router.indices` recorded, a table made by `decisions`, or the
            `choices()` of statistics. A table may be filtered by anything but experts and slots.
        by: The column whose values are the groups: "group" or "modality" of statistics; "modality", "row", "token" or
            a column of your own of decisions.

    Columns:
        layer: layer of the router.
        group: (or what `by` names) the group.
        expert: the expert; those without tokens are there, too.
        tokens: tokens of the group that were sent to it.
        share: that as a share of the group's tokens.
        uniform: the share that each expert would have if all had the same: experts a token / num_experts.
        lift: `share` divided by the expert's share of all tokens: 1 for a group like any other. NaN for an expert that
            nothing was sent to.
        group_tokens: tokens of the group.

    Raises:
        KeyError: if there is no column `by`, or the indices were not recorded.
        ValueError: if the table does not say how many experts there are.
    """
    choices = weighted_choices(source)
    num_experts = number_of_experts(choices)
    check_groups(choices, by)
    slots = len(np.unique(choices["slot"]))
    layers, layer = np.unique(choices["layer"], return_inverse=True)
    groups = sorted(set(choices[by].tolist()))
    number = {label: place for place, label in enumerate(groups)}
    group = np.array([number[label] for label in choices[by].tolist()], dtype=np.int64)
    counts = np.zeros((len(layers), len(groups), num_experts), dtype=np.int64)
    np.add.at(counts, (layer, group, np.asarray(choices["expert"])), np.asarray(choices["tokens"]))
    sizes = counts.sum(axis=2, keepdims=True) // slots
    to_expert = counts.sum(axis=1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        share, overall = counts / sizes, to_expert / sizes.sum(axis=1, keepdims=True)
        lift = share / overall
    every = np.indices(counts.shape).reshape(3, -1)
    columns = {"layer": layers[every[0]], by: [groups[place] for place in every[1]], "expert": every[2]}
    columns |= {"tokens": counts.ravel(), "share": share.ravel(), "uniform": slots / num_experts}
    columns |= {"lift": lift.ravel(), "group_tokens": np.broadcast_to(sizes, counts.shape).ravel()}
    table = pd.DataFrame(columns)
    table.attrs = {"num_experts": num_experts, "by": by}
    return table


def risk_difference(a: Source, b: Source) -> pd.DataFrame:
    """Gives how much more often each expert is active in one corpus than in another, as SteerMoE ranks experts.

    Args:
        a: Statistics, a run or a table, as in `specialization`.
        b: The same, for the corpus to compare with. To compare groups of the same statistics, filter its `choices()`.

    Columns:
        layer: layer of the router.
        expert: the expert.
        tokens_a: tokens of `a` (all of them, not only those of the expert).
        tokens_b: tokens of `b`.
        rate_a: share of the tokens of `a` that were sent to the expert.
        rate_b: the same of `b`.
        risk_difference: `rate_a - rate_b`, from -1 to 1.
        standard_error: of the difference, if tokens were drawn independently. Tokens of one text are not, so that the
            true one is larger.

    Raises:
        ValueError: if they have not the same layers and the same number of experts, or one has no tokens.
    """
    one, other = _rates(a), _rates(b)
    if len(one) != len(other) or any(list(one[key]) != list(other[key]) for key in ("layer", "expert")):
        raise ValueError(f"The two cannot be compared: one has {_shown(one)}, the other {_shown(other)}.")
    table = pd.DataFrame({"layer": one["layer"], "expert": one["expert"]})
    error = np.zeros(len(table))
    for name, own in (("a", one), ("b", other)):
        table[f"tokens_{name}"] = own["group_tokens"]
    for name, own in (("a", one), ("b", other)):
        rate, tokens = np.asarray(own["share"]), np.asarray(own["group_tokens"])
        table[f"rate_{name}"] = rate
        error += rate * (1 - rate) / tokens
    table["risk_difference"] = table["rate_a"] - table["rate_b"]
    table["standard_error"] = np.sqrt(error)
    table.attrs = {"num_experts": one.attrs["num_experts"]}
    return table


def _rates(source: Source) -> pd.DataFrame:
    """`specialization` of everything in one group."""
    choices = weighted_choices(source)
    if not np.any(choices["tokens"]):
        raise ValueError("Rates of experts were asked for, but there are no tokens.")
    choices["_all"] = "all"
    return specialization(choices, by="_all")


def _shown(table: pd.DataFrame) -> str:
    layers = np.unique(table["layer"]).tolist()
    shown = ", ".join(map(str, layers[:8])) + (", ..." if len(layers) > 8 else "")
    return f"routers of {table.attrs['num_experts']} experts in layers {shown}"
