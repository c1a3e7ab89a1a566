"""The estimates of hook points as lines of a table: one for each cell and row of the pair."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from torch import Tensor

from llama4lab.prompt.prompt import Prompt
from llama4lab.run.hook_names import component_of, layer_of
from llama4lab.run.sweep_axes import NAMED, WORDS, word_of

AXES = (*NAMED, *WORDS)


def has_axis(name: str, shape: str, axis: str) -> bool:
    """Whether the estimates of a hook point can be told apart along an axis.

    Args:
        name: The hook point.
        shape: The axes of its estimates in words.
        axis: An axis of a sweep.
    """
    if axis in NAMED:
        return axis != "layer" or layer_of(name) is not None
    return axis in WORDS and word_of(axis, name, shape) in shape.split()


def lines_of(name: str, shape: str, parts: Mapping[str, Tensor], axes: Sequence[str], prompt: Prompt) -> pd.DataFrame:
    """Gives one line for each cell and row, with the estimates summed over the axes that are not asked for.

    Args:
        name: The hook point.
        shape: The axes of its estimates in words.
        parts: Column -> tensor of that shape.
        axes: The axes that are asked for.
        prompt: The prompt that would be patched.

    Columns: the axes, `row`, and those of `parts`.

    Raises:
        ValueError: if the hook point does not have an axis.
    """
    for axis in axes:
        if not has_axis(name, shape, axis):
            own = ", ".join(axis for axis in AXES if has_axis(name, shape, axis))
            raise ValueError(f"The estimates at {name!r} have no axis {axis!r}; they have {own}.")
    words = shape.split()
    asked = {axis: str(word_of(axis, name, shape)) for axis in axes if axis not in NAMED}
    left = [word for word in words if word == words[0] or word in asked.values()]
    summed = [index for index, word in enumerate(words) if word not in left]
    numbers = {part: (t.double().sum(summed) if summed else t.double()).numpy() for part, t in parts.items()}
    sizes = next(iter(numbers.values())).shape
    places = dict(zip(left, np.indices(sizes).reshape(len(left), -1), strict=True))
    rows, tiles = _rows(prompt, words[0], sizes[0])
    columns: dict[str, object] = {}
    for axis in axes:
        if axis in NAMED:
            columns[axis] = {"layer": layer_of, "component": component_of, "hook_point": str}[axis](name)
        else:
            columns[axis] = tiles[places["tile"]] if axis == "tile" else places[asked[axis]]
    flat = {part: number.ravel() for part, number in numbers.items()}
    lines = pd.DataFrame({**columns, "row": rows[places[words[0]]], **flat})
    if "position" not in axes:
        return lines
    used = prompt.attention_mask.cpu().any(0)  # a column of nothing but padding is no position
    return lines.loc[used[lines["position"].tolist()].tolist()]


def _rows(prompt: Prompt, word: str, length: int) -> tuple[np.ndarray, np.ndarray]:
    """For each place of the leading axis the row of the prompt, and which of the row's tiles it is."""
    if word == "batch":
        return np.arange(length), np.zeros(length, dtype=int)
    rows = np.array([image.row for image in prompt.images for _ in range(image.num_tiles)])
    return rows, np.array([int((rows[:tile] == row).sum()) for tile, row in enumerate(rows)])
