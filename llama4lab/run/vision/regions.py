"""A part of an image as places of the model: image patches, image tokens, positions; and patches for just these.

A box of the picture is many things inside the model: patches of each tile that shows it (and of the global tile, which
shows the whole picture once more), the image tokens that these flow into, and the positions of those in the prompt.
`ImageRegion` holds all of them, and makes of values for any hook point a patch that replaces them in the region alone:

    asked = lab.image_region(prompt, (4, 4, 20, 20))
    with lab.patched(model, asked.values_from(other_run, at="vision_model.layers.2.resid_post")):
        ...
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool
from torch import Tensor

from llama4lab.model.hook_point import HookPoint
from llama4lab.model.hook_points import HookPoints
from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.prompt.image_layout import ImageLayout
from llama4lab.prompt.prompt import Prompt
from llama4lab.run.run import Run
from llama4lab.run.selection import Selector, selected
from llama4lab.run.vision.place_patches import Patching, Places, filling, putting, taken


@dataclass(frozen=True, eq=False, repr=False)
class ImageRegion:
    """Part of an image of a prompt; `a | b`, `a & b`, `a - b` and `~a` make new ones of the same image.

    `lab.sweep` takes a region of one tile as one cell: `over={"tile": [0], "patch": [[p for _, p in region.patches]]}`.

    Attributes:
        image: The number of the image in the prompt.
        layout: Where that image stands in the prompt.
        patch_mask: For every image patch of the image, whether it belongs to the region.
        token_mask: The same for every image token.
    """

    image: int
    layout: ImageLayout
    patch_mask: Bool[Tensor, "tile patch_row patch_column"]
    token_mask: Bool[Tensor, "tile token_row token_column"]

    @property
    def row(self) -> int:
        """The row of the batch that the image is in."""
        return self.layout.row

    @property
    def patches(self) -> list[tuple[int, int]]:
        """Tile (of the prompt's `pixel_values`) and number in the tile of every image patch."""
        return _pairs(self._places(self.patch_mask))

    @property
    def image_tokens(self) -> list[tuple[int, int]]:
        """Tile (of the prompt's `pixel_values`) and number in the tile of every image token."""
        return _pairs(self._places(self.token_mask))

    @property
    def positions(self) -> list[int]:
        """The position in the row of every image token."""
        return self.layout.positions[self.token_mask.flatten()].tolist()

    def on(self, prompt: Prompt, image: int | None = None) -> "ImageRegion":
        """The same cells of an image of another prompt that has as many tiles in the same layout.

        Args:
            prompt: The other prompt.
            image: Which of its images; the same number by default.

        Raises:
            IndexError: if it has no such image.
            ValueError: if that image lies otherwise on its tiles.
        """
        number = self.image if image is None else image
        layout = layout_of(prompt, number)
        own, other = (_tiles(each) for each in (self.layout, layout))
        if own != other:
            raise ValueError(
                f"The region is of an image of {own[0]} x {own[1]} tiles, image {number} of the other prompt has "
                f"{other[0]} x {other[1]} tiles; {own[2]} against {other[2]} image tokens along a tile.\n"
                "Make a region of that prompt by lab.image_region, and pass it as region=."
            )
        return replace(self, image=number, layout=layout)

    def values_from(
        self, run: Run, at: Selector | None = None, *, region: "ImageRegion | None" = None
    ) -> dict[str, Patching]:
        """Gives what `patched` needs to put into this region what a run has there, or in a region of its own.

        Args:
            run: Of this prompt or another one; what is taken from it was recorded.
            at: Names or globs of hook points; None for all that the run has.
            region: The region of the run's prompt to take values from, with its cells in the same arrangement, so that
                the features of an object can be pasted elsewhere. By default the same cells as here.

        Raises:
            ValueError: if a hook point was not recorded or has no places of images, the regions differ in their cells,
                or the run was cut.
        """
        theirs = self.on(run.prompt) if region is None else region
        patches = {}
        for name in _recorded(run, at):
            shape = run.shapes[name]
            self._check_alike(theirs, name, shape)
            patches[name] = putting(name, self.places_of(name, shape), taken(run, name, theirs.places_of(name, shape)))
        return patches

    def filled(self, model: HookedPreTrainedModel, values: Mapping[str, Tensor | float | int]) -> dict[str, Patching]:
        """Gives what `patched` needs to put given values into this region.

        Args:
            model: The model.
            values: Name or glob of a hook point -> a number, or a tensor that broadcasts to it; such as
                `lab.ablation.zero`, `mean` and `resample` give them.

        Raises:
            ValueError: if a hook point has no places of images, or a value holds NaN.
        """
        points, patches = model.hook_points(), {}
        for pattern, value in values.items():
            for name in selected(points, pattern):
                patches[name] = filling(name, self.places_of(name, points[name]), torch.as_tensor(value))
        return patches

    def places_of(self, name: str, shape: str) -> Places:
        """The index on the first and on the second axis of a hook point of every place of the region.

        Args:
            name: The hook point.
            shape: Its shape in words.

        Raises:
            ValueError: if it has no places of images, or the region is empty.
        """
        words = shape.split()
        by_position = words[:2] == ["batch", "seq"] and name != "embed"
        if not by_position and words[:2] not in (["tile", "patch"], ["tile", "image_token"]):
            why = "images are merged in behind it" if name == "embed" else f"it is {shape}"
            instead = "embed_merged" if name == "embed" else "self_attn.z, or .k and .v,"
            raise ValueError(f"{name!r} has no values of single places of an image: {why}.\nTake {instead} instead.")
        mask = self.patch_mask if words[1] == "patch" else self.token_mask
        if not bool(mask.any()):
            raise ValueError(f"{self!r} has nothing at {name!r}, which counts {words[1]}s.")
        if by_position:
            place = self.layout.positions[mask.flatten()]
            return torch.full_like(place, self.row), place
        return self._places(mask)

    def _places(self, mask: Bool[Tensor, "tile row column"]) -> Places:
        tile, place = mask.flatten(1).nonzero(as_tuple=True)
        return tile + self.layout.tiles.start, place

    def _check_alike(self, other: "ImageRegion", name: str, shape: str) -> None:
        """Sees to it that both regions have the same cells, apart from where they begin in their tiles."""
        by_patch = shape.split()[1] == "patch"
        own, theirs = ((each.patch_mask if by_patch else each.token_mask) for each in (self, other))
        if _arrangement(own) != _arrangement(theirs):
            what = "image patches" if by_patch else "image tokens"
            raise ValueError(
                f"At {name!r} the values of {int(theirs.sum())} {what} were to be put into {int(own.sum())}.\n"
                f"They are arranged as {_shown(theirs)} there and as {_shown(own)} here.\n"
                "Choose boxes that cover as many rows and columns of cells in each tile."
            )

    def _joined(self, other: "ImageRegion", rule: Callable[[Tensor, Tensor], Tensor]) -> "ImageRegion":
        if self.layout is not other.layout:
            raise ValueError(f"{self!r} and {other!r} are not of one image of one prompt, so they cannot be joined.")
        return self._with(rule(self.patch_mask, other.patch_mask), rule(self.token_mask, other.token_mask))

    def _with(self, patch_mask: Tensor, token_mask: Tensor) -> "ImageRegion":
        return replace(self, patch_mask=patch_mask, token_mask=token_mask)

    def __or__(self, other: "ImageRegion") -> "ImageRegion":
        return self._joined(other, torch.logical_or)

    def __and__(self, other: "ImageRegion") -> "ImageRegion":
        return self._joined(other, torch.logical_and)

    def __sub__(self, other: "ImageRegion") -> "ImageRegion":
        return self & ~other

    def __invert__(self) -> "ImageRegion":
        return self._with(~self.patch_mask, ~self.token_mask)

    def __repr__(self) -> str:
        tiles = sorted({tile for tile, _ in self.patches})
        return (
            f"ImageRegion(image {self.image}, row {self.row}: {int(self.patch_mask.sum())} image patches and "
            f"{int(self.token_mask.sum())} image tokens in tiles {', '.join(map(str, tiles)) or 'none'})"
        )


def layout_of(prompt: Prompt, image: int) -> ImageLayout:
    """Gives the layout of an image of a prompt.

    Raises:
        IndexError: if there is no such image.
    """
    if not 0 <= image < len(prompt.images):
        raise IndexError(f"Image {image} was asked for, but the prompt has {len(prompt.images)} images.")
    return prompt.images[image]


def _tiles(layout: ImageLayout) -> tuple[int, int, int, int]:
    return (*layout.aspect_ratio, layout.grid[0], layout.patch_grid[0])


def _recorded(run: Run, at: Selector | None) -> list[str]:
    if at is None:
        return run.names
    try:
        return selected(HookPoints({name: HookPoint(run.shapes[name]) for name in run}), at)
    except ValueError:
        raise ValueError(
            f"Values were to be taken at {at!r}, but the run has {', '.join(run.names[:6]) or 'no hook point'}.\n"
            "Record what is needed: lab.record(model, prompt, at=...)."
        ) from None


def _pairs(places: Places) -> list[tuple[int, int]]:
    return list(zip(places[0].tolist(), places[1].tolist(), strict=True))


def _arrangement(mask: Bool[Tensor, "tile row column"]) -> list[list[list[int]]]:
    """For each tile that has cells, their rows and columns, counted from the first row and column."""
    cells = [tile.nonzero() for tile in mask if bool(tile.any())]
    return [(own - own.min(0).values).tolist() for own in cells]


def _shown(mask: Bool[Tensor, "tile row column"]) -> str:
    """Rows x columns of the cells in each tile."""
    spans = [tile.nonzero().amax(0) - tile.nonzero().amin(0) + 1 for tile in mask if bool(tile.any())]
    return " and ".join(f"{rows} x {columns}" for rows, columns in (span.tolist() for span in spans)) or "nothing"
