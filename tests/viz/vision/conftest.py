"""A picture of 20 x 10 pixels, and tables of its places: two tiles of 2 x 2 cells and the global tile."""

import pandas as pd
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def picture() -> Image.Image:
    return Image.new("RGB", (20, 10), (0, 0, 255))


@pytest.fixture
def by_layer(image_tokens):
    """A table with one line for each place and layer; a function gives the columns of a layer."""

    def make(layers, columns) -> pd.DataFrame:
        return pd.concat([image_tokens(layer=layer, **columns(layer)) for layer in layers], ignore_index=True)

    return make


@pytest.fixture(scope="session")
def panels():
    """The panels of a plot, in their order: all axes with a picture."""
    return lambda ax: [panel for panel in ax.figure.axes if panel.images]


@pytest.fixture(scope="session")
def values():
    """The numbers of the cells of an axes."""
    return lambda ax: ax.collections[0].get_array().tolist()
