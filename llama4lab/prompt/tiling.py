"""How an image is laid out in square tiles, and which part of the image each token of a tile shows.

Llama 4 places an image on a canvas of `rows x cols` tiles without distorting it, fills the rest with black, and cuts
the canvas into tiles. Where there is more than one tile, the whole image squeezed into one further tile follows: the
*global* tile.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@lru_cache(maxsize=32)
def canvases(tile: int, max_tiles: int) -> Int[Tensor, "canvas 2"]:
    """Gives the height and width in pixels of every canvas of at most `max_tiles` tiles."""
    shapes = [(rows, cols) for rows in range(1, max_tiles + 1) for cols in range(1, max_tiles // rows + 1)]
    return torch.tensor(shapes) * tile


def best_canvas(size: tuple[int, int], choices: Int[Tensor, "canvas 2"], to_max_canvas: bool) -> Int[Tensor, " 2"]:
    """Gives the canvas that shrinks the image least; among those that hold it as it is, the tightest one.

    Args:
        size: height and width of the image in pixels.
        choices: the canvases to choose from.
        to_max_canvas: prefer the canvas that enlarges the image most.
    """
    # Scales are float32 on purpose: equal scales are found by `==`, and transformers compares them in float32.
    scales = (choices / torch.tensor(size)).min(dim=1).values
    enlarging = scales[scales >= 1]
    scale = enlarging.min() if len(enlarging) and not to_max_canvas else scales.max()
    tied = choices[scales == scale]
    return tied[tied.prod(dim=1).argmin()]


def fitted_size(size: tuple[int, int], bound: tuple[int | Tensor, int | Tensor]) -> tuple[int, int]:
    """Gives the largest height and width inside `bound` with the proportions of `size`, at least one pixel each.

    A side of `bound` that is a tensor is divided in float32, an `int` in float64. transformers mixes the two in the
    same way, and the rounding decides about a pixel: 100 x 200 on its largest canvas is one pixel off in float64.
    """
    height, width = size
    scale_h, scale_w = bound[0] / height, bound[1] / width
    if scale_w < scale_h:
        fitted = min(math.floor(height * scale_w), int(bound[0])), int(bound[1])
    else:
        fitted = int(bound[0]), min(math.floor(width * scale_h), int(bound[1]))
    return max(fitted[0], 1), max(fitted[1], 1)


@dataclass(frozen=True)
class Tiling:
    """Where an image lies on its canvas.

    Attributes:
        size: height and width of the image in pixels.
        tile: height and width of a tile in pixels.
        rows: rows of tiles on the canvas.
        cols: columns of tiles on the canvas.
        resized: height and width that the image takes on the canvas, from its top left corner.
    """

    size: tuple[int, int]
    tile: int
    rows: int
    cols: int
    resized: tuple[int, int]

    @classmethod
    def of(
        cls, size: tuple[int, int], tile: int, max_tiles: int, to_max_canvas: bool = False, as_meta: bool = False
    ) -> "Tiling":
        """Lays out an image of `size` pixels on at most `max_tiles` tiles of `tile` pixels.

        With `as_meta` the size on the canvas is worked out in float64, as in Meta's code; for one image in a few
        thousand that is a pixel more or less than in transformers.
        """
        canvas = best_canvas(size, canvases(tile, max_tiles), to_max_canvas)
        height, width = canvas.tolist() if as_meta else canvas
        bound: tuple[int | Tensor, int | Tensor] = (height, width)
        if not to_max_canvas:
            # `min` gives the int wherever the canvas is no limit; see `fitted_size` for why that matters.
            bound = min(max(size[0], tile), height), min(max(size[1], tile), width)
        return cls(size, tile, int(height) // tile, int(width) // tile, fitted_size(size, bound))

    @property
    def canvas(self) -> tuple[int, int]:
        """Height and width of the canvas in pixels."""
        return self.rows * self.tile, self.cols * self.tile

    @property
    def has_global_tile(self) -> bool:
        """True if the whole image follows as one further tile."""
        return self.rows * self.cols > 1

    @property
    def num_tiles(self) -> int:
        """Tiles that the vision tower sees, the global one included."""
        return self.rows * self.cols + self.has_global_tile

    def places(self, grid: int) -> Int[Tensor, "token 3"]:
        """Gives tile, row and column (inside the tile) of every token, in the order of the prompt.

        Args:
            grid: tokens along one side of a tile.
        """
        return torch.cartesian_prod(torch.arange(self.num_tiles), torch.arange(grid), torch.arange(grid))

    def canvas_boxes(self, grid: int) -> Float[Tensor, "token 4"]:
        """Gives left, top, right and bottom of every token on the canvas, in pixels of the canvas.

        NaN in a global tile beside others, which is not cut from the canvas. One tile alone is the whole canvas.

        Args:
            grid: tokens along one side of a tile.
        """
        tile, row, col = self.places(grid).to(torch.float64).unbind(dim=1)
        top = torch.div(tile, self.cols, rounding_mode="floor") * grid + row
        left = tile % self.cols * grid + col
        # Whole numbers times one step: neighbours have the same edge to the bit.
        boxes = torch.stack([left, top, left + 1, top + 1], dim=1) * (self.tile / grid)
        return torch.where(self._is_global(grid)[:, None], torch.nan, boxes).float()

    def boxes(self, grid: int) -> Float[Tensor, "token 4"]:
        """Gives left, top, right and bottom of the part of the image that every token shows.

        Coordinates are pixels of the image before it was resized. A token that shows nothing but the black filling has
        a box without area on the border of the image.

        Args:
            grid: tokens along one side of a tile.
        """
        _, row, col = self.places(grid).to(torch.float64).unbind(dim=1)
        squeezed = torch.stack([col, row, col + 1, row + 1], dim=1) * (self.tile / grid)
        is_global = self._is_global(grid)[:, None]
        # The global tile is the image squeezed to a square; the others are windows of the canvas.
        seen = torch.where(is_global, squeezed, self.canvas_boxes(grid).double())
        height, width = self.resized
        on_canvas = torch.where(is_global, self.tile, torch.tensor([width, height, width, height]))
        full = torch.tensor([self.size[1], self.size[0], self.size[1], self.size[0]])
        return (seen / on_canvas * full).minimum(full).float()

    def _is_global(self, grid: int) -> Bool[Tensor, " token"]:
        """True for the tokens of a global tile beside others."""
        return self.places(grid)[:, 0] == self.rows * self.cols
