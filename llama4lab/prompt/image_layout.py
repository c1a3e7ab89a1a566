"""Where an image stands in a prompt: its tiles, and the part of the picture behind every image token."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from llama4lab.prompt.tiling import Tiling


@dataclass(eq=False)
class ImageLayout:
    """One image of a prompt. *Image tokens* are its `<|patch|>` tokens, in the order of the prompt.

    Attributes:
        row: the row of the batch that the image is in.
        size: height and width of the image in pixels.
        aspect_ratio: rows and columns of tiles, the global tile not counted.
        tiles: which of the prompt's `pixel_values` are the image's.
        grid: rows and columns of image tokens in a tile.
        positions: the position in the row of every image token.
        places: tile (0 is the first of this image), row and column in the tile of every image token.
        boxes: left, top, right and bottom of what every image token shows, in pixels of the image. Resizing and black
            filling are undone; a token that shows only filling has a box without area.
        original: the image, for drawing.
    """

    row: int
    size: tuple[int, int]
    aspect_ratio: tuple[int, int]
    tiles: slice
    grid: tuple[int, int]
    positions: Int[Tensor, " token"]
    places: Int[Tensor, "token 3"]
    boxes: Float[Tensor, "token 4"]
    original: Image.Image | None = None

    @classmethod
    def of(
        cls, tiling: Tiling, grid: int, row: int, first_tile: int, positions: list[int], original: Image.Image | None
    ) -> "ImageLayout":
        """Lays out an image whose image tokens stand at `positions` of a row."""
        return cls(
            row=row,
            size=tiling.size,
            aspect_ratio=(tiling.rows, tiling.cols),
            tiles=slice(first_tile, first_tile + tiling.num_tiles),
            grid=(grid, grid),
            positions=torch.tensor(positions, dtype=torch.long),
            places=tiling.places(grid),
            boxes=tiling.boxes(grid),
            original=original,
        )

    @property
    def num_tiles(self) -> int:
        """Tiles of the image, the global one included."""
        return self.tiles.stop - self.tiles.start

    @property
    def global_tile(self) -> int:
        """The tile that shows the whole image: the last one (an image of one tile has only that)."""
        return self.num_tiles - 1

    def shifted(self, row: int, first_tile: int) -> "ImageLayout":
        """Gives the same layout for another row and another place in `pixel_values`."""
        return replace(self, row=row, tiles=slice(first_tile, first_tile + self.num_tiles))

    def __repr__(self) -> str:
        height, width = self.size
        return (
            f"ImageLayout(row {self.row}, {height} x {width} pixels, {self.aspect_ratio[0]} x {self.aspect_ratio[1]} "
            f"tiles, {len(self.positions)} image tokens)"
        )
