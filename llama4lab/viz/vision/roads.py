"""The road of a pixel: from the picture over the canvas and its tiles into patches and image tokens."""

# pandas declares what it gives as wide unions.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from llama4lab.viz import style
from llama4lab.viz.routing.checking import check
from llama4lab.viz.routing.panels import panels_in
from llama4lab.viz.vision.cells import SIDES, frame, tile_borders
from llama4lab.viz.vision.picture import Picture, in_color
from llama4lab.viz.vision.picture_panels import bare

CANVAS = [f"canvas_{side}" for side in SIDES]
Point = tuple[float | int, float | int]


def layout(table: pd.DataFrame, image: Picture, *, ax: Axes | None = None, at: Point | None = None) -> Axes:
    """Draws how a picture becomes tiles, patches and image tokens, and marks the road of one pixel.

    From the left: the picture with the borders of its tiles; the canvas that it lies on, black where nothing is; then
    the tile that shows the pixel and the global tile, as the vision tower sees them, with their patches. Orange frames
    are the patch of the pixel, white ones the group of patches that becomes its image token.

    Args:
        table: As `tables.vision.layout` gives it, of one image.
        image: The picture, at the size the prompt was given.
        ax: Where to draw; a new figure by default.
        at: The pixel: how far to the right and how far down; by default the middle of the picture.

    Raises:
        ValueError: if a column is missing, the table is of several images, or the pixel is outside the picture.
    """
    check(table, "tile", "is_global", "patch", "tile_row", "tile_column", "position", *SIDES, *CANVAS)
    style.only_one(table, "image")
    picture = in_color(image)
    height, width = picture.shape[:2]
    x, y = (width / 2, height / 2) if at is None else (float(at[0]), float(at[1]))
    if not (0 <= x < width and 0 <= y < height):
        raise ValueError(f"The pixel ({x:g}, {y:g}) was to be marked; the picture is {width} x {height} pixels.")
    hit = table.loc[(table["left"] <= x) & (x < table["right"]) & (table["top"] <= y) & (y < table["bottom"]), :]
    parts = table.loc[table[CANVAS].notna().all(axis=1), :]
    hit = hit.sort_values("is_global", kind="stable").drop_duplicates("tile")
    ax = style.axes(ax, 3.1 * (2 + len(hit)), 3.6)
    shapes = [width / height, *([_canvas(parts)[0] / _canvas(parts)[1]] if len(parts) else []), *[1.0] * len(hit)]
    panels = panels_in(ax, 1, len(shapes), widths=[max(shape, 0.5) for shape in shapes])[0].tolist()
    _original(panels[0], picture, table, hit, (x, y))
    if len(parts):
        _on_canvas(panels[1], picture, parts, hit, (x, y))
    for panel, (_, line) in zip(panels[-len(hit) :] if len(hit) else [], hit.iterrows(), strict=True):
        _tile(panel, picture, table.loc[table["tile"] == line["tile"], :], line, parts)
    return ax


def _original(ax: Axes, picture: np.ndarray, table: pd.DataFrame, hit: pd.DataFrame, pixel: Point) -> None:
    height, width = picture.shape[:2]
    _show(ax, picture, (width, height), (width, height))
    seen = table.loc[(table["right"] > table["left"]) & (table["bottom"] > table["top"]), :]
    parts = seen.loc[~seen["is_global"].to_numpy(dtype=bool), :]
    tile_borders(ax, parts if len(parts) else seen)
    for box in hit[SIDES].to_numpy(dtype=float):
        frame(ax, tuple(box), color=style.ORANGE, linewidth=1.4)
    _cross(ax, pixel)
    bare(ax, f"picture, {width} × {height}")
    ax.set_xlabel(f"pixel ({pixel[0]:g}, {pixel[1]:g})", fontsize="small")


