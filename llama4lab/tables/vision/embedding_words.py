"""Which input embeddings the projected features of an image are most like."""

# pandas declares what it gives as wide unions.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.prompt.tokenizer import token_strings
from llama4lab.run.run import Run
from llama4lab.run.unembedding import input_device
from llama4lab.tables.vision.recorded_places import image_features, recorded_places

ROWS = 4096  # embeddings that are read at a time


@torch.no_grad()
def nearest_words(run: Run, model: HookedPreTrainedModel, k: int = 5) -> pd.DataFrame:
    """Gives the `k` words whose input embeddings are nearest in direction to each image feature.

    Image features enter the text model in place of embeddings. They need not be like any: where the cosines are small,
    the nearest word says little.

    Args:
        run: A run with `image_features` or `embed_merged`.
        model: The model.
        k: How many words; all, if there are fewer.

    Columns:
        row, image, tile, is_global, tile_row, tile_column, position, left, top, right, bottom: place of the image
            token, as in `tokens`.
        rank: 0 for the nearest.
        token_id: id of the word.
        token: its text.
        cosine: of its embedding and the feature. An embedding without length is like nothing: 0.

    Raises:
        KeyError: if the features were not recorded.
        ValueError: if the run has no image token, or `k` is less than 1.
    """
    if k < 1:
        raise ValueError(f"k={k} words were asked for; k is at least 1.")
    places = recorded_places(run)
    features = image_features(run, places)
    if features is None:
        raise KeyError('The image features were not recorded. Record at="image_features" or at="embed_merged".')
    cosine, ids = _nearest(model, features, k)
    shown = ids.shape[1]
    table = places.drop(columns=["batch_index", "seq_index"])
    table = table.loc[table.index.repeat(shown)].reset_index(drop=True)
    table["rank"] = np.tile(np.arange(shown), len(places))
    table["token_id"] = ids.flatten().numpy()
    table["token"] = token_strings(run.prompt.tokenizer, ids.flatten().tolist())
    table["cosine"] = cosine.flatten().numpy()
    return table


def _nearest(
    model: HookedPreTrainedModel, features: Float[Tensor, "token d_model"], k: int
) -> tuple[Float[Tensor, "token k"], Int[Tensor, "token k"]]:
    """Cosines and ids of the nearest embeddings; the vocabulary is read a piece at a time."""
    embed = model.get_input_embeddings()
    place = input_device(embed, model.device)
    directions = torch.nn.functional.normalize(features.to(place).float(), dim=-1)
    best = directions.new_zeros(len(directions), 0)
    ids = torch.zeros(len(directions), 0, dtype=torch.long, device=place)
    for own in torch.arange(int(model.text.config.vocab_size), device=place).split(ROWS):
        # The module is called rather than its weight read, so that it makes no difference where the weight waits.
        words = torch.nn.functional.normalize(embed(own).float(), dim=-1).to(place)
        best = torch.cat([best, directions @ words.mT], dim=1)
        ids = torch.cat([ids, own.expand(len(directions), -1)], dim=1)
        best, kept = best.topk(min(k, best.shape[1]), dim=1)
        ids = ids.gather(1, kept)
    return best.clamp(-1, 1).cpu(), ids.cpu()
