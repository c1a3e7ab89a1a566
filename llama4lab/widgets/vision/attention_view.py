"""Attention onto a picture to point at: of a token of the text, and of an image patch."""

from typing import Any

import ipywidgets
import numpy as np
import pandas as pd
import traitlets
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb

from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.run.run import Run
from llama4lab.tables import vision as tables
from llama4lab.viz import style, vision
from llama4lab.viz.vision.overlays import on_picture
from llama4lab.widgets.bars import Bars
from llama4lab.widgets.controls import buttons, dropdown, one_of, slider
from llama4lab.widgets.levels import Levels
from llama4lab.widgets.map_view import lines_of
from llama4lab.widgets.token_text import visible
from llama4lab.widgets.tokens import Tokens
from llama4lab.widgets.vision.cell_colors import CellColors
from llama4lab.widgets.vision.picture_view import PictureView, run_of

TEXT, PATCH = "text token", "image patch"
AT = ["layers.*.self_attn.[qk]_rot", "vision_model.layers.*.self_attn.[qk]_rot"]
MEAN = -1  # of all heads
KINDS = {"text": "#dddddd", "special": "#bbbbbb", "image": "#9cc3de"}


class ImageAttention(PictureView):
    """What a token of the text looks at in a picture; or, in the vision tower, what an image patch looks at.

    Click a token of the text, or, when patches look, a patch of the picture. The bars are the shares of the heads that
    lie on the picture; a click on one picks the head.

    Attributes:
        looking: "text token" or "image patch".
        position: The token of the text that looks.
        layer: The layer of the text model.
        head: Its query head; -1 is the mean of all.
        vision_layer: The layer of the vision tower.
        vision_head: Its head; -1 is the mean of all.
        image: Number of the image.
        tiles: "parts" or "global".
        selection: The selected place, as of `Patches`: the patch that looks.
        cells: The picture, a `PictureCells`.
        text: The text, a `Tokens`.
        bars: The heads, `Bars`.
    """

    looking = traitlets.Enum([TEXT, PATCH], TEXT)
    position = traitlets.Int()
    layer = traitlets.Int()
    head = traitlets.Int(MEAN)
    vision_layer = traitlets.Int()
    vision_head = traitlets.Int(MEAN)
    HINT = "Click a token of the text; or let image patches look, and click one of the picture."

    def __init__(self, model: HookedPreTrainedModel, prompt: Any) -> None:
        """Makes the view, with the last token looking.

        Args:
            model: The model.
            prompt: A prompt with images, which is run once; or a run of it with
                `at=["layers.*.self_attn.[qk]_rot", "vision_model.layers.*.self_attn.[qk]_rot"]`, or with patterns.

        Raises:
            ValueError: if there is no image, or attention was not recorded in a layer of both.
        """
        run = run_of(model, prompt, AT)
        self._layers, self._vision_layers = _recorded(run, "layers."), _recorded(run, "vision_model.layers.")
        if not self._layers or not self._vision_layers:
            raise ValueError(f"Attention was to be shown, but it was not recorded in both models.\nRecord at={AT}.")
        self._last: tuple[tuple[Any, ...], pd.DataFrame] = ((), pd.DataFrame())
        text, tower = model.text.config, model.config.vision_config
        self._heads = text.num_attention_heads
        self._vision_heads = tower.num_attention_heads  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
        super().__init__(run, position=run.positions[-1], layer=self._layers[-1], vision_layer=self._vision_layers[-1])
        self.text, self.bars = Tokens(["?"], _plain(["text"])), Bars()
        self._write()
        self._layer_controls = self._pickers("layer", self._layers, "head", self._heads)
        self._vision_controls = self._pickers("vision_layer", self._vision_layers, "vision_head", self._vision_heads)
        choices = ["looking", "position", "layer", "head", "vision_layer", "vision_head"]
        controls = [buttons(self, "looking", [TEXT, PATCH]), *self._layer_controls, *self._vision_controls]
        self.begin(choices, controls, [self.bars])
        self.children = [self.children[0], self.text, *self.children[1:]]
        self.observe(lambda _: self._write(), "image")
        self.text.observe(lambda _: self._token_clicked(), "selected")
        self.bars.observe(lambda _: self._bar_clicked(), "selected")

    @property
    def table(self) -> pd.DataFrame:
        """What is drawn: a line for each cell; `weight` of the head, or the mean of all."""
        own = _of_head(self._whole(), self._picked()[1])
        if self.looking == PATCH and self.selection:
            # A patch sees its own tile; those of the others are there to be clicked.
            seen = dict(zip(zip(own["tile"], own["patch"], strict=True), own["weight"], strict=True))
            own = lines_of(self._patches, image=self.selection["image"])
            places = zip(own["tile"], own["patch"], strict=True)
            own = own.assign(weight=[seen.get(place, np.nan) for place in places])
        return self.shown(own)

    def draw(self) -> Axes:
        """The static twin: `viz.vision.attention` or `vision_attention` of all heads of the layer."""
        if self.looking == TEXT:
            whole = lines_of(self._whole(), image=self.image)
            return vision.attention(whole, self.picture, global_tile=self._global)
        if not self.selection:
            return on_picture(self.table, self.picture, None, self._global)[0]
        return vision.vision_attention(self._whole(), self.picture)

    @property
    def caption(self) -> str:
        """What is shown, in a line."""
        if self.looking == TEXT:
            return f"attention of position {self.position} {visible(self._token(self.position))}, {self._where}"
        patch = self.selection.get("patch", "none yet")
        return f"attention of patch {patch}, {self._where}"

    @property
    def _where(self) -> str:
        (layer, head), kind = self._picked(), "layer" if self.looking == TEXT else "vision layer"
        return f"{kind} {layer}, {'mean of all heads' if head == MEAN else f'head {head}'}"

    def paint(self) -> None:
        """Colours the cells by the attention of what looks."""
        table = self.table
        before, _, after = self.caption.partition(", ")
        marked = [self.cell_of(self.selection)] if self.looking == PATCH else []
        self.cells.show(
            table,
            CellColors.of_numbers(table, "weight", f"{before}\n{after}", alpha=0.8),
            self.labels(table),
            marked=[cell for cell in marked if cell is not None],
        )
        self.text.layout.display = None if self.looking == TEXT else "none"
        for controls, kind in ((self._layer_controls, TEXT), (self._vision_controls, PATCH)):
            for control in controls:
                control.layout.display = None if self.looking == kind else "none"  # pyright: ignore

    def describe(self) -> None:
        """Shows how much of each head lies on the picture."""
        whole = self._whole()
        self.bars.layout.display = None if len(whole) and "head" in whole else "none"
        if "head" not in whole:
            return
        own = lines_of(whole, image=self.image)
        names = [str(head) for head in np.unique(own["head"])]
        heights = own["weight"].to_numpy(dtype=float).reshape(len(names), -1).sum(axis=1)[None]
        color = np.array([to_rgb(style.BLUE)] * len(names))
        before, self._quietly = self._quietly, True
        self.bars.show(heights, names, color, "share of each head on the picture", titles=("head", "share"))
        head = self._picked()[1]
        self.bars.selected = None if head == MEAN else head
        self._quietly = before

    def _picked(self) -> tuple[int, int]:
        """Layer and head of what looks."""
        return (self.layer, self.head) if self.looking == TEXT else (self.vision_layer, self.vision_head)

    def _whole(self) -> pd.DataFrame:
        """The table of all heads; the places alone where no patch is selected."""
        key = (self.looking, self.image, self.position, self._picked()[0], *self.selection.values())
        if self._last[0] != key:
            self._last = key, self._table()
        return self._last[1]

    def _table(self) -> pd.DataFrame:
        row = self.run.prompt.images[self.image].row
        if self.looking == TEXT:
            return tables.attention(self.run, self.position, layers=self.layer, row=row)
        if not self.selection:
            return lines_of(self._patches, image=self.image).assign(weight=np.nan)
        place = {name: self.selection[name] for name in ("image", "tile")}
        return tables.vision_attention(self.run, self.vision_layer, self.selection["patch"], **place)

    def _pickers(self, layer: str, layers: list[int], head: str, heads: int) -> list[ipywidgets.Widget]:
        options = [("mean", MEAN), *((str(number), number) for number in range(heads))]
        return [slider(self, layer, layers), dropdown(self, head, options)]

    def _write(self) -> None:
        """Shows the text of the row that the image is in."""
        row = self.run.prompt.images[self.image].row
        kinds = self.run.prompt.modality[row]
        self._positions = [position for position in self.run.positions if kinds[position] != "pad"]
        tokens = [self._token(position) for position in self._positions]
        levels = _plain([kinds[position] for position in self._positions])
        before, self._quietly = self._quietly, True
        self.text.write(tokens, levels, positions=self._positions)
        if self.position not in self._positions:
            self.position = self._positions[-1]
        self.text.selected = self._positions.index(self.position)
        self._quietly = before

    def _token(self, position: int) -> str:
        return self.run.prompt.tokens[self.run.prompt.images[self.image].row][position]

    def _token_clicked(self) -> None:
        if not self._quietly and self.text.selected is not None:
            self.position = self._positions[self.text.selected]

    def _bar_clicked(self) -> None:
        if not self._quietly:
            picked = MEAN if self.bars.selected is None else self.bars.selected
            self.set_trait("head" if self.looking == TEXT else "vision_head", picked)

    @traitlets.observe("position")
    def _moved(self, _: Any) -> None:
        if hasattr(self, "text") and self.position in self._positions:
            self.text.selected = self._positions.index(self.position)

    @traitlets.validate("position")
    def _is_position(self, proposal: Any) -> int:
        return one_of("position", proposal["value"], self.run.positions)

    @traitlets.validate("layer", "vision_layer")
    def _is_layer(self, proposal: Any) -> int:
        name = proposal["trait"].name
        return one_of(name, proposal["value"], self._layers if name == "layer" else self._vision_layers)

    @traitlets.validate("head", "vision_head")
    def _is_head(self, proposal: Any) -> int:
        name = proposal["trait"].name
        return one_of(name, proposal["value"], range(MEAN, self._heads if name == "head" else self._vision_heads))


def _of_head(whole: pd.DataFrame, head: int) -> pd.DataFrame:
    """The lines of a head, or one line for each place with the mean of all heads."""
    if "head" not in whole:
        return whole
    if head != MEAN:
        return lines_of(whole, head=head)
    first = lines_of(whole, head=whole["head"].iloc[0])
    return first.assign(head=MEAN, weight=whole["weight"].to_numpy(dtype=float).reshape(-1, len(first)).mean(axis=0))


def _plain(kinds: list[str]) -> Levels:
    """Colours by the kind of each token."""
    classes = np.array([[list(KINDS).index(kind) for kind in kinds]])
    return Levels.of_classes(classes, list(KINDS), np.array([to_rgb(color) for color in KINDS.values()]), title="token")


def _recorded(run: Run, start: str) -> list[int]:
    """The layers whose attention was recorded."""
    parts = {
        (int(name[len(start) :].split(".")[0]), name.rsplit(".", 1)[-1]) for name in run.names if name.startswith(start)
    }
    layers = {layer for layer, _ in parts}
    return sorted(each for each in layers if (each, "pattern") in parts or {(each, "q_rot"), (each, "k_rot")} <= parts)
