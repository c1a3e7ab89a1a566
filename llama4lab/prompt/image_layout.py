"""Where an image stands in a prompt: its tiles, and the part of the picture behind every image token and patch."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from llama4lab.prompt.tiling import Tiling


@dataclass(eq=False)
class ImageLayout:
    """One image of a prompt. *Image tokens* are its `<|patch|>` tokens, in the order of the prompt.

    An *image patch* is what the vision tower works on. The pixel shuffle makes one image token of each square of
    neighbouring patches (2 x 2 in published checkpoints).

    Attributes:
        row: the row of the batch that the image is in.
        tiling: the size of the image, its canvas, and the place that the resized image takes on it.
        tiles: which of the prompt's `pixel_values` are the image's.
        grid: rows and columns of image tokens in a tile.
        patch_grid: rows and columns of image patches in a tile.
        positions: the position in the row of every image token.
        original: the image, for drawing.
    """

    row: int
    tiling: Tiling
    tiles: slice
    grid: tuple[int, int]
    patch_grid: tuple[int, int]
    positions: Int[Tensor, " token"]
    original: Image.Image | None = None

    @classmethod
    def of(
        cls,
        tiling: Tiling,
        grid: int,
        row: int,
        first_tile: int,
        positions: list[int],
        original: Image.Image | None,
        group: int = 2,
    ) -> "ImageLayout":
        """Lays out an image whose image tokens stand at `positions` of a row.

        `group` counts the patches along one side of an image token; published checkpoints have 2.
        """
        return cls(
            row=row,
            tiling=tiling,
            tiles=slice(first_tile, first_tile + tiling.num_tiles),
            grid=(grid, grid),
            patch_grid=(grid * group, grid * group),
            positions=torch.tensor(positions, dtype=torch.long),
            original=original,
        )

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the image in pixels."""
        return self.tiling.size

    @property
    def aspect_ratio(self) -> tuple[int, int]:
        """Rows and columns of tiles, the global tile not counted."""
        return self.tiling.rows, self.tiling.cols

    @property
    def num_tiles(self) -> int:
        """Tiles of the image, the global one included."""
        return self.tiles.stop - self.tiles.start

    @property
    def global_tile(self) -> int:
        """The tile that shows the whole image: the last one (an image of one tile has only that)."""
        return self.num_tiles - 1

    @property
    def places(self) -> Int[Tensor, "token 3"]:
        """Tile (0 is the first of this image), row and column in the tile of every image token."""
        return self.tiling.places(self.grid[0])

    @property
    def boxes(self) -> Float[Tensor, "token 4"]:
        """Left, top, right and bottom of what every image token shows, in pixels of the image.

        Resizing and black filling are undone; a token that shows only filling has a box without area.
        """
        return self.tiling.boxes(self.grid[0])

    @property
    def patch_places(self) -> Int[Tensor, "patch 3"]:
        """Tile, row and column in the tile of every image patch: tile by tile, row by row."""
        return self.tiling.places(self.patch_grid[0])

    @property
    def patch_boxes(self) -> Float[Tensor, "patch 4"]:
        """What every image patch shows, as `boxes` does for image tokens."""
        return self.tiling.boxes(self.patch_grid[0])

    @property
    def patch_tokens(self) -> Int[Tensor, " patch"]:
        """Which image token of this image every image patch flows into."""
        tile, row, column = self.patch_places.unbind(dim=1)
        group = self.patch_grid[0] // self.grid[0]
        return (tile * self.grid[0] + row // group) * self.grid[1] + column // group

    def shifted(self, row: int, first_tile: int) -> "ImageLayout":
        """Gives the same layout for another row and another place in `pixel_values`."""
        return replace(self, row=row, tiles=slice(first_tile, first_tile + self.num_tiles))

    def __repr__(self) -> str:
        height, width = self.size
        return (
            f"ImageLayout(row {self.row}, {height} x {width} pixels, {self.aspect_ratio[0]} x {self.aspect_ratio[1]} "
            f"tiles, {len(self.positions)} image tokens)"
        )
