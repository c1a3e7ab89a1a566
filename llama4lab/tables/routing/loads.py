"""How the experts are loaded."""

import numpy as np
import pandas as pd

from llama4lab.run.run import Run
from llama4lab.tables.routing.choices import bare_choices


def expert_load(source: Run | pd.DataFrame, by: str | None = None) -> pd.DataFrame:
    """Gives how many tokens went to each expert of each layer; experts without any are there, too.

    Args:
        source: A run with `router.indices` recorded, or a table made by `decisions`, possibly filtered.
        by: A column to count apart, for example "modality" or "row"; shares then sum to 1 in each of its groups.

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
    choices = bare_choices(source) if isinstance(source, Run) else source
    num_experts = number_of_experts(choices)
    if by is not None and by not in choices:
        raise KeyError(f"by={by!r} is no column of the decisions. Columns are {', '.join(choices.columns)}.")
    keys = ["layer"] if by is None else ["layer", by]
    levels = [np.unique(choices[key]) for key in keys] + [np.arange(num_experts)]
    every = pd.MultiIndex.from_product(levels, names=[*keys, "expert"])
    counts = choices.groupby([*keys, "expert"]).size().reindex(every, fill_value=0)
    table = counts.to_frame("tokens").reset_index()
    table["expert_load"] = table["tokens"] / table.groupby(keys)["tokens"].transform("sum")
    table["uniform"] = 1 / num_experts
    return table


def number_of_experts(choices: pd.DataFrame) -> int:
    """How many experts there are, whether chosen or not."""
    num_experts = choices.attrs.get("num_experts")
    if num_experts is None:
        raise ValueError(
            "The table does not say how many experts there are, as tables of routing.decisions do.\n"
            'Set table.attrs["num_experts"], or pass the run.'
        )
    if len(choices) and choices["expert"].max() >= num_experts:
        raise ValueError(f"The table has expert {choices['expert'].max()}, but attrs say num_experts={num_experts}.")
    return num_experts
