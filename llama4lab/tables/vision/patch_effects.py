"""A sweep over the places of an image, beside where each of them lies in the picture."""

import numpy as np
import pandas as pd

from llama4lab.run.sweep_result import Sweep
from llama4lab.tables.vision.places import patch_places, token_places

MEASURES = ["patched", "clean", "corrupted", "effect", "normalised"]
GRAINS = ("patch", "image_token", "position")


def sweep_places(sweep: Sweep) -> pd.DataFrame:
    """Gives the cells of a sweep over image patches, image tokens or positions, each with its place in the picture.

    The class token of a tile shows no part of the picture and is left out, as positions of the text are.

    Args:
        sweep: Over the axis patch, image_token or position, and over tile where the prompt has several. Other axes,
            such as layer, become columns.

    Columns:
        row, image, tile, is_global, tile_row, tile_column, position, left, top, right, bottom: as `patch_places` (with
            patch, token_row and token_column) or `token_places` gives them.
        layer, hook_point, ...: the other axes of the sweep, in its order.
        patched, clean, corrupted, effect, normalised: as in `Sweep.table`.

    Raises:
        ValueError: if the sweep has none of the axes or joins several places in one cell, the prompt has several tiles
            and the sweep does not tell them apart, or it has several rows.
    """
    grain = next((axis for axis in GRAINS if axis in sweep.axes), None)
    if grain is None:
        raise ValueError(
            f"The sweep goes over {', '.join(sweep.axes)}, which are no places of a picture.\n"
            'Sweep over "patch" or "image_token" (with "tile", where there are several), or over "position".'
        )
    joined = [each for axis in (grain, "tile") for each in sweep.axes.get(axis, []) if isinstance(each, tuple)]
    if joined:
        raise ValueError(f"A cell of the sweep joins the places {joined[0]}; only single places can be shown.")
    places = _places(sweep, grain)
    keys = [axis for axis in ("tile", grain) if axis in sweep.axes]
    others = [axis for axis in sweep.axes if axis not in keys]
    cells = sweep.table.rename(columns={key: f"_{key}" for key in keys})
    table = cells.merge(places, on=[f"_{key}" for key in keys], how="inner", suffixes=("_of_cell", ""))
    columns = [column for column in places if not column.startswith("_")]
    table = table.loc[:, [*columns, *others, *MEASURES]]
    table.attrs = {"metric": sweep.metric, "into": sweep.into}
    return table


def _places(sweep: Sweep, grain: str) -> pd.DataFrame:
    """The places of the swept prompt, with the tile and the image token as the axes of a sweep count them."""
    prompt, by_tile = sweep.prompt, "tile" in sweep.axes
    tiles = sum(layout.num_tiles for layout in prompt.images)
    if len(prompt) > 1 and grain == "position":
        raise ValueError(f"The sweep patches a position in all {len(prompt)} rows at once. Sweep over one row.")
    if grain != "position" and not by_tile and tiles > 1:
        raise ValueError(f"The sweep patches all {tiles} tiles at once. Sweep over tile too.")
    places = (patch_places if grain == "patch" else token_places)(prompt)
    image = places["image"].to_numpy()
    places["_tile"] = places["tile"].to_numpy() + np.array([layout.tiles.start for layout in prompt.images])[image]
    if grain == "image_token":
        width = np.array([layout.grid[1] for layout in prompt.images])[image]
        places["_image_token"] = places["tile_row"].to_numpy() * width + places["tile_column"].to_numpy()
    else:
        places[f"_{grain}"] = places[grain]
    return places
