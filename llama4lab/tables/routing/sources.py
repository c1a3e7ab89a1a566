"""What tables of routing are made from: one run, a table of decisions, or the statistics of a corpus."""

import pandas as pd

from llama4lab.run.corpus.stats import RoutingStats
from llama4lab.run.run import Run
from llama4lab.tables.routing.choices import bare_choices

Source = RoutingStats | Run | pd.DataFrame


def weighted_choices(source: Source) -> pd.DataFrame:
    """The choices of a source, with the number of tokens of each line.

    A line of decisions is one token in one slot; a line of statistics has many.
    """
    choices = choices_of(source).copy()
    if "tokens" not in choices.columns:
        choices["tokens"] = 1
    return choices


def choices_of(source: Source) -> pd.DataFrame:
    """The choices of a source as they are."""
    if isinstance(source, pd.DataFrame):
        return source
    return source.choices() if isinstance(source, RoutingStats) else bare_choices(source)


def number_of_experts(choices: pd.DataFrame) -> int:
    """How many experts there are, whether chosen or not.

    Raises:
        ValueError: if the table does not say, or has one that cannot be.
    """
    num_experts = choices.attrs.get("num_experts")
    if num_experts is None:
        raise ValueError(
            "The table does not say how many experts there are, as tables of routing.decisions do.\n"
            'Set table.attrs["num_experts"], or pass the run.'
        )
    if len(choices) and choices["expert"].max() >= num_experts:
        raise ValueError(f"The table has expert {choices['expert'].max()}, but attrs say num_experts={num_experts}.")
    return num_experts


def check_groups(choices: pd.DataFrame, by: str) -> None:
    """Whether the choices can be grouped by a column.

    Raises:
        KeyError: if not.
    """
    columns = [str(name) for name in choices.columns if name not in ("layer", "slot", "expert", "tokens")]
    if by not in columns:
        raise KeyError(f"by={by!r} is nothing that the choices can be grouped by. There are {', '.join(columns)}.")
