"""The image tokens of a prompt: where each lies in the picture, and what the model made of it."""

# pandas declares what it gives as wide unions.
# pyright: reportReturnType=false

import pandas as pd
import torch

from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.run.run import Run
from llama4lab.tables.token_index import at_tokens
from llama4lab.tables.vision.lenses import FIRST, lens, recorded_layers
from llama4lab.tables.vision.recorded_places import image_features, recorded_places

INDICES = "feed_forward.router.indices"


def tokens(run: Run, model: HookedPreTrainedModel | None = None) -> pd.DataFrame:
    """Gives one line for each image token of a run.

    Args:
        run: A run of a prompt with images.
        model: The model, if the lens is to be read; the run then has `layers.*.resid_post`.

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
        norm: length of the token's image feature, as it enters the text model; only if `image_features` or
            `embed_merged` was recorded.
        expert_{layer}: expert of slot 0 in that layer; only where `router.indices` was recorded.
        lens_{layer}: the word that the logit lens finds most probable after that layer; only with a model, and where
            `resid_post` was recorded.

    Raises:
        ValueError: if no image of the prompt is in the run.
        KeyError: if a model is given, but no layer was recorded that a lens could read.
    """
    places = recorded_places(run)
    table = places.drop(columns=["batch_index", "seq_index"])
    features = image_features(run, places)
    if features is not None:
        table["norm"] = torch.linalg.vector_norm(features.float(), dim=-1).numpy()
    experts = run.layers(INDICES) if any(name.endswith(INDICES) for name in run) else {}
    for layer, chosen in experts.items():
        table[f"expert_{layer}"] = at_tokens(chosen, places)[:, 0].numpy()
    if model is not None:
        layers = [layer for layer in recorded_layers(run) if layer != FIRST]
        words = lens(run, model, layers=layers, k=1)
        for layer, own in words.groupby("layer", sort=True):
            table[f"lens_{layer}"] = own["token"].to_numpy()
    return table
