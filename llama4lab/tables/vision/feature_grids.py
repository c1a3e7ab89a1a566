"""What a hook point holds at every place of the pictures: a vector for each image patch or image token."""

# pandas declares what it gives as wide unions.
# pyright: reportArgumentType=false, reportReturnType=false

from dataclasses import dataclass, field
from math import isqrt

import pandas as pd
import torch
from einops import rearrange, reduce
from jaxtyping import Bool, Float
from torch import Tensor

from llama4lab.run.run import Run
from llama4lab.tables.vision.places import patch_places, token_places

GRAINS = {"tile patch": "patch", "tile image_token": "token", "batch seq": "token"}


@dataclass(repr=False)
class Features:
    """The vectors of a hook point, laid out as in the pictures.

    Attributes:
        at: the hook point.
        values: tiles of all images one after the other; rows and columns of image patches or image tokens.
        table: a line for each [tile, row, column], in that order, as `patch_places` or `token_places` gives it.
        class_token: the vectors of the class token, which belongs to a tile and to no place in it; None where the hook
            point has none.
    """

    at: str
    values: Float[Tensor, "tile row column feature"]
    table: pd.DataFrame
    class_token: Float[Tensor, "tile feature"] | None = field(default=None)

    @property
    def grain(self) -> str:
        """What a place is: "patch" or "token"."""
        return "patch" if "patch" in self.table else "token"

    @property
    def rows(self) -> Float[Tensor, "place feature"]:
        """A vector for each line of the table."""
        return self.values.flatten(0, 2)

    @property
    def shows_picture(self) -> Bool[Tensor, " place"]:
        """False for places that show only the filling beside a picture."""
        table = self.table
        shown = (table["right"] > table["left"]) & (table["bottom"] > table["top"])
        return torch.from_numpy(shown.to_numpy(dtype=bool, copy=True)).to(self.values.device)

    def by_token(self) -> "Features":
        """Gives one vector for each image token: the mean of the image patches that flow into it."""
        if self.grain == "token":
            return self
        group = int(self.table["tile_row"].max() + 1) // int(self.table["token_row"].max() + 1)
        pattern = "tile (row i) (column j) feature -> tile row column feature"
        values = reduce(self.values, pattern, "mean", i=group, j=group)
        corners = self.table.groupby(["image", "tile", "token_row", "token_column"], sort=False)
        table = corners[["row", "is_global", "position", "left", "top"]].first()
        table[["right", "bottom"]] = corners[["right", "bottom"]].last()
        table = table.reset_index().rename(columns={"token_row": "tile_row", "token_column": "tile_column"})
        names = [name for name in self.table if name not in ("patch", "token_row", "token_column")]
        return Features(self.at, values, table[names], self.class_token)

    def __repr__(self) -> str:
        tiles, rows, columns, width = self.values.shape
        images = self.table["image"].nunique()
        return (
            f"Features of {self.at}: {images} image{'s' * (images > 1)}, {tiles} tiles of {rows} x {columns} "
            f"{'patches' if self.grain == 'patch' else 'image tokens'}, {width} wide"
        )


def features(run: Run, at: str) -> Features:
    """Gives the vectors of a hook point at every place of the pictures.

    Of a run that was cut to some rows, only their images count.

    Args:
        run: a run that recorded the hook point.
        at: a hook point of the vision tower, `image_features`, or one of the text model with an axis of positions, of
            which the image tokens are taken. Heads are put one after the other.

    Raises:
        KeyError: if it was not recorded.
        ValueError: if the hook point has no vector for each place, the run no image, or image tokens were cut off.
    """
    tensor, words = run[at].detach(), run.shapes[at].split()
    grain = GRAINS.get(" ".join(words[:2]))
    if grain is None or len(words) < 3 or not tensor.is_floating_point():
        raise ValueError(
            f"{at} has the shape [{', '.join(words)}]: that is no vector for each place of a picture.\n"
            "Take a hook point of patches, image tokens or positions, such as vision_model.layers.0.resid_post."
        )
    numbers = _images_of(run)
    places = (patch_places if grain == "patch" else token_places)(run.prompt, numbers)
    if words[0] == "batch":
        grid = run.prompt.images[numbers[0]].grid
        vectors = _at_image_tokens(run, tensor, places).flatten(1)
        pattern = "(tile row column) feature -> tile row column feature"
        return Features(at, rearrange(vectors, pattern, row=grid[0], column=grid[1]), places)
    tensor = torch.cat([tensor[run.prompt.images[number].tiles] for number in numbers]).flatten(2)
    side = isqrt(tensor.shape[1])
    # The class token comes last in its tile, and no tile has as many patches as a square and one more.
    vectors, own = tensor[:, : side**2], tensor[:, side**2 :]
    values = rearrange(vectors, "tile (row column) feature -> tile row column feature", row=side)
    return Features(at, values, places, own[:, 0] if own.shape[1] else None)


def _images_of(run: Run) -> list[int]:
    """Numbers of the images in the rows of a run."""
    numbers = [number for number, layout in enumerate(run.prompt.images) if layout.row in run.rows]
    if not numbers:
        raise ValueError(
            f"Features of images were asked for, but rows {', '.join(map(str, run.rows))} of the prompt have none.\n"
            "Put images into the prompt, or do not cut the rows that have them."
        )
    return numbers


def _at_image_tokens(run: Run, tensor: Tensor, places: pd.DataFrame) -> Tensor:
    """The vectors of a text hook point at the image tokens."""
    missing = places.loc[~places["position"].isin(run.positions), :]
    if len(missing):
        raise ValueError(
            f"{len(missing)} of {len(places)} image tokens are not in the run, the first at position "
            f"{missing['position'].iloc[0]}: it was cut, or recorded at other positions.\n"
            "Take the features of the whole run."
        )
    row = [run.rows.index(row) for row in places["row"]]
    index = {position: index for index, position in enumerate(run.positions)}
    return tensor[row, [index[position] for position in places["position"]]]
