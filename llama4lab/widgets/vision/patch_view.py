"""A picture to point at: what the model has at each patch, layer by layer."""

from typing import Any

import ipywidgets
import numpy as np
import pandas as pd
import traitlets
from matplotlib.axes import Axes

from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.run.run import Run
from llama4lab.tables import vision as tables
from llama4lab.viz import vision
from llama4lab.viz.vision.overlays import on_picture
from llama4lab.widgets.controls import buttons, dropdown, one_of
from llama4lab.widgets.map_view import lines_of
from llama4lab.widgets.token_text import visible
from llama4lab.widgets.vision.cell_colors import CellColors
from llama4lab.widgets.vision.picture_view import PLACE, PictureView, run_of
from llama4lab.widgets.vision.place_words import place_html

INPUT, RESIDUAL, ROUTER = "image_features", "resid_post", "feed_forward.router.indices"
AT = ["vision_model.layers.*.resid_post", INPUT, "layers.*.resid_post", "layers.*.feed_forward.router.*"]
DRAWN = ("norm", "cosine", "pca", "experts", "lens")
WORDS = 4  # of the lens, for each place and layer
TITLES = {
    "norm": "length of the vector",
    "cosine": "cosine to the selected place",
    "pca": "principal components",
    "experts": "expert",
    "lens": "probability of the best word",
}


