"""The items of a corpus: texts, chats, token ids, prompts or rows of a dataset, each with its label."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.prompt.prompt import Prompt

ALL = "all"  # the label without `by`
PARTS = ("prompt", "messages", "text")
By = str | Callable[[Any], Any] | None


@dataclass(frozen=True, eq=False)
class Row:
    """One row of the model's input, without padding.

    Attributes:
        ids: Its tokens.
        pixels: The tiles of its images; None without.
        label: What it counts for.
        item: Which item of the corpus it is from.
        first: Whether it is the first row of the item.
    """

    ids: Int[Tensor, " seq"]
    pixels: Float[Tensor, "tile 3 side side"] | None
    label: str
    item: int
    first: bool

    @property
    def num_tiles(self) -> int:
        """How many tiles its images have."""
        return 0 if self.pixels is None else len(self.pixels)


def labelled(prompts: Any, by: By) -> Iterator[tuple[str, Any]]:
    """Gives the items one by one, each with its label.

    Args:
        prompts: An iterable of items, or label -> iterable of items.
        by: What an item is labelled by: a key of a mapping, an attribute, or a function of the item.

    Raises:
        TypeError: if `prompts` cannot be a corpus.
        ValueError: if there are labels already.
    """
    if not isinstance(prompts, Mapping):
        for item in _several(prompts):
            yield _label(item, by), item
        return
    single = [key for key in PARTS if isinstance(prompts.get(key), str)]
    if single:
        raise TypeError(f"One item with {single[0]!r} was given as the corpus. Put it into a list: [{{...}}].")
    if by is not None:
        raise ValueError(
            f"by={by!r} was given, but the prompts are a mapping, whose keys are the labels: "
            f"{', '.join(map(str, list(prompts)[:4]))}.\nLeave out by, or give one list of items."
        )
    for label, items in prompts.items():
        for item in _several(items):
            yield str(label), item


def rows_of(
    model: HookedPreTrainedModel, item: Any, label: str, number: int, max_length: int | None = None
) -> list[Row]:
    """Makes the rows of an item.

    Args:
        model: The model.
        item: A text, a chat, token ids, a `Prompt`, a mapping with one of these at "text", "messages" or "prompt" (and
            images at "images" or "image"), or an object with the attribute `text` (and `image` or `images`).
        label: What it counts for.
        number: Its number in the corpus.
        max_length: Tokens after so many are left out, and images that do not fit in whole.
    """
    try:
        content, images = _content(item)
        if isinstance(content, Prompt):
            prompt = content
        else:
            prompt = model.prompt(content) if images is None else model.prompt(content, images=images)
        return [_row(prompt, row, label, number, max_length) for row in range(len(prompt))]
    except (TypeError, ValueError, KeyError) as error:
        error.add_note(f"This was item {number} of the prompts (the first is 0).")
        raise


def _several(items: Any) -> Iterable[Any]:
    """A text or a prompt alone is one item, not a sequence of letters or rows."""
    if isinstance(items, str | Prompt):
        return [items]
    if not isinstance(items, Iterable):
        raise TypeError(f"Prompts are an iterable of items, or label -> items; a {type(items).__name__} was given.")
    return items


def _label(item: Any, by: By) -> str:
    if by is None:
        return ALL
    if callable(by):
        return str(by(item))
    if isinstance(item, Mapping):
        if by in item:
            return str(item[by])
        has = f"its keys are {', '.join(map(str, item))}"
    else:
        if hasattr(item, by) and not isinstance(item, str | list | tuple | Tensor | np.ndarray):
            return str(getattr(item, by))
        has = f"it is a {type(item).__name__}"
    raise KeyError(f"by={by!r} is nothing that the item has: {has}. Give label -> items, or a function of the item.")


def _content(item: Any) -> tuple[Any, Any]:
    """What an item says, and its images."""
    if isinstance(item, str | Prompt | list | tuple | Tensor | np.ndarray):
        return item, None
    if isinstance(item, Mapping):
        found = [key for key in PARTS if item.get(key) is not None]
        if len(found) != 1:
            has = f"{' and '.join(found)}" if found else f"only {', '.join(map(str, item))}"
            raise ValueError(f"An item has one of {', '.join(PARTS)}; this one has {has}.")
        images = item.get("images", item.get("image"))
        return item[found[0]], images
    if isinstance(getattr(item, "text", None), str):
        return item.text, getattr(item, "images", getattr(item, "image", None))
    raise TypeError(
        f"An item of the prompts is a {type(item).__name__}.\n"
        "Items are texts, chats, token ids, prompts, mappings with text, messages or prompt, or objects with .text."
    )


def _row(prompt: Prompt, row: int, label: str, number: int, max_length: int | None) -> Row:
    kept = prompt.attention_mask[row].cpu().bool()
    own = [layout for layout in prompt.images if layout.row == row]
    end = len(kept)
    if max_length is not None and int(kept.sum()) > max_length:
        end = int(kept.nonzero()[max_length])
        cut = [int(layout.positions.min()) for layout in own if int(layout.positions.max()) >= end]
        end, own = min([end, *cut]), [layout for layout in own if int(layout.positions.max()) < end]
    ids = prompt.input_ids[row].cpu()[:end][kept[:end]]
    if not len(ids):
        raise ValueError(f"Row {row} has no token" + (f" within max_length={max_length}." if max_length else "."))
    pixels = None
    if own and prompt.pixel_values is not None:
        tiles = [tile for layout in own for tile in range(layout.tiles.start, layout.tiles.stop)]
        pixels = prompt.pixel_values[tiles].cpu()
    return Row(ids, pixels, label, number, first=row == 0)
