"""From a box of a picture to the region of the model that shows it."""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llama4lab.prompt.prompt import Prompt
from llama4lab.run.vision.regions import ImageRegion, layout_of

Grain = Literal["overlap", "inside"]
ROUNDING = 1e-3  # pixels; the edges of cells are float32


def image_region(
    prompt: Prompt, box: Sequence[float | int], *, image: int = 0, grain: Grain = "overlap"
) -> ImageRegion:
    """Gives the part of an image that a box covers, as places of the model.

    Args:
        prompt: A prompt with images.
        box: Left, top, right and bottom in pixels of the original picture.
        image: The number of the image in the prompt.
        grain: "overlap" takes every cell that shares some area with the box, "inside" only those that lie in it whole.
            Cells are image patches where the model has patches, and image tokens behind the pixel shuffle.

    Raises:
        IndexError: if there is no such image.
        ValueError: if the box is none, leaves the picture, or holds no image patch.
    """
    layout = layout_of(prompt, image)
    if grain not in ("overlap", "inside"):
        raise ValueError(f"grain is 'overlap' or 'inside', not {grain!r}.")
    given = [float(edge) for edge in box]
    height, width = layout.size
    if len(given) != 4 or not (0 <= given[0] < given[2] <= width and 0 <= given[1] < given[3] <= height):
        raise ValueError(
            f"The box {given} was asked for in a picture {width} pixels wide and {height} high.\n"
            "A box is (left, top, right, bottom), with left < right <= width and top < bottom <= height."
        )
    patches, tokens = (_covered(boxes, given, grain) for boxes in (layout.patch_boxes, layout.boxes))
    if not bool(patches.any()):
        widest = (layout.patch_boxes[:, 2:] - layout.patch_boxes[:, :2]).amax(0).tolist()
        raise ValueError(
            f"No image patch lies inside the box {given}; they are up to {widest[0]:.1f} x {widest[1]:.1f} pixels.\n"
            'Take a larger box, or grain="overlap".'
        )
    tiles = layout.num_tiles
    return ImageRegion(image, layout, patches.view(tiles, *layout.patch_grid), tokens.view(tiles, *layout.grid))


def _covered(boxes: Float[Tensor, "cell 4"], box: list[float], grain: Grain) -> Bool[Tensor, " cell"]:
    """Which cells a box covers; those that show only filling have no area and are never covered."""
    left, top, right, bottom = boxes.double().unbind(1)
    if grain == "overlap":
        across = torch.minimum(right, torch.tensor(box[2])) - left.clamp(min=box[0])
        down = torch.minimum(bottom, torch.tensor(box[3])) - top.clamp(min=box[1])
        return (across > ROUNDING) & (down > ROUNDING)
    area = (right > left) & (bottom > top)
    across = (left >= box[0] - ROUNDING) & (right <= box[2] + ROUNDING)
    return area & across & (top >= box[1] - ROUNDING) & (bottom <= box[3] + ROUNDING)
