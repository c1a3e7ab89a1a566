"""Estimates beside what they estimate: whether both are about the same thing, and how well they agree."""

import numpy as np
import pandas as pd
from jaxtyping import Float

from llama4lab.run.attribution_result import Attribution
from llama4lab.run.edge_attribution import EdgeAttribution
from llama4lab.run.paths import PathEffects
from llama4lab.run.sweep_result import Sweep


def check_comparable(estimated: Attribution | EdgeAttribution, measured: Sweep | PathEffects, name: str) -> None:
    """Sees to it that estimates and measured effects have the same direction, metric and prompts.

    Args:
        estimated: The estimates.
        measured: The effects.
        name: What to call these in an error.

    Raises:
        ValueError: if they have not.
    """
    about = {
        "patches into": (estimated.into, measured.into),
        "has the metric": (estimated.metric, measured.metric),
        "has the prompts": (estimated.prompt.input_ids.tolist(), measured.prompt.input_ids.tolist()),
    }
    for what, (own, other) in about.items():
        if own != other:
            shown = (str(own)[:60], str(other)[:60])
            raise ValueError(f"The attribution {what} {shown[0]}, {name} {shown[1]}; they cannot be compared.")


def correlation(a: Float[np.ndarray, " line"], b: Float[np.ndarray, " line"]) -> float:
    """Pearson's r; NaN where one of the two does not vary."""
    return float(pd.Series(a).corr(pd.Series(b), min_periods=2))
