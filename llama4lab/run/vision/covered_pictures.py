"""A picture with a box painted over, seen by the model through the real image processor: what becomes of a metric."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.prompt.images import ImageProcessor
from llama4lab.prompt.prompt import Prompt
from llama4lab.run.listening import is_hooked
from llama4lab.run.metrics import BoundMetric
from llama4lab.run.sweep_memory import MOST_LOGITS, MOST_TILES, MOST_TOKENS

Box = tuple[int, int, int, int]
Colour = tuple[int, int, int]
Tiles = Float[Tensor, "tile 3 side side"]


def mean_colour(picture: Image.Image) -> Colour:
    """The mean of all pixels, channel by channel."""
    red, green, blue = np.asarray(picture.convert("RGB")).reshape(-1, 3).mean(0).round().astype(int).tolist()
    return red, green, blue


def sliding_boxes(size: tuple[int, int], side: int, step: int) -> list[Box]:
    """Gives (left, top, right, bottom) of every place of a square box, row by row; the last ones touch the border.

    Args:
        size: Height and width of the picture.
        side: Of the box.
        step: From one place to the next.
    """
    tops, lefts = ([*range(0, length - side, step), length - side] for length in size)
    return [(left, top, left + side, top + side) for top in tops for left in lefts]


def picture_of(prompt: Prompt, image: int) -> Image.Image:
    """The original of an image of a prompt.

    Raises:
        IndexError: if there is no such image.
        ValueError: if the prompt does not have its picture.
    """
    if not 0 <= image < len(prompt.images):
        raise IndexError(f"Image {image} was asked for, but the prompt has {len(prompt.images)} images.")
    original = prompt.images[image].original
    if original is None or prompt.pixel_values is None:
        raise ValueError(f"Image {image} of the prompt has no picture to paint on. Make the prompt by model.prompt.")
    return original


@torch.no_grad()
def covered_values(
    model: HookedPreTrainedModel,
    prompt: Prompt,
    boxes: Sequence[Box],
    metric: BoundMetric,
    *,
    image: int,
    colour: Colour,
    progress: bool,
) -> tuple[float, list[float]]:
    """Gives the metric of the row of an image as it is, and with each of the boxes painted over.

    Args:
        model: The model.
        prompt: The prompt.
        boxes: The boxes.
        metric: Bound to the prompt.
        image: The number of the image in the prompt.
        colour: What the boxes are filled with.
        progress: Whether to show a bar.

    Raises:
        ValueError: if the pixel values of the prompt are not what the model's image processor makes of the picture.
    """
    picture, copies = picture_of(prompt, image), _Copies.of(prompt, image, metric)
    tiles_of = _processing(model, copies, picture)
    base, found = copies.values(model, copies.tiles)[0], []
    with tqdm(total=len(boxes), disable=not progress, unit="box") as bar:
        for first in range(0, len(boxes), most := copies.most(model)):
            some = boxes[first : first + most]
            found += copies.values(model, tiles_of([_painted(picture, box, colour) for box in some]))
            bar.update(len(some))
    return base, found


@dataclass(frozen=True, eq=False)
class _Copies:
    """Copies of a prompt in one batch that differ in the tiles of one image.

    Attributes:
        prompt: The row of the image; all rows, if the metric mixes them.
        own: The tiles of the image among those of `prompt`.
        row: The row of the image in `prompt`.
        rows: The rows of the whole prompt that `prompt` has.
        metric: Bound to the whole prompt.
    """

    prompt: Prompt
    own: slice
    row: int
    rows: list[int]
    metric: BoundMetric

    @classmethod
    def of(cls, prompt: Prompt, image: int, metric: BoundMetric) -> "_Copies":
        row = prompt.images[image].row
        if not metric.by_row:
            return cls(prompt, prompt.images[image].tiles, row, list(range(len(prompt))), metric)
        alone, before = prompt.row(row), [layout.row for layout in prompt.images[:image]].count(row)
        return cls(alone, alone.images[before].tiles, 0, [row], metric)

    @property
    def tiles(self) -> Tiles:
        """The tiles of the image as the prompt has them."""
        assert self.prompt.pixel_values is not None
        return self.prompt.pixel_values[self.own]

    def most(self, model: HookedPreTrainedModel) -> int:
        """How many copies to run at once. Hooks of others expect the prompt as it is."""
        if is_hooked(model):
            return 1
        assert self.prompt.pixel_values is not None
        tokens, tiles = self.prompt.input_ids.numel(), len(self.prompt.pixel_values)
        logits = len(self.prompt) * len(self.metric.positions)
        return max(1, min(MOST_TOKENS // tokens, MOST_TILES // tiles, MOST_LOGITS // logits))

    def values(self, model: HookedPreTrainedModel, tiles: Tiles) -> list[float]:
        """The metric of the image's row in each copy, from the tiles of the image in all copies."""
        every = self.prompt.pixel_values
        assert every is not None
        changed = tiles.to(every.device, every.dtype).unflatten(0, (-1, self.own.stop - self.own.start))
        pixels = every.expand(len(changed), *every.shape).clone()
        pixels[:, self.own] = changed
        logits = model(
            input_ids=self.prompt.input_ids.repeat(len(changed), 1).to(model.device),
            attention_mask=self.prompt.attention_mask.repeat(len(changed), 1).to(model.device),
            pixel_values=pixels.flatten(0, 1).to(model.device),
            use_cache=False,
            logits_to_keep=torch.tensor(self.metric.positions, device=model.device),
        ).logits
        rows = torch.tensor(self.rows).repeat(len(changed))
        values = self.metric.over_batches(logits, rows, len(self.rows))
        return values.float().view(len(changed), -1)[:, self.row].tolist()


def _processing(model: HookedPreTrainedModel, copies: _Copies, picture: Image.Image) -> Callable[..., Tiles]:
    """The image processor, set as it was when the prompt was made."""
    processor: Any = model.prompter.image_processor
    # Nobody wrote down whose pixel values the prompt has; transformers' own processor makes only one kind.
    kinds = ["hf", "meta"] if isinstance(processor, ImageProcessor) else [None]
    have = copies.tiles.cpu()
    for kind in kinds if processor is not None else []:
        tiles_of = partial(_processed, processor, {} if kind is None else {"normalize": kind})
        if torch.equal(tiles_of([picture]).to(have.dtype), have):
            return tiles_of
    raise ValueError(
        "The model's image processor does not make the pixel values of the prompt from its picture, so that a painted "
        "picture would differ in more than the paint.\nMake the prompt by model.prompt(..., images=...)."
    )


def _processed(processor: Any, options: dict[str, str], pictures: list[Image.Image]) -> Tiles:
    return processor(pictures, return_tensors="pt", **options)["pixel_values"]


def _painted(picture: Image.Image, box: Box, colour: Colour) -> Image.Image:
    painted = picture.convert("RGB")
    painted.paste(colour, box)
    return painted
