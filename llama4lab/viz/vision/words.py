"""Words that the model sees in a picture."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes

from llama4lab.viz import style
from llama4lab.viz.routing.checking import check
from llama4lab.viz.token_axis import token_label
from llama4lab.viz.vision.cells import shown_cells, write_tokens
from llama4lab.viz.vision.overlays import overlay
from llama4lab.viz.vision.picture import Picture, in_grey
from llama4lab.viz.vision.picture_panels import by_layer, layer_name, painted_panels


def lens(
    table: pd.DataFrame,
    image: Picture,
    layer: int | None = None,
    *,
    ax: Axes | None = None,
    value: str = "prob",
    global_tile: bool = False,
    alpha: float | int = 0.6,
) -> Axes:
    """Draws the best token of each image token, written into its cell, as far as there is room.

    Args:
        table: As `tables.vision.lens` or `tables.vision.nearest_words` gives it, of one image; of several ranks the
            best is drawn.
        image: The picture.
        layer: The layer, of a table with layers; by default the last one.
        ax: Where to draw; a new figure by default.
        value: What the colours are: "prob", "logit", "cosine", or "token": the most frequent ones have a colour each.
        global_tile: Draw the tile that shows the whole image instead of those that show parts of it.
        alpha: How much the cells cover the picture, from 0 to 1.

    Raises:
        ValueError: if a column or the layer is missing, or the cells do not fit the picture.
    """
    check(table, "rank", "token", value)
    own = style.only(table, "rank", min(table["rank"]))
    title = ""
    if "layer" in own:
        layer = int(max(own["layer"])) if layer is None else layer
        own, title = style.only(own, "layer", layer), layer_name(layer)
    ax = overlay(own, image, value, ax=ax, global_tile=global_tile, alpha=alpha)
    height, width = in_grey(image).shape
    shown = shown_cells(own, width, height, global_tile)
    write_tokens(ax, shown, [str(token) for token in shown["token"]])
    ax.set_title(title, fontsize="medium")
    return ax


def word_map(
    table: pd.DataFrame,
    image: Picture,
    layers: Sequence[int] | None = None,
    *,
    ax: Axes | None = None,
    value: str = "prob",
    global_tile: bool = False,
    alpha: float | int = 0.75,
) -> Axes:
    """Draws where in the picture the model sees a word: a panel for each layer, with one scale.

    Args:
        table: As `tables.vision.word_map` gives it, of one image and word.
        image: The picture.
        layers: The layers to draw, in this order; all by default.
        ax: Where to draw; a new figure by default.
        value: "prob", "logit" or "rank".
        global_tile: Draw the tile that shows the whole image instead of those that show parts of it.
        alpha: How much the cells cover the picture, from 0 to 1.

    Raises:
        ValueError: if a column or layer is missing, or the cells do not fit the picture.
    """
    check(table, "layer", value)
    panels = by_layer(table, layers)
    word = table.attrs.get("token")
    label = value if word is None else f"{value} of {token_label(str(word), 20)}"
    return painted_panels(panels, image, value, ax=ax, global_tile=global_tile, alpha=alpha, label=label)[0]
