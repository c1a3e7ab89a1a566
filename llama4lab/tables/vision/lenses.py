"""The logit lens of image tokens: what the model would say at each place of a picture, layer by layer.

An image token has no next token that it was trained to give; the words that its vector leans to may still tell what it
stands for (Neo et al. 2024, "Towards interpreting visual information processing in vision-language models").
"""

# pandas declares what it gives as wide unions.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportReturnType=false

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.prompt.tokenizer import token_strings
from llama4lab.run.run import Run
from llama4lab.run.tuned_lens import TunedLens
from llama4lab.run.unembedding import Unembedding
from llama4lab.tables.token_index import at_tokens
from llama4lab.tables.vision.recorded_places import MERGED, image_features, recorded_places

RESIDUAL = "resid_post"
FIRST = -1  # the layer of what enters the text model
INDICES = ["batch_index", "seq_index"]


@torch.no_grad()
def lens(
    run: Run,
    model: HookedPreTrainedModel,
    *,
    layers: int | Sequence[int] | None = None,
    k: int = 5,
    tuned: TunedLens | None = None,
) -> pd.DataFrame:
    """Gives the `k` most probable words at every image token, layer by layer.

    Args:
        run: A run with `layers.*.resid_post`; for layer -1 also `embed_merged` or `image_features`.
        model: The model.
        layers: A layer or several; -1 for the image features as they enter the text model. By default all that were
            recorded.
        k: How many words; all, if there are fewer.
        tuned: A tuned lens; by default the logit lens.

    Columns:
        row, image, tile, is_global, tile_row, tile_column, position, left, top, right, bottom: place of the image
            token, as in `tokens`.
        layer: after which layer the vector was read; -1 before the first.
        rank: 0 for the most probable.
        token_id: id of the word.
        token: its text.
        logit: its logit.
        prob: its probability.

    Lines are in the order of the layers, in each in the order of the prompt.

    Raises:
        KeyError: if a layer was not recorded, or the tuned lens was not fitted there.
        ValueError: if the run has no image token, or `k` is less than 1.
    """
    if k < 1:
        raise ValueError(f"k={k} words were asked for; k is at least 1.")
    parts = []
    for lines, logits in _readings(run, model, layers, tuned):
        best, ids = logits.topk(min(k, logits.shape[-1]), dim=-1)
        shown = ids.shape[1]
        table = lines.loc[lines.index.repeat(shown)].reset_index(drop=True)
        table["rank"] = np.tile(np.arange(shown), len(lines))
        table["token_id"] = ids.flatten().cpu().numpy()
        table["token"] = token_strings(run.prompt.tokenizer, ids.flatten().tolist())
        table["logit"] = best.flatten().cpu().numpy()
        table["prob"] = (best - logits.logsumexp(-1, keepdim=True)).exp().flatten().cpu().numpy()
        parts.append(table)
    return pd.concat(parts, ignore_index=True)


@torch.no_grad()
def word_map(
    run: Run,
    model: HookedPreTrainedModel,
    word: str | int,
    *,
    layers: int | Sequence[int] | None = None,
    tuned: TunedLens | None = None,
) -> pd.DataFrame:
    """Gives where in the image, and from which layer on, the model leans to a word.

    Args:
        run: As for `lens`.
        model: The model.
        word: A word that is one token, a leading space included, or the id of a token.
        layers: As for `lens`.
        tuned: As for `lens`.

    Columns:
        row, image, tile, is_global, tile_row, tile_column, position, left, top, right, bottom: as in `lens`.
        layer: as in `lens`.
        logit: the logit of the word.
        prob: its probability.
        rank: how many tokens are more probable; 0 for the most probable.

    `attrs` have `token_id` and `token`.

    Raises:
        KeyError: as `lens`.
        ValueError: if the run has no image token, the word is several tokens, or the prompt has no tokenizer.
        IndexError: if the vocabulary has no such id.
    """
    token_id = run.prompt.token_id(word) if isinstance(word, str) else word
    vocab = Unembedding(model).vocab
    if not 0 <= token_id < vocab:
        raise IndexError(f"A map of token {token_id} was asked for; the vocabulary has ids 0 to {vocab - 1}.")
    parts = []
    for lines, logits in _readings(run, model, layers, tuned):
        own = logits[:, token_id]
        columns = {"logit": own, "prob": (own - logits.logsumexp(-1)).exp(), "rank": (logits > own[:, None]).sum(-1)}
        parts.append(lines.assign(**{name: column.cpu().numpy() for name, column in columns.items()}))
    table = pd.concat(parts, ignore_index=True)
    table.attrs = {"token_id": token_id, "token": token_strings(run.prompt.tokenizer, [token_id])[0]}
    return table


def recorded_layers(run: Run, layers: int | Sequence[int] | None = None) -> list[int]:
    """Gives the layers at which a lens can read a run; -1 for what enters the text model.

    Args:
        run: The run.
        layers: Those that are asked for; all by default.

    Raises:
        KeyError: if one was not recorded, or none at all.
    """
    entering = [FIRST] if any(name in run for name in (MERGED, "image_features")) else []
    after = [layer for layer in range(run.meta["num_layers"]) if f"layers.{layer}.{RESIDUAL}" in run]
    asked = [*entering, *after] if layers is None else [layers] if isinstance(layers, int) else list(layers)
    lacking = [layer for layer in asked if layer not in (*entering, *after)]
    if lacking or not asked:
        what = f"Layer {lacking[0]} was asked for" if lacking else "A lens was asked for"
        raise KeyError(
            f"{what}; recorded for a lens are layers {', '.join(map(str, (*entering, *after))) or 'none'}. "
            'Record at=["embed_merged", "layers.*.resid_post"]; layer -1 is what enters the text model.'
        )
    return asked


def _readings(
    run: Run, model: HookedPreTrainedModel, layers: int | Sequence[int] | None, tuned: TunedLens | None
) -> Iterator[tuple[pd.DataFrame, Float[Tensor, "line vocab"]]]:
    """Lines of the table and their logits, a chunk at a time."""
    asked, places, unembedding = recorded_layers(run, layers), recorded_places(run), Unembedding(model)
    for layer in asked:
        name = MERGED if layer == FIRST else f"layers.{layer}.{RESIDUAL}"
        x = image_features(run, places) if layer == FIRST else at_tokens(run[name], places)
        assert x is not None
        lines = places.drop(columns=INDICES).assign(layer=layer)
        for own in unembedding.chunks(len(lines)):
            moved = x[own] if tuned is None else tuned.translated(name, x[own])
            yield lines.iloc[own].reset_index(drop=True), unembedding.logits(moved)
