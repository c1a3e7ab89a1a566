"""What the views of a picture share: which image and tiles are shown, and which place is selected."""

from typing import Any

import ipywidgets
import numpy as np
import pandas as pd
import traitlets
from matplotlib.axes import Axes
from PIL import Image

from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.run.recording import as_prompt, record
from llama4lab.run.run import Run
from llama4lab.tables.vision.places import patch_places
from llama4lab.widgets.controls import bar, buttons, dropdown, one_of
from llama4lab.widgets.fallback import WithFallback
from llama4lab.widgets.map_view import lines_of
from llama4lab.widgets.vision.picture_cells import PictureCells

PARTS, GLOBAL = "parts", "global"
PLACE = ("image", "tile", "patch", "position")


class PictureView(WithFallback, ipywidgets.VBox):
    """A picture with cells, controls above it and a closer look at the selected place below.

    Attributes:
        image: Number of the image.
        tiles: "parts", the tiles that show parts of the picture, or "global", the one that shows all of it.
        selection: The selected place, for example `{"image": 0, "tile": 1, "patch": 9, "position": 12}`; of an image
            token, its first patch. Empty without one.
        cells: The picture, a `PictureCells`.
    """

    image = traitlets.Int(0)
    tiles = traitlets.Enum([PARTS, GLOBAL], PARTS)
    selection = traitlets.Dict()
    HINT = "Click a place of the picture for a closer look."
    _quietly = False

    def __init__(self, run: Run, **choices: Any) -> None:
        """Takes the run; `begin` puts the parts together.

        Raises:
            ValueError: if the run has no image, or its pictures were not kept.
        """
        self.run, self._patches = run, patch_places(run.prompt)
        own = [number for number, layout in enumerate(run.prompt.images) if layout.row in run.rows]
        if not own or any(run.prompt.images[number].original is None for number in own):
            found = "the run has none" if not own else "its prompt did not keep them, as a saved run does not"
            raise ValueError(f"Pictures were to be shown, but {found}.\nRecord a prompt that was made with pictures.")
        self._images = own
        several = any(run.prompt.images[number].num_tiles > 1 for number in own)
        super().__init__(image=own[0], tiles=PARTS if several else GLOBAL, **choices)
        self._several = several

    def paint(self) -> None:
        """Colours the cells for what is chosen now."""
        raise NotImplementedError

    def describe(self) -> None:
        """Shows more about the selection, or nothing without one."""

    @property
    def picture(self) -> Image.Image:
        """The image itself."""
        original = self.run.prompt.images[self.image].original
        assert original is not None
        return original

    @property
    def ax(self) -> Axes:
        """The picture as a matplotlib figure."""
        return self.draw()

    def begin(self, choices: list[str], controls: list[ipywidgets.Widget], below: list[ipywidgets.Widget]) -> None:
        """Puts the parts together.

        Args:
            choices: The traits that change the colours.
            controls: What is above the picture, besides image and tiles.
            below: What is below it.
        """
        self.cells = PictureCells(twin=self.draw)
        self.cells.put(self.picture)
        own = [dropdown(self, "image", self._images)] if len(self._images) > 1 else []
        own += [buttons(self, "tiles", [PARTS, GLOBAL])] if self._several else []
        hint = ipywidgets.HTML(f'<span style="opacity:.7">{self.HINT}</span>').add_class("l4-hint")
        self.children = [bar([*controls, *own]), self.cells, hint, *below]
        self.refresh()
        self.observe(lambda _: self.refresh(), [*choices, "tiles"])
        self.observe(lambda _: self._other_image(), "image")
        self.observe(lambda _: self._select(), "selection")
        self.cells.observe(lambda _: self._clicked(), "selected")

    def refresh(self) -> None:
        """Draws again; what is selected stays selected where it is in the new picture."""
        before, self._quietly = self._quietly, True
        try:
            # In one message: a page that saw the selection go and come back would take the next key for the first one.
            with self.cells.hold_sync():
                self.paint()
                self.cells.selected = self.cell_of(self.selection)
        finally:
            self._quietly = before
        self.describe()

    def shown(self, table: pd.DataFrame) -> pd.DataFrame:
        """The lines of a table that are drawn: of the image and kind of tile, without filling."""
        is_global = table["is_global"].to_numpy(dtype=bool)
        own = (table["image"].to_numpy() == self.image) & (is_global == self._global)
        own &= (table["right"] > table["left"]).to_numpy() & (table["bottom"] > table["top"]).to_numpy()
        kept = table.loc[own, :].reset_index(drop=True)
        kept.attrs = table.attrs
        self._shown = kept
        return kept

    @property
    def _global(self) -> bool:
        """Whether global tiles are drawn; an image of one tile has only that."""
        return self.tiles == GLOBAL or self.run.prompt.images[self.image].num_tiles == 1

    def cell_of(self, selection: dict[str, Any]) -> int | None:
        """Which cell a place is; None if it is not drawn."""
        if not selection or selection["image"] != self.image:
            return None
        names = ("tile", "patch") if "patch" in self._shown else ("tile", "position")
        own = np.logical_and.reduce([self._shown[name].to_numpy() == selection[name] for name in names])
        return int(np.flatnonzero(own)[0]) if own.any() else None

    def place_of(self, cell: int) -> dict[str, Any]:
        """The place of a cell; of an image token, its first patch."""
        line = self._shown.iloc[cell]
        name = "patch" if "patch" in self._shown else "position"
        own = lines_of(self._patches, image=self.image, tile=line["tile"], **{name: line[name]}).iloc[0]
        return {name: int(own[name]) for name in PLACE}

    def labels(self, table: pd.DataFrame) -> list[str]:
        """What each cell is, in words."""
        names = ["tile", "is_global", "tile_row", "tile_column", "position", *(["patch"] if "patch" in table else [])]
        return [_label(line) for line in table.loc[:, names].to_dict("records")]

    def _other_image(self) -> None:
        self.cells.put(self.picture)
        self.refresh()

    def _clicked(self) -> None:
        if not self._quietly:
            cell = self.cells.selected
            self.selection = {} if cell is None else self.place_of(cell)

    def _select(self) -> None:
        """Shows what was selected, here or from code."""
        if self.selection:
            self.image = self.selection["image"]
        self.refresh()

    @traitlets.validate("image")
    def _is_image(self, proposal: Any) -> int:
        return one_of("image", proposal["value"], self._images)

    @traitlets.validate("selection")
    def _is_place(self, proposal: Any) -> dict[str, Any]:
        wanted = proposal["value"]
        if wanted and (wanted.keys() != set(PLACE) or lines_of(self._patches, **wanted).empty):
            example = {name: int(self._patches[name].iloc[0]) for name in PLACE}
            raise traitlets.TraitError(f"{wanted} is no place of a picture. One is {example}.")
        return wanted


def run_of(model: HookedPreTrainedModel, prompt: Any, at: list[str]) -> Run:
    """Runs a prompt with images; a run of one is taken as it is.

    Raises:
        ValueError: if the prompt has no image.
    """
    if isinstance(prompt, Run):
        return prompt
    prompt = as_prompt(model, prompt)
    if not prompt.images:
        raise ValueError("Pictures were to be shown, but the prompt has no image.\nPut images into the prompt.")
    return record(model, prompt, at=at)


def _label(line: dict[Any, Any]) -> str:
    """The place of a cell: `tile 1, row 2, column 3`, and what it is there."""
    tile = "global tile" if line["is_global"] else f"tile {line['tile']}"
    what = f"patch {line['patch']}, flows into position" if "patch" in line else "image token, position"
    return f"{tile}, row {line['tile_row']}, column {line['tile_column']}\n{what} {line['position']}"
