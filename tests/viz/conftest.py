"""Tables as `llama4lab.tables` gives them, written by hand."""

from collections.abc import Callable

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes


@pytest.fixture(autouse=True)
def _closed_figures():
    yield
    plt.close("all")


@pytest.fixture(autouse=True)
def _global_settings_stay():
    """No plot changes a setting of matplotlib."""
    before = dict(plt.rcParams)
    yield
    assert dict(plt.rcParams) == before


@pytest.fixture(scope="session")
def decision_table() -> Callable[..., pd.DataFrame]:
    """Decisions of tokens by layer: `experts[layer]` has for each token an expert, or a tuple of slots."""

    def make(experts: dict[int, list], tokens: list[str], gate: float = 1.0, first: int = 0) -> pd.DataFrame:
        lines = [
            {"row": 0, "layer": layer, "position": first + index, "slot": slot, "token": token}
            | {"modality": "text", "expert": expert, "gate": gate}
            for layer, row in experts.items()
            for index, (token, choice) in enumerate(zip(tokens, row, strict=True))
            for slot, expert in enumerate(choice if isinstance(choice, tuple) else (choice,))
        ]
        return pd.DataFrame(lines)

    return make


@pytest.fixture(scope="session")
def pattern_table() -> Callable[..., pd.DataFrame]:
    """A head that looks back evenly, inside chunks of `size` tokens in a RoPE layer."""

    def make(tokens: list[str], size: int, kind: str = "rope", first: int = 0) -> pd.DataFrame:
        query, key = (axis.ravel() for axis in np.indices((len(tokens), len(tokens))))
        seen = (key <= query) & ((query // size == key // size) | (kind == "nope"))
        words = np.array(tokens, dtype=object)
        table = pd.DataFrame(
            {"row": 0, "layer": 3, "kind": kind, "head": 1, "query": query + first, "key": key + first}
        )
        table["query_token"], table["key_token"] = words[query], words[key]
        table["query_chunk"], table["key_chunk"] = query // size, key // size
        table["weight"] = seen / pd.Series(seen).groupby(query).transform("sum")
        return table

    return make


@pytest.fixture(scope="session")
def image_tokens() -> Callable[..., pd.DataFrame]:
    """Image tokens of a picture of 20 x 10 pixels: two tiles of 2 x 2 tokens and the global tile."""

    def make(**columns) -> pd.DataFrame:
        tile, row, column = (axis.ravel() for axis in np.indices((3, 2, 2)))
        is_global = tile == 2
        width = np.where(is_global, 10.0, 5.0)
        left = np.where(is_global, 0, tile * 10) + column * width
        boxes = {"left": left, "top": row * 5.0, "right": left + width, "bottom": row * 5.0 + 5}
        places = {"row": 0, "image": 0, "tile": tile, "is_global": is_global, "tile_row": row, "tile_column": column}
        return pd.DataFrame(places | {"position": np.arange(12)} | boxes | columns)

    return make


@pytest.fixture(scope="session")
def written() -> Callable[[Axes], list[str]]:
    """The texts inside the axes."""
    return lambda ax: [text.get_text() for text in ax.texts]
