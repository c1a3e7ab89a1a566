"""Attention rolled out to the image patches, as a table."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.run.metrics import Metric
from llama4lab.run.recording import as_prompt
from llama4lab.run.vision.rollouts import attention_rollout, checked_place, gradient_rollout
from llama4lab.tables.vision.places import patch_places


def rollout(
    model: HookedPreTrainedModel,
    prompt: Any,
    *,
    position: int = -1,
    row: int = 0,
    metric: Metric | Callable[[Tensor], Tensor] | None = None,
    gradient: bool = False,
) -> pd.DataFrame:
    """Gives how much of what a token holds at the end comes from each image patch, as far as attention tells.

    The weights are products of attention over the layers of the vision tower and of the text model; see
    `llama4lab.run.vision.rollouts` for formulas and sources. They know who attended to whom and nothing else: MLPs,
    experts, adapter, the values that attention moves and what cancels are not in them. A map is a guess to be checked
    by `occlusion` or a sweep.

    Args:
        model: The model.
        prompt: A prompt with an image in the row, or anything that `model.prompt` takes.
        position: The position of the token.
        row: Its row.
        metric: What attention has to raise to count, read at the same position; by default the largest logit there.
            Only with `gradient`.
        gradient: Whether only attention that raises the metric counts, instead of all.

    Columns:
        row, image, tile, is_global, tile_row, tile_column, patch, token_row, token_column, position, left, top, right,
            bottom: the image patch, as in `layout`; `position` is that of the image token which it flows into.
        weight: the share of the patch in the token.

    `attrs` have the other shares, `text` and `class_token`, which together with the weights make 1, and `position` and
    `gradient`. Half of a token is itself in each layer, so that most of it is text; with gradients, what the
    text has depends on how large the metric is. The proportions between patches are what counts.

    Raises:
        ValueError: if the row has no image, the position is padding, the metric has no derivative, or it is given
            without `gradient`.
        IndexError: if there is no such row or position.
    """
    if metric is not None and not gradient:
        raise ValueError("A metric was given, but without gradients none is read. Add gradient=True, or leave it out.")
    prompt = as_prompt(model, prompt)
    row, position = checked_place(prompt, row, position)
    if gradient:
        found = gradient_rollout(model, prompt, row, position, metric)
    else:
        found = attention_rollout(model, prompt, row, position)
    own = [number for number, layout in enumerate(prompt.images) if layout.row == row]
    table = patch_places(prompt, own)
    table["weight"] = np.asarray(found.patches.flatten())
    shares = {"text": float(found.text.sum()), "class_token": float(found.class_tokens.sum())}
    table.attrs = {**shares, "position": position, "gradient": gradient}
    return table
