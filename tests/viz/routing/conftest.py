"""Tables as `llama4lab.tables.routing` gives them, written by hand, and what is to be read from a plot."""

# matplotlib and pandas declare what they give as wide unions.
# pyright: reportOperatorIssue=false, reportArgumentType=false

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure


@pytest.fixture(scope="session")
def read() -> SimpleNamespace:
    """Reads plots: labels of an axis, texts of the legend, the first picture, panels by their titles."""

    def panels(ax: Axes) -> dict[str, Axes]:
        assert isinstance(ax.figure, Figure)
        return {each.get_title(): each for each in ax.figure.axes if each.axison and each is not ax}

    def legend(ax: Axes) -> list[str]:
        found = ax.get_legend()
        return [] if found is None else [text.get_text() for text in found.get_texts()]

    return SimpleNamespace(
        labels=lambda axis: [label.get_text() for label in axis.get_ticklabels()],
        legend=legend,
        picture=lambda ax: np.ma.asarray(ax.images[0].get_array()).filled(np.nan),
        panels=panels,
    )


@pytest.fixture(scope="session")
def flow_table() -> Callable[..., pd.DataFrame]:
    """Tokens from expert to expert: `{(from_layer, to_layer): {(from_expert, to_expert): tokens}}`."""

    def make(flows: dict[tuple[int, int], dict[tuple[int, int], int]]) -> pd.DataFrame:
        return pd.DataFrame(
            {"from_layer": a, "to_layer": b, "from_expert": e, "to_expert": f, "tokens": tokens}
            for (a, b), own in flows.items()
            for (e, f), tokens in own.items()
        )

    return make


@pytest.fixture(scope="session")
def group_table() -> Callable[..., pd.DataFrame]:
    """Tokens of groups at the experts of layers: `{layer: {group: [tokens of each expert]}}`."""

    def make(counts: dict[int, dict[str, list[int]]], by: str = "group") -> pd.DataFrame:
        lines = [
            {"layer": layer, by: group, "expert": expert, "tokens": tokens, "share": tokens / sum(own)}
            | {"uniform": 1 / len(own), "group_tokens": sum(own)}
            for layer, groups in counts.items()
            for group, own in groups.items()
            for expert, tokens in enumerate(own)
        ]
        table = pd.DataFrame(lines)
        whole = table.groupby(["layer", "expert"])["tokens"].transform("sum")
        overall = whole / table.groupby("layer")["tokens"].transform("sum")
        return table.assign(lift=table["share"] / overall)

    return make


@pytest.fixture(scope="session")
def effect_table() -> Callable[..., pd.DataFrame]:
    """Counterfactuals of one place: the effect of each expert, 0 for the chosen one."""

    def make(effects: list[float], chosen: int, lower_is_better: bool | None = True) -> pd.DataFrame:
        experts = np.arange(len(effects))
        table = pd.DataFrame({"row": 0, "layer": 3, "position": 5, "token": " pa$ta", "slot": 0, "expert": experts})
        table = table.assign(chosen=experts == chosen, effect=effects, value=effects, gate=0.5, logit=0.0)
        table = table.assign(top_token=[f" t{expert}" for expert in experts], top_prob=0.25)
        table.attrs = {"metric": "loss", "lower_is_better": lower_is_better, "num_experts": len(effects)}
        return table

    return make
