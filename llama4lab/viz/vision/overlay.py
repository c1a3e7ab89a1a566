"""Image tokens over their picture."""

from difflib import get_close_matches

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import Normalize
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from PIL import Image

from llama4lab.viz import style
from llama4lab.viz.expert_colors import expert_colors
from llama4lab.viz.legend import expert_patches, legend_beside


def tokens(
    table: pd.DataFrame,
    image: Image.Image | np.ndarray,
    *,
    ax: Axes | None = None,
    value: str = "norm",
    global_tile: bool = False,
    alpha: float = 0.5,
) -> Axes:
    """Draws a picture in grey, and over it one cell for each image token, just where the token looks.

    Columns named `expert_...` are drawn in the colours of the experts, with their numbers where there is room; any
    other column on a scale. White lines are the borders of tiles.

    Args:
        table: As `tables.vision.tokens` gives it, of one image.
        image: The picture itself, at the size the prompt was given: `prompt.images[0].original`, or an array.
        ax: Where to draw; a new figure by default.
        value: Column to draw.
        global_tile: Draw the tile that shows the whole image instead of those that show parts of it.
        alpha: How much the cells cover the picture, from 0 to 1.

    Raises:
        KeyError: if there is no column `value`.
        ValueError: if the table has several images, boxes outside the picture, or the picture is none.
    """
    if value not in table:
        near = get_close_matches(value, [str(column) for column in table], cutoff=0.4)
        raise KeyError(f"The table has no column {value!r}. Near ones: {', '.join(near) or 'none'}.")
    style.only_one(table, "image")
    picture = _grey(image)
    height, width = picture.shape
    shown = _shown(table, width, height, global_tile)
    ax = style.axes(ax, 7.0, 6.0 * height / width + 0.4)
    # Pixel (0, 0) reaches from 0 to 1, as boxes count.
    ax.imshow(picture, extent=(0, width, height, 0), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    if value.startswith("expert_"):
        _expert_cells(ax, shown, value, alpha)
    else:
        cells = _cells(ax, shown, alpha)
        cells.set(array=shown[value].to_numpy(dtype=float), cmap="viridis", norm=Normalize())
        style.color_bar(ax, cells, value.replace("_", " "))
    for _, tile in shown.groupby("tile"):
        _tile_border(ax, tile)
    ax.set(xlim=(0, width), ylim=(height, 0), xlabel="pixel", ylabel="pixel")
    style.plain(ax)
    return ax


def _shown(table: pd.DataFrame, width: int, height: int, global_tile: bool) -> pd.DataFrame:
    """The image tokens to draw on a picture of that size: without filling, and of one kind of tile."""
    shown = table.loc[(table["right"] > table["left"]) & (table["bottom"] > table["top"]), :]
    reach = shown[["right", "bottom"]].to_numpy().max(axis=0)
    if reach[0] > width + 0.5 or reach[1] > height + 0.5:
        raise ValueError(
            f"The boxes of the image tokens reach to {reach[0]:.0f} x {reach[1]:.0f}, but the picture is "
            f"{width} x {height} pixels.\nPass the picture at the size the prompt was given."
        )
    # An image of one tile has only the global one.
    return shown if np.all(shown["is_global"]) else style.only(shown, "is_global", global_tile)


def _grey(image: Image.Image | np.ndarray) -> np.ndarray:
    """The picture in pale grey from 0 to 1, so that the colours of cells stay what their legend says."""
    picture = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    if picture.ndim not in (2, 3) or (picture.ndim == 3 and picture.shape[2] not in (3, 4)):
        raise ValueError(
            f"The picture has the shape {list(picture.shape)}.\n"
            "Pass a PIL image, or an array [height, width], [height, width, 3] or [height, width, 4]."
        )
    scaled = picture / 255 if picture.dtype == np.uint8 else picture.astype(float)
    return 0.15 + 0.85 * (scaled if scaled.ndim == 2 else scaled[..., :3] @ np.array([0.2126, 0.7152, 0.0722]))


def _boxes(shown: pd.DataFrame) -> np.ndarray:
    """Left, top, right and bottom, each of shape [token]."""
    return shown[["left", "top", "right", "bottom"]].to_numpy(dtype=float).T


def _cells(ax: Axes, shown: pd.DataFrame, alpha: float) -> PolyCollection:
    left, top, right, bottom = _boxes(shown)
    corners = np.array([[left, top], [right, top], [right, bottom], [left, bottom]]).transpose(2, 0, 1)
    # Without anti-aliasing, neighbouring cells leave no seam.
    cells = PolyCollection(list(corners), antialiaseds=False, linewidths=0, alpha=alpha)
    ax.add_collection(cells)
    return cells


def _expert_cells(ax: Axes, shown: pd.DataFrame, value: str, alpha: float) -> None:
    """Cells in the colours of experts, with numbers where there is room, and a legend."""
    experts = shown[value].to_numpy(dtype=int)
    _cells(ax, shown, alpha).set_facecolor([tuple(color) for color in expert_colors(experts)])
    left, top, right, bottom = _boxes(shown)
    limits = ax.get_xlim()[1], ax.get_ylim()[0]
    scale = min(style.cell_size(ax, *map(round, limits)))  # points a pixel
    size = style.number_size(scale * (right - left).max(), scale * (bottom - top).max(), int(experts.max()))
    room = scale * np.minimum(right - left, bottom - top)
    for x, y, expert in zip((left + right) / 2, (top + bottom) / 2, np.where(room > size, experts, -1), strict=True):
        if size and expert >= 0:  # no number in cells that the border of the picture cuts short
            label = ax.text(x, y, str(expert), ha="center", va="center", fontsize=size, color="white")
            label.set_path_effects([withStroke(linewidth=2.0, foreground=style.INK)])
    legend_beside(ax, expert_patches(experts), title=f"expert, layer {value.removeprefix('expert_')}")


def _tile_border(ax: Axes, tile: pd.DataFrame) -> None:
    """A line around the image tokens of a tile."""
    left, top, right, bottom = _boxes(tile)
    corner, size = (left.min(), top.min()), (right.max() - left.min(), bottom.max() - top.min())
    border = Rectangle(corner, *size, fill=False, edgecolor="white", linewidth=1.6)
    border.set_path_effects([withStroke(linewidth=3.2, foreground=style.INK)])
    ax.add_patch(border)
