"""The image tokens of a prompt: where each lies in the picture, and what the model made of it."""

import numpy as np
import pandas as pd
import torch

from llama4lab.prompt.image_layout import ImageLayout
from llama4lab.run.run import Run

INDICES = "feed_forward.router.indices"


def tokens(run: Run) -> pd.DataFrame:
    """Gives one line for each image token of a run.

    Columns:
        row: row of the prompt.
        image: number of the image, counted over the whole prompt as in `prompt.images`.
        tile: tile of the image, from 0.
        is_global: whether the tile shows the whole image rather than a part of it. An image of one tile has only that.
        tile_row: row of the token in its tile.
        tile_column: column of the token in its tile.
        position: position of the token in the prompt.
        left, top, right, bottom: the box of the picture that the token shows, in pixels of the original; a box without
            area shows only the filling beside the picture.
        norm: length of the token's image feature, as it enters the text model; only if `image_features` was recorded.
        expert_{layer}: expert of slot 0 in that layer; only where `router.indices` was recorded.

    Raises:
        ValueError: if no image of the prompt is in the run.
    """
    experts = run.layers(INDICES) if any(name.endswith(INDICES) for name in run) else {}
    parts = []
    for number, layout in enumerate(run.prompt.images):
        if layout.row not in run.rows:
            continue
        table = _places(layout)
        table.insert(1, "image", number)
        if "image_features" in run:
            table["norm"] = _norms(run, layout)
        table = table[table["position"].isin(run.positions)]
        # Images count in the prompt, tensors in the run, which may be cut.
        at = [run.positions.index(position) for position in table["position"]]
        for layer, chosen in experts.items():
            table[f"expert_{layer}"] = chosen[run.rows.index(layout.row), at, 0].cpu().numpy()
        parts.append(table)
    if not parts:
        raise ValueError(
            f"Image tokens were asked for, but rows {', '.join(map(str, run.rows))} of the prompt have no image.\n"
            "Put images into the prompt, or do not cut the rows that have them."
        )
    return pd.concat(parts, ignore_index=True)


def _places(layout: ImageLayout) -> pd.DataFrame:
    tile, tile_row, tile_column = layout.places.cpu().numpy().T
    left, top, right, bottom = layout.boxes.cpu().numpy().T
    return pd.DataFrame(
        {
            "row": layout.row,
            "tile": tile,
            "is_global": tile == layout.global_tile,
            "tile_row": tile_row,
            "tile_column": tile_column,
            "position": layout.positions.cpu().numpy(),
            "left": left,
            "top": top,
            "right": right,
            "bottom": bottom,
        }
    )


def _norms(run: Run, layout: ImageLayout) -> np.ndarray:
    """The length of the feature of each image token of an image."""
    features = run["image_features"][layout.tiles].detach().float()
    tile, row, column = layout.places.to(features.device).unbind(dim=1)
    return torch.linalg.vector_norm(features[tile, row * layout.grid[1] + column], dim=-1).cpu().numpy()
