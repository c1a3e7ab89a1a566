"""Where every image token and every image patch lies: in the prompt, in its tile, and in the picture."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from llama4lab.prompt.image_layout import ImageLayout
from llama4lab.prompt.prompt import Prompt
from llama4lab.run.run import Run

PLACE = ("row", "image", "tile", "is_global", "tile_row", "tile_column")
BOX = ("left", "top", "right", "bottom")
CANVAS = tuple(f"canvas_{side}" for side in BOX)


def token_places(prompt: Prompt, images: Sequence[int] | None = None) -> pd.DataFrame:
    """Gives one line for each image token, in the order of the prompt.

    Columns:
        row: row of the prompt.
        image: number of the image, counted over the whole prompt as in `prompt.images`.
        tile: tile of the image, from 0.
        is_global: whether the tile shows the whole image rather than a part of it. An image of one tile has only that.
        tile_row, tile_column: row and column of the token in its tile.
        position: position of the token in the prompt.
        left, top, right, bottom: the box of the picture that the token shows, in pixels of the original; a box without
            area shows only the filling beside the picture.

    Args:
        prompt: the prompt.
        images: numbers of the images to take; all by default.

    Raises:
        ValueError: if the prompt has no image, or not one of that number.
    """
    parts = []
    for number in chosen_images(prompt, images):
        layout = prompt.images[number]
        place = _place(number, layout, layout.places.cpu().numpy())
        place["position"] = layout.positions.cpu().numpy()
        parts.append(place | dict(zip(BOX, layout.boxes.cpu().numpy().T, strict=True)))
    return _together(parts)


def patch_places(prompt: Prompt, images: Sequence[int] | None = None) -> pd.DataFrame:
    """Gives one line for each image patch: image by image, tile by tile, row by row.

    Columns:
        row, image, tile, is_global: as in `token_places`.
        tile_row, tile_column: row and column of the patch in its tile.
        patch: number of the patch in its tile, row by row; its place on the patch axis of the vision tower.
        token_row, token_column: row and column in the tile of the image token that the patch flows into.
        position: position of that image token in the prompt.
        left, top, right, bottom: the box of the picture that the patch shows, as in `token_places`.

    Args:
        prompt: the prompt.
        images: numbers of the images to take; all by default.

    Raises:
        ValueError: if the prompt has no image, or not one of that number.
    """
    parts = []
    for number in chosen_images(prompt, images):
        layout = prompt.images[number]
        boxes = dict(zip(BOX, layout.patch_boxes.cpu().numpy().T, strict=True))
        parts.append(_patches(number, layout) | boxes)
    return _together(parts)


def layout(prompt: Prompt | Run) -> pd.DataFrame:
    """Gives the road of a pixel, one line for each image patch: picture, canvas, tile, patch, shuffle group, prompt.

    Columns:
        row, image, tile, is_global, tile_row, tile_column, patch: the place of the patch, as in `patch_places`.
        token_row, token_column: its shuffle group, which becomes the image token at `position`.
        position: position of the image token in the prompt.
        canvas_left, canvas_top, canvas_right, canvas_bottom: where the patch lies on the canvas, the picture resized
            and filled up with black to whole tiles, in pixels of the canvas. NaN in a global tile beside others, which
            is the whole picture squeezed to one tile and not cut from the canvas.
        left, top, right, bottom: the box of the picture that the patch shows, in pixels of the original.

    Args:
        prompt: a prompt with images, or a run of one; all images of the prompt count, also where the run is cut.

    Raises:
        ValueError: if the prompt has no image.
    """
    prompt = prompt.prompt if isinstance(prompt, Run) else prompt
    return _together([_road(number, prompt.images[number]) for number in chosen_images(prompt, None)])


def at_pixel(prompt: Prompt | Run, x: float | int, y: float | int, image: int = 0) -> pd.DataFrame:
    """Gives the lines of `layout` that show a pixel: one patch of the tiles, and one of the global tile beside them.

    Resizing smears pixels over borders; a pixel counts to the patch that has its centre.

    Args:
        prompt: a prompt with images, or a run of one.
        x: column of the pixel from the left, from 0; the part behind the point is dropped.
        y: row of the pixel from the top.
        image: number of the image.

    Raises:
        ValueError: if the prompt has no such image, or the image no such pixel.
    """
    prompt = prompt.prompt if isinstance(prompt, Run) else prompt
    (number,) = chosen_images(prompt, [image])
    height, width = prompt.images[number].size
    if not (0 <= x < width and 0 <= y < height):
        raise ValueError(
            f"The pixel at x={x}, y={y} of image {image} was asked for.\nThe image is {width} pixels wide and {height} "
            "high; both count from 0 at the top left."
        )
    x, y = int(x) + 0.5, int(y) + 0.5
    table = pd.DataFrame(_road(number, prompt.images[number]))
    inside = (table["left"] <= x) & (x < table["right"]) & (table["top"] <= y) & (y < table["bottom"])
    return table.loc[inside, :].reset_index(drop=True)


def chosen_images(prompt: Prompt, images: Sequence[int] | None) -> list[int]:
    """Gives the numbers of the images asked for; all by default.

    Raises:
        ValueError: if there is none, or not one of that number.
    """
    count = len(prompt.images)
    if not count:
        raise ValueError("Image tokens were asked for, but the prompt has no image.\nPut images into the prompt.")
    wanted = list(range(count)) if images is None else [int(number) for number in images]
    wrong = [number for number in wanted if not -count <= number < count]
    if wrong or not wanted:
        raise ValueError(
            f"Image {wrong[0] if wrong else 'none'} was asked for, but the prompt has {count}: 0 to {count - 1}."
        )
    return [number % count for number in wanted]


def _place(number: int, layout: ImageLayout, places: np.ndarray) -> dict[str, np.ndarray]:
    """The columns of PLACE, from tile, row and column of shape [place, 3]."""
    tile, tile_row, tile_column = places.T
    row, image = np.full(len(tile), layout.row), np.full(len(tile), number)
    return dict(zip(PLACE, (row, image, tile, tile == layout.global_tile, tile_row, tile_column), strict=True))


def _patches(number: int, layout: ImageLayout) -> dict[str, np.ndarray]:
    """PLACE and the image token of every patch of an image."""
    places, token = layout.patch_places.cpu().numpy(), layout.patch_tokens.cpu()
    group = layout.patch_grid[0] // layout.grid[0]
    return _place(number, layout, places) | {
        "patch": places[:, 1] * layout.patch_grid[1] + places[:, 2],
        "token_row": places[:, 1] // group,
        "token_column": places[:, 2] // group,
        "position": layout.positions.cpu()[token].numpy(),
    }


def _road(number: int, layout: ImageLayout) -> dict[str, np.ndarray]:
    """The columns of `layout` for one image."""
    canvas, boxes = layout.tiling.canvas_boxes(layout.patch_grid[0]), layout.patch_boxes
    return _patches(number, layout) | dict(zip(CANVAS + BOX, [*canvas.numpy().T, *boxes.numpy().T], strict=True))


def _together(parts: list[dict[str, np.ndarray]]) -> pd.DataFrame:
    return pd.concat([pd.DataFrame(part) for part in parts], ignore_index=True)
