"""All images of a batch: which row each belongs to, their tiles, and where they stand in the rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.image_processing_utils import BaseImageProcessor

from llama4lab.prompt.picture import Picture
from llama4lab.prompt.tiling import Tiling


@dataclass
class ImageSet:
    """The images of a batch in order, and their tiles.

    Attributes:
        pictures: the images of all rows, one after the other.
        tilings: how each is cut into tiles.
        pixel_values: the tiles of all images; None without images.
    """

    pictures: list[Picture]
    tilings: list[Tiling]
    pixel_values: Float[Tensor, "tile 3 side side"] | None

    @classmethod
    def of(cls, pictures: list[Picture], processor: BaseImageProcessor | None, normalize: str | None) -> "ImageSet":
        """Cuts the images into tiles by an image processor: ours, or transformers' own."""
        if not pictures or processor is None:
            return cls([], [], None)
        options: dict[str, Any] = {} if normalize is None else {"normalize": normalize}
        settings: Any = processor
        values = settings([picture.values for picture in pictures], return_tensors="pt", **options)
        # `normalize` of transformers' own class is a method, and its numbers are never Meta's.
        as_meta = (normalize or settings.normalize) == "meta"
        rule = (settings.size["height"], settings.max_patches, settings.resize_to_max_canvas, as_meta)
        tilings = [Tiling.of(picture.size, *rule) for picture in pictures]
        made, expected = len(values["pixel_values"]), sum(tiling.num_tiles for tiling in tilings)
        ratios = torch.as_tensor(values["aspect_ratios"]).tolist()
        if made != expected or ratios != [[tiling.rows, tiling.cols] for tiling in tilings]:
            raise ValueError(
                f"The image processor made {made} tiles in the layout {ratios}.\n"
                f"Llama 4's rule for these images gives {expected} tiles: the processor is of another model."
            )
        return cls(pictures, tilings, values["pixel_values"])


def is_nested(images: Any) -> bool:
    """True for a list of lists of images: one list for each row."""
    return isinstance(images, (list, tuple)) and bool(images) and all(isinstance(i, (list, tuple)) for i in images)


def share_out(images: Any, wanted: Sequence[int]) -> list[list[Any]]:
    """Gives each row its images.

    Args:
        images: one image, a list of them for all rows in order, or a list of lists (one for each row).
        wanted: how many images each row has a place for.

    Raises:
        ValueError: if there are more or fewer images than places.
    """
    if images is None:
        images = []
    if not isinstance(images, (list, tuple)):
        images = [images]
    if is_nested(images):
        shared = [list(entry) for entry in images]
        if len(shared) != len(wanted):
            raise ValueError(f"Images for {len(shared)} rows were given, but the prompt has {len(wanted)} rows.")
    else:
        ends = [sum(wanted[: row + 1]) for row in range(len(wanted))]
        shared = [list(images[end - count : end]) for end, count in zip(ends, wanted, strict=True)]
        if len(images) != sum(wanted):
            raise ValueError(
                f"{len(images)} images were given, but the prompt has a place for {sum(wanted)}.\n"
                "A place is <|image|> in a text or {'type': 'image'} in a message. Rows can have lists of their own."
            )
    for row, (have, count) in enumerate(zip(shared, wanted, strict=True)):
        if len(have) != count:
            raise ValueError(f"Row {row} was given {len(have)} images, but it has a place for {count}.")
    return shared


def share_by_tokens(num_tokens: Sequence[int], wanted: Sequence[int]) -> list[int]:
    """Gives the row of every image where rows are token ids, which hold the image tokens already.

    Args:
        num_tokens: how many image tokens each image takes.
        wanted: how many image tokens each row has.

    Raises:
        ValueError: if the counts do not match.
    """
    rows: list[int] = []
    for row, count in enumerate(wanted):
        filled = 0
        while filled < count and len(rows) < len(num_tokens):
            filled += num_tokens[len(rows)]
            rows.append(row)
        check_image_tokens(row, count, filled)
    if len(rows) < len(num_tokens):
        raise ValueError(
            f"{len(num_tokens)} images were given, but the image tokens of the ids are filled by {len(rows)} of them."
        )
    return rows


def check_image_tokens(row: int, found: int, expected: int) -> None:
    """Raises ValueError unless a row has the image tokens that its images have tiles for."""
    if found != expected:
        raise ValueError(
            f"Row {row} has {found} <|patch|> tokens, but its images make {expected} image tokens.\n"
            "Each <|patch|> token takes one vector of an image, so the two must be equal."
        )
