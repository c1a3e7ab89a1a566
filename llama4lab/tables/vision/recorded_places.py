"""The image tokens that a run has: where each lies in the picture, and where in the run's tensors."""

# pandas declares what it gives as wide unions.
# pyright: reportGeneralTypeIssues=false

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from llama4lab.run.run import Run
from llama4lab.tables.token_index import at_tokens
from llama4lab.tables.vision.places import token_places

FEATURES, MERGED = "image_features", "embed_merged"


def recorded_places(run: Run) -> pd.DataFrame:
    """Gives one line for each image token that is in a run, in the order of the prompt.

    Columns:
        row, image, tile, is_global, tile_row, tile_column, position, left, top, right, bottom: as in `token_places`.
        batch_index: index on the "batch" axis of the run's tensors.
        seq_index: index on their "seq" axis.

    Raises:
        ValueError: if the run has no image token.
    """
    places = token_places(run.prompt)
    rows = {row: index for index, row in enumerate(run.rows)}
    positions = {position: index for index, position in enumerate(run.positions)}
    kept = places["row"].isin(list(rows)) & places["position"].isin(list(positions))
    if not kept.any():
        raise ValueError(
            f"Image tokens were asked for, but rows {', '.join(map(str, run.rows))} of the prompt have no image, or "
            "none at the positions of the run.\nPut images into the prompt, or do not cut what has them."
        )
    table = places.loc[kept].reset_index(drop=True)
    table["batch_index"] = table["row"].map(rows)
    table["seq_index"] = table["position"].map(positions)
    return table


def image_features(run: Run, places: pd.DataFrame) -> Float[Tensor, "token d_model"] | None:
    """Gives the feature of each image token as it enters the text model; None if it was not recorded."""
    if MERGED in run:
        return at_tokens(run[MERGED], places)
    if FEATURES not in run:
        return None
    layouts = run.prompt.images
    first = torch.tensor([layouts[image].tiles.start for image in places["image"]])
    columns = torch.tensor([layouts[image].grid[1] for image in places["image"]])
    tile, row, column = (torch.tensor(places[name].to_numpy()) for name in ("tile", "tile_row", "tile_column"))
    features = run[FEATURES].detach()
    return features[(first + tile).to(features.device), (row * columns + column).to(features.device)].cpu()