def _on_canvas(ax: Axes, picture: np.ndarray, parts: pd.DataFrame, hit: pd.DataFrame, pixel: Point) -> None:
    wide, high = _canvas(parts)
    across, down = _stretch(parts, picture)
    _show(ax, picture, (wide, high), (across, down))
    tiles = parts.assign(**{side: parts[name] for side, name in zip(SIDES, CANVAS, strict=True)})
    tile_borders(ax, tiles)
    for box in hit.loc[hit[CANVAS].notna().all(axis=1), CANVAS].to_numpy(dtype=float):
        frame(ax, tuple(box), color=style.ORANGE, linewidth=1.4)
    height, width = picture.shape[:2]
    _cross(ax, (pixel[0] * across / width, pixel[1] * down / height))
    bare(ax, f"canvas, {wide:.0f} × {high:.0f}")
    count = parts["tile"].nunique()
    ax.set_xlabel(f"{count} tile{'s' if count > 1 else ''}", fontsize="small")


def _tile(ax: Axes, picture: np.ndarray, tile: pd.DataFrame, line: pd.Series, parts: pd.DataFrame) -> None:
    """A tile as the vision tower sees it, in patches."""
    rows, columns = int(tile["tile_row"].max()) + 1, int(tile["tile_column"].max()) + 1
    on_canvas = bool(tile[CANVAS].notna().to_numpy().all())
    if on_canvas:
        left, top = tile[CANVAS[:2]].to_numpy(dtype=float).min(axis=0)
        right, bottom = tile[CANVAS[2:]].to_numpy(dtype=float).max(axis=0)
        across, down = _stretch(parts, picture)
        # In patches: where the whole picture would reach.
        scale = columns / (right - left), rows / (bottom - top)
        ends = (-left * scale[0], (across - left) * scale[0], (down - top) * scale[1], -top * scale[1])
    else:
        ends = (0.0, columns, rows, 0.0)
    ax.set_facecolor("black")
    ax.imshow(picture, extent=ends, vmin=0, vmax=1, cmap="gray", interpolation="nearest", aspect="equal")
    ax.set(xlim=(0, columns), ylim=(rows, 0))
    for place in range(1, max(rows, columns)):
        for draw, most in ((ax.axhline, rows), (ax.axvline, columns)):
            if place < most:
                draw(place, color="white", linewidth=0.5, alpha=0.7)
    row, column = int(line["tile_row"]), int(line["tile_column"])
    group = tile.loc[tile["position"] == line["position"], ["tile_row", "tile_column"]].to_numpy(dtype=float)
    low, high = group.min(axis=0), group.max(axis=0) + 1
    frame(ax, (low[1], low[0], high[1], high[0]), color="white", linewidth=1.6)
    frame(ax, (column, row, column + 1, row + 1), color=style.ORANGE, linewidth=1.4)
    kind = "global tile" if line["is_global"] else f"tile {line['tile']}"
    bare(ax, f"{kind}: {rows} × {columns} patches")
    ax.set_xlabel(f"patch {line['patch']} → position {line['position']}", fontsize="small")


def _show(ax: Axes, picture: np.ndarray, size: Point, reach: Point) -> None:
    """A picture that reaches over part of a black sheet."""
    ax.set_facecolor("black")
    ax.imshow(picture, extent=(0, reach[0], reach[1], 0), vmin=0, vmax=1, cmap="gray", interpolation="nearest")
    ax.set(xlim=(0, size[0]), ylim=(size[1], 0), aspect="equal")


def _canvas(parts: pd.DataFrame) -> tuple[float, float]:
    """Width and height of the canvas."""
    return float(parts["canvas_right"].max()), float(parts["canvas_bottom"].max())


def _stretch(parts: pd.DataFrame, picture: np.ndarray) -> tuple[float, float]:
    """How far the whole picture reaches on the canvas: cells that its border does not cut say how it was resized."""
    reach = []
    for low, high, size in (("left", "right", picture.shape[1]), ("top", "bottom", picture.shape[0])):
        own = parts.loc[parts[high] > parts[low], :]
        ratio = (own[f"canvas_{high}"] - own[f"canvas_{low}"]) / (own[high] - own[low])
        reach.append(float(ratio.min()) * size)
    return reach[0], reach[1]


def _cross(ax: Axes, pixel: Point) -> None:
    for color, size, line in ((style.INK, 9.0, 3.0), ("white", 8.0, 1.4)):
        ax.plot(*pixel, "+", color=color, markersize=size, markeredgewidth=line)
