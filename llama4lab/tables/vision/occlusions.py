"""Occlusion: a box slides over the picture; where hiding what is behind it changes the answer, that was needed."""

from collections.abc import Callable
from typing import Any, TypedDict, Unpack

import pandas as pd
from torch import Tensor

from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.run.metrics import Metric, as_metric
from llama4lab.run.recording import as_prompt
from llama4lab.run.vision.covered_pictures import covered_values, mean_colour, picture_of, sliding_boxes

Colour = tuple[int, int, int]


class Running(TypedDict, total=False):
    """How boxes are run; see `occlusion`."""

    progress: bool


def occlusion(
    model: HookedPreTrainedModel,
    prompt: Any,
    *,
    metric: Metric | Callable[[Tensor], Tensor],
    size: int | None = None,
    step: int | None = None,
    image: int = 0,
    color: Colour | None = None,
    **running: Unpack[Running],
) -> pd.DataFrame:
    """Paints a square box over each part of a picture in turn, and measures what the model then makes of it.

    The box is painted on the original picture, which then goes through the model's image processor, so that all tiles
    that show it change, the global one too. A box hides, but it also shows something new: its edges, and its colour.
    What it hides has to be about as large as the box to be missed. (Zeiler & Fergus, 2014, arXiv:1311.2901.)

    Args:
        model: The model.
        prompt: A prompt with images, made by `model.prompt`.
        metric: One of `lab.metrics`, or a function of the logits.
        size: The side of the box, in pixels of the original; a third of the picture's shorter side by default.
        step: Pixels from one place of the box to the next; a quarter of its side by default. The last places touch the
            right and the lower border.
        image: The number of the image in the prompt.
        color: Red, green and blue of the box, 0 to 255; the mean of the picture by default.
        running: `progress`: whether to show a bar; it is shown by default.

    Columns:
        row: row of the prompt.
        image: number of the image.
        left, top, right, bottom: the box, in pixels of the original. Boxes overlap where `step` is less than `size`.
        patched: the metric of that row with the box.
        base: without it.
        effect: `patched` minus `base`.

    Raises:
        IndexError: if there is no such image.
        ValueError: if the box does not fit the picture, the colour is none, or the pixel values of the prompt are not
            what the image processor makes of the picture.
    """
    prompt = as_prompt(model, prompt)
    picture, chosen = picture_of(prompt, image), as_metric(metric)
    side = max(min(picture.size) // 3, 1) if size is None else size
    stride = max(side // 4, 1) if step is None else step
    if not (1 <= side <= min(picture.size) and stride >= 1):
        raise ValueError(
            f"A box of {side} pixels in steps of {stride} was asked for; the picture is {picture.width} pixels wide "
            f"and {picture.height} high.\nTake a size from 1 to {min(picture.size)}, and a step of at least 1."
        )
    colour = mean_colour(picture) if color is None else color
    if len(colour) != 3 or not all(0 <= level <= 255 for level in colour):
        raise ValueError(f"color is red, green and blue from 0 to 255, not {color}.")
    boxes = sliding_boxes((picture.height, picture.width), side, stride)
    base, found = covered_values(
        *(model, prompt, boxes, chosen.bound(prompt)),
        image=image,
        colour=colour,
        progress=running.get("progress", True),
    )
    table = pd.DataFrame(boxes, columns=["left", "top", "right", "bottom"])
    table.insert(0, "row", prompt.images[image].row)
    table.insert(1, "image", image)
    table["patched"], table["base"] = found, base
    table["effect"] = table["patched"] - table["base"]
    table.attrs = {"metric": chosen.name}
    return table
