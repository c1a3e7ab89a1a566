"""How the load of experts changes along a text."""

import numpy as np
import pandas as pd

from llama4lab.run.corpus.stats import RoutingStats
from llama4lab.run.run import Run
from llama4lab.tables.routing.choices import bare_choices
from llama4lab.tables.token_index import tokens_of

STRETCHES = 16  # of the longest row of a run, by default


def load_over_time(source: RoutingStats | Run, window: int | None = None) -> pd.DataFrame:
    """Gives the load of every expert in stretches of the text, from its begin to its end.

    Args:
        source: Statistics of a corpus, whose stretches double in length; or a run with `router.indices` recorded.
        window: Tokens of a stretch, for a run; by default a sixteenth of its longest row.

    Columns:
        layer: layer of the router.
        first: first place of the stretch; places count from 0 in each row, padding not counted.
        last: its last place.
        expert: the expert; those without tokens are there, too.
        tokens: how often it was chosen there, in all rows; a token counts once for each slot.
        expert_load: share of the choices of layer and stretch, from 0 to 1.
        uniform: the share that each expert would have if all had the same, 1 / num_experts.

    Raises:
        ValueError: if `window` is below 1, or is given with statistics.
        KeyError: if the indices were not recorded.
    """
    if isinstance(source, RoutingStats):
        if window is not None:
            raise ValueError(f"window={window} was asked for; the stretches of statistics are fixed when counting.")
        table = source.by_position()
    else:
        table = _of_run(source, window)
    whole = table.groupby(["layer", "first"])["tokens"].transform("sum")
    table["expert_load"] = table["tokens"] / whole
    table["uniform"] = 1 / table.attrs["num_experts"]
    return table


def _of_run(run: Run, window: int | None) -> pd.DataFrame:
    choices = bare_choices(run)
    choices = choices.merge(tokens_of(run)[["row", "position", "place"]], on=["row", "position"])
    length = int(np.max(choices["place"])) + 1
    window = -(-length // STRETCHES) if window is None else window
    if window < 1:
        raise ValueError(f"window={window} was asked for; a stretch has at least 1 token.")
    choices["first"] = choices["place"] // window * window
    num_experts = run.meta["num_experts"]
    levels = [np.unique(choices["layer"]), np.unique(choices["first"]), np.arange(num_experts)]
    every = pd.MultiIndex.from_product(levels, names=["layer", "first", "expert"])
    counts = choices.groupby(["layer", "first", "expert"]).size().reindex(every, fill_value=0)
    table = counts.to_frame("tokens").reset_index()
    table.insert(2, "last", np.minimum(table["first"] + window, length) - 1)
    table.attrs = {"num_experts": num_experts}
    return table