class Patches(PictureView):
    """A picture with its patches: hover or click one to see its place, its words, its experts and what is like it.

    Attributes:
        drawn: What the colours are: "norm" (orange frames: far longer than the others), "cosine" to the selected
            place, "pca", "experts" or "lens", the most probable word of each image token.
        layer: Where the vectors are from: "vision 3", "input" (of the text model) or "layer 5". Of experts and words
            only some are there; another choice of `drawn` moves to the nearest one.
        image: Number of the image.
        tiles: "parts" or "global".
        selection: The selected place, for example `{"image": 0, "tile": 1, "patch": 9, "position": 12}`.
        cells: The picture, a `PictureCells`.
    """

    drawn = traitlets.Enum(DRAWN, "norm")
    layer = traitlets.Unicode()
    HINT = "Click a place to see its words and experts in every layer; cosine then shows what is like it."

    def __init__(self, model: HookedPreTrainedModel, prompt: Any) -> None:
        """Makes the view.

        Args:
            model: The model.
            prompt: A prompt with images, which is run once; or a run of it, of which what was recorded is shown.

        Raises:
            ValueError: if there is no image, or nothing was recorded that can be drawn.
        """
        self.model = model
        run = run_of(model, prompt, _existing(model))
        self._hooks = _places_of(run)
        if not self._hooks:
            raise ValueError(f"The run has nothing to draw over a picture.\nRecord at={AT}.")
        self._made: dict[tuple[str, ...], pd.DataFrame] = {}
        super().__init__(run, layer=next(iter(self._hooks)))
        self._routes = tables.experts(run) if self._options("experts") else pd.DataFrame()
        self._below = ipywidgets.HTML().add_class("l4-cell")
        kinds = [kind for kind in DRAWN if self._options(kind)]
        self._picker = dropdown(self, "layer", list(self._hooks))
        self.observe(lambda _: self._other_kind(), "drawn")
        self.begin(["layer"], [buttons(self, "drawn", kinds), self._picker], [self._below])

    @property
    def table(self) -> pd.DataFrame:
        """What is drawn: a line for each cell, as `tables.vision` gives it."""
        return self.shown(self._whole())

    def draw(self) -> Axes:
        """The static twin: `viz.vision.norms`, `similarity`, `pca`, `experts` or `lens`."""
        own, shows = self.table, dict[str, Any](global_tile=self._global)
        if self.drawn == "cosine" and "chosen" not in own:
            return on_picture(own, self.picture, None, self._global)[0]
        if self.drawn == "experts":
            return vision.experts(own, self.picture, **shows)
        plots = {"norm": vision.norms, "cosine": vision.similarity, "pca": vision.pca, "lens": vision.lens}
        ax = plots[self.drawn](own, self.picture, **shows)
        ax.set_title(self.caption, fontsize="medium")
        return ax

    @property
    def caption(self) -> str:
        """What is shown, in a line."""
        return f"{TITLES[self.drawn]}, {self.layer}"

    def paint(self) -> None:
        """Colours the cells for what is chosen now."""
        table, title = self.table, self.caption.replace(", ", "\n")
        texts: list[str] = []
        notes: list[str] = []
        marked: list[int] = []
        if self.drawn == "pca":
            colors = CellColors.of_components(table, title)
        elif self.drawn == "experts":
            colors = CellColors.of_experts(table["expert"].to_numpy(), table.attrs["num_experts"], title)
            texts = [str(expert) for expert in table["expert"]]
            notes = [f"gate: {gate:.3g}" for gate in table["gate"]]
        else:
            value = "prob" if self.drawn == "lens" else self.drawn
            colors = CellColors.of_numbers(table, value, title)
        if self.drawn == "lens":
            texts = [visible(str(token).strip() or str(token), 14) for token in table["token"]]
        if self.drawn == "norm":
            marked = np.flatnonzero(table["outlier"]).tolist()
        self.cells.show(table, colors, self.labels(table), notes=notes, texts=texts, marked=marked)

    def describe(self) -> None:
        """Shows the words and experts of the selected place in all layers."""
        if not self.selection:
            self._below.value = ""
            return
        image, tile, patch, position = (self.selection[name] for name in PLACE)
        row = self.run.prompt.images[image].row
        lens = pd.DataFrame()
        if self._options("lens"):
            at = {"rows": self.run.rows.index(row), "positions": self.run.positions.index(position)}
            key = ("place", str(row), str(position))
            if key not in self._made:
                self._made[key] = tables.lens(self.run.cut(**at), self.model, k=WORDS)
            lens = self._made[key]
        experts = lines_of(self._routes, row=row, position=position) if len(self._routes) else self._routes
        where = f"image {image}, tile {tile}, patch {patch}, position {position}"
        self._below.value = place_html(where, lens, experts)

    def _whole(self) -> pd.DataFrame:
        """The table of all images for what is chosen now."""
        key = (self.drawn, self.layer, str(sorted(self.selection.items())) if self.drawn == "cosine" else "")
        if key not in self._made:
            self._made[key] = self._table()
        return self._made[key]

    def _table(self) -> pd.DataFrame:
        hook_point = self._hooks[self.layer]
        number = -1 if hook_point == INPUT else int(self.layer.split()[-1])
        if self.drawn == "experts":
            return lines_of(self._routes, layer=number, slot=0)
        if self.drawn == "lens":
            return tables.lens(self.run, self.model, layers=number, k=1)
        features = tables.features(self.run, hook_point)
        if self.drawn != "cosine":
            return (tables.norms if self.drawn == "norm" else tables.pca)(features)
        if not self.selection:
            return features.table.assign(cosine=np.nan)
        names = ("image", "tile", "patch" if features.grain == "patch" else "position")
        line = lines_of(features.table, **{name: self.selection[name] for name in names}).iloc[0]
        place = {"tile": int(line["tile"]), "row": int(line["tile_row"]), "column": int(line["tile_column"])}
        return tables.similarity(features, **place, image=int(line["image"]))

    def _options(self, drawn: str) -> list[str]:
        """The layers that have something of a kind."""
        if drawn == "lens":
            return [name for name, at in self._hooks.items() if not at.startswith("vision_model.")]
        if drawn == "experts":
            return [
                name
                for name, at in self._hooks.items()
                if at.replace(RESIDUAL, ROUTER) in self.run and at != INPUT and at.startswith("layers.")
            ]
        return list(self._hooks)

    def _other_kind(self) -> None:
        """Moves to a layer that has what is to be drawn."""
        options = self._options(self.drawn)
        order = list(self._hooks)
        place = order.index(self.layer)
        nearest = min(options, key=lambda name: (abs(order.index(name) - place), order.index(name)))
        before, self._quietly = self._quietly, True
        with self._picker.hold_trait_notifications():
            self._picker.options, self._picker.value = options, nearest  # pyright: ignore[reportAttributeAccessIssue]
        self._quietly = before
        if self.layer == nearest:
            self.refresh()
        self.layer = nearest

    @traitlets.validate("layer")
    def _is_layer(self, proposal: Any) -> str:
        return one_of("layer", proposal["value"], self._options(self.drawn) if self.layer else self._hooks)


def _existing(model: HookedPreTrainedModel) -> list[str]:
    """Of what is drawn, what the model has: one without experts has no router."""
    known = list(model.hook_points())
    return [name for name in known if _wanted(name)]


def _wanted(name: str) -> bool:
    parts = name.split(".")
    if name == INPUT or (parts[0] == "layers" and ".router." in name):
        return True
    return parts[-1] == RESIDUAL and (parts[0] == "layers" or name.startswith("vision_model.layers."))


def _places_of(run: Run) -> dict[str, str]:
    """The hook points with a vector for each place, by a short name, in the order of the road."""
    found = {INPUT: "input"}
    for name in run.names:
        parts = name.split(".")
        if parts[-1] == RESIDUAL and "layers" in parts:
            kind = "vision" if parts[0] == "vision_model" else "layer"
            found[name] = f"{kind} {parts[parts.index('layers') + 1]}"
    order = {"vision": 0, "input": 1, "layer": 2}
    named = [(short.split(), name) for name, short in found.items() if name in run]
    named.sort(key=lambda each: (order[each[0][0]], int(each[0][1]) if len(each[0]) > 1 else 0))
    return {" ".join(short): name for short, name in named}
