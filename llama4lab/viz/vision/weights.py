"""Where attention goes in a picture: of a text token, of an image patch, and through all layers."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from llama4lab.viz.routing.checking import check
from llama4lab.viz.vision.cells import boxes, frame
from llama4lab.viz.vision.overlays import overlay
from llama4lab.viz.vision.picture import Picture
from llama4lab.viz.vision.picture_panels import Panel, painted_panels

MOST_PANELS = 64


def attention(
    table: pd.DataFrame,
    image: Picture,
    *,
    ax: Axes | None = None,
    global_tile: bool = False,
    alpha: float | int = 0.75,
) -> Axes:
    """Draws what a text token looks at: a panel for each head, one line of panels for each layer, with one scale.

    Above each panel is the share of the head's attention that lies on the image, all of its tiles together; in a
    chunked layer a token may not see the image at all.

    Args:
        table: As `tables.vision.attention` gives it, of one image and one token.
        image: The picture.
        ax: Where to draw; a new figure by default.
        global_tile: Draw the tile that shows the whole image instead of those that show parts of it.
        alpha: How much the cells cover the picture, from 0 to 1.

    Raises:
        ValueError: if a column is missing, there are more than 64 panels, or the cells do not fit the picture.
    """
    check(table, "layer", "head", "weight")
    layers, heads = np.unique(table["layer"]).tolist(), np.unique(table["head"]).tolist()
    return _heads(_each_head(table), image, len(heads) if len(layers) > 1 else None, ax, global_tile, alpha)[0]


def _each_head(table: pd.DataFrame) -> list[Panel]:
    """The lines of each layer and head; in the title what the head spends on them, or that it sees none of them."""
    panels = []
    for (layer, head), own in table.groupby(["layer", "head"], sort=True):  # pyright: ignore[reportGeneralTypeIssues]
        unseen = "visible" in own and not np.any(own["visible"])
        title = f"layer {layer}, head {head}: {'not seen' if unseen else format(np.sum(own['weight']), '.0%')}"
        panels.append((title, own))
    return panels


def vision_attention(
    table: pd.DataFrame,
    image: Picture,
    *,
    ax: Axes | None = None,
    alpha: float | int = 0.75,
) -> Axes:
    """Draws what one patch of the vision tower, or its class token, looks at: a panel for each head, with one scale.

    A patch sees its own tile only. Above each panel is the share that lies on patches; the rest is on the class token.
    The patch itself has a frame.

    Args:
        table: As `tables.vision.vision_attention` gives it.
        image: The picture.
        ax: Where to draw; a new figure by default.
        alpha: How much the cells cover the picture, from 0 to 1.

    Raises:
        ValueError: if a column is missing, there are more than 64 panels, or the cells do not fit the picture.
    """
    check(table, "layer", "head", "weight", "is_global")
    ax, axes = _heads(_each_head(table), image, None, ax, bool(np.all(table["is_global"])), alpha)
    patch = table.attrs.get("patch")
    for box in boxes(table.loc[table["patch"] == patch, :].drop_duplicates("patch")).T if "patch" in table else ():
        for panel in axes:
            frame(panel, tuple(box), color="white", linewidth=1.4)
    return ax


def rollout(
    table: pd.DataFrame,
    image: Picture,
    *,
    ax: Axes | None = None,
    global_tile: bool = False,
    alpha: float | int = 0.75,
) -> Axes:
    """Draws how much of each patch arrives at a token, when attention is followed through all layers.

    Args:
        table: As `tables.vision.rollout` gives it, of one image.
        image: The picture.
        ax: Where to draw; a new figure by default.
        global_tile: Draw the tile that shows the whole image instead of those that show parts of it.
        alpha: How much the cells cover the picture, from 0 to 1.

    Raises:
        ValueError: if a column is missing or the cells do not fit the picture.
    """
    check(table, "weight")
    return overlay(table, image, "weight", ax=ax, global_tile=global_tile, alpha=alpha)


def _heads(
    panels: Sequence[Panel],
    image: Picture,
    columns: int | None,
    ax: Axes | None,
    global_tile: bool,
    alpha: float | int,
) -> tuple[Axes, np.ndarray]:
    if len(panels) > MOST_PANELS:
        raise ValueError(
            f"{len(panels)} heads were to be drawn; {MOST_PANELS} have room.\nChoose layers or heads of the table."
        )
    return painted_panels(panels, image, "weight", ax=ax, columns=columns, global_tile=global_tile, alpha=alpha)
