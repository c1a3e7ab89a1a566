"""What a model still finds, as curves: bar layers and see what they were needed for."""

from collections.abc import Sequence
from contextlib import ExitStack
from html import escape
from typing import Any

import ipywidgets
import numpy as np
import pandas as pd
import traitlets
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb

from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.run.attention.editing import edited
from llama4lab.run.attention.needles import Make, owners
from llama4lab.tables.attention.probes import NONE
from llama4lab.tables.attention.probes import needle as needle_of
from llama4lab.viz import attention
from llama4lab.viz.attention.probes import INKS, VALUES
from llama4lab.widgets.attention.barring import checked_layers, far_layers, switches
from llama4lab.widgets.attention.curves import Curves
from llama4lab.widgets.controls import bar, buttons, dropdown, one_of
from llama4lab.widgets.fallback import WithFallback

KEYS = {"accuracy": "right answers", "log_prob": "log probability"}
HINT = "Bar layers from earlier chunks to see what they were needed for; each choice adds a line."


class Needle(WithFallback, ipywidgets.VBox):
    """Accuracy by distance: a line for the model as it is, and one for each choice of barred layers so far.

    The same texts are asked under every choice. A new choice runs the model, once for each distance and border.

    Attributes:
        barred: Layers that see no earlier chunk, a tuple.
        border: Where the needle stands in its chunk; None for texts that begin at position 0.
        value: "accuracy" or "log_prob".
        curves: The lines, `Curves`.
    """

    barred = traitlets.Tuple()
    border = traitlets.Int(None, allow_none=True)
    value = traitlets.Enum(list(VALUES), "accuracy")

    def __init__(
        self,
        model: HookedPreTrainedModel,
        *,
        distances: int | Sequence[int],
        borders: Sequence[int | None] = (-1, 0, 1),
        make: Make | None = None,
        n: int = 16,
    ) -> None:
        """Makes the view and asks the model as it is. The arguments are those of `tables.attention.needle`.

        Args:
            model: The model.
            distances: From the needle to the last token of the question, in tokens.
            borders: Where the needle stands in its chunk.
            make: Gives a prompt and its answer for a distance.
            n: How many texts for each distance.
        """
        self.model, self.borders = model, list(borders)
        self._far = far_layers(model)
        texts = _SameTexts(owners(model) if make is None else make)
        self._ask = {"distances": distances, "borders": borders, "make": texts, "n": n}
        self._texts, self._tables = texts, {}
        self._tables[()] = self._asked(())
        super().__init__(border=self.borders[0])
        self.curves = Curves((KEYS["accuracy"], "tokens between fact and answer"), twin=self.draw)
        self._state = ipywidgets.HTML().add_class("l4-hint")
        controls = [switches(self, "barred", self._far, "barred layers")] if self._far else []
        if len(self.borders) > 1:
            controls.append(dropdown(self, "border", [(border_name(border), border) for border in self.borders]))
        controls.append(buttons(self, "value", [(name, value) for value, name in KEYS.items()]))
        self.children = [bar(controls), self.curves, self._state]
        self._draw()
        self.observe(lambda _: self._rebarred(), "barred")
        self.observe(lambda _: self._draw(), ["border", "value"])
        self.curves.observe(lambda _: self._clicked(), "selected")

    @property
    def table(self) -> pd.DataFrame:
        """`tables.attention.needle` of all choices so far, at all borders."""
        return pd.concat(self._tables.values(), ignore_index=True)

    @property
    def ax(self) -> Axes:
        """The lines as a matplotlib figure."""
        return self.draw()

    def draw(self) -> Axes:
        """The static twin: `viz.attention.needle` of the border's lines of `table`."""
        return attention.needle(self._own(), value=self.value)

    @property
    def caption(self) -> str:
        """What is shown, in a line."""
        return f"{VALUES[self.value]} by distance; {border_name(self.border)}; {len(self._tables)} choices of layers"

    def _own(self) -> pd.DataFrame:
        table = self.table
        at = table["border"].isna() if self.border is None else table["border"].fillna(-(10**9)) == self.border
        return table.loc[at.to_numpy(dtype=bool), :].reset_index(drop=True)

    def _asked(self, barred: tuple[int, ...]) -> pd.DataFrame:
        """The lines of one choice of layers."""
        self._texts.rewind()
        with ExitStack() as stack:
            if barred:
                stack.enter_context(edited(self.model, layers=list(barred), bar="earlier"))
            table = needle_of(self.model, ablate=[], **self._ask)
        return table.assign(ablated=group_name(barred))

    def _rebarred(self) -> None:
        """Asks again with other layers barred, unless that was asked before."""
        if self.barred not in self._tables:
            self._state.value = "asking the model …"
            try:
                self._tables[self.barred] = self._asked(self.barred)
            finally:
                self._state.value = ""
            self._draw()
        self.curves.selected = list(self._tables).index(self.barred)

    def _draw(self) -> None:
        own, groups = self._own(), list(self._tables)
        labels = [group_name(group) for group in groups]
        values = own.pivot(index="ablated", columns="distance", values=self.value).loc[labels]
        notes = own.assign(note=_notes(own)).pivot(index="ablated", columns="distance", values="note").loc[labels]
        points = [(distance, str(distance)) for distance in values.columns]
        names = [f"{label} barred" if label != NONE else "all layers" for label in labels]
        colors = np.array([to_rgb(INKS[place % len(INKS)]) for place in range(len(groups))])
        limits = (0.0, 1.0) if self.value == "accuracy" else None
        self.curves.titles = [KEYS[self.value], self.curves.titles[1]]
        title = f"{VALUES[self.value]}, {own['n'].iloc[0]} texts; {border_name(self.border)}"
        tips = notes.to_numpy().ravel().tolist()
        self.curves.show(values.to_numpy(dtype=float), names, colors, points, title=title, notes=tips, limits=limits)
        self.curves.selected = groups.index(self.barred)
        self._state.value = f'<span style="opacity:.7">{escape(HINT)}</span>' if self._far else ""

    def _clicked(self) -> None:
        """Takes over the layers of a clicked line."""
        if self.curves.selected is not None:
            self.barred = list(self._tables)[self.curves.selected]

    @traitlets.validate("barred")
    def _can_be_barred(self, proposal: Any) -> tuple[int, ...]:
        return checked_layers(proposal["value"], self._far)

    @traitlets.validate("border")
    def _is_border(self, proposal: Any) -> int | None:
        return one_of("border", proposal["value"], self.borders)


class _SameTexts:
    """Gives the texts of an earlier pass again, in their order, also where each is drawn at random."""

    def __init__(self, make: Make) -> None:
        self._make = make
        self._made: dict[int, list[Any]] = {}
        self._next: dict[int, int] = {}

    def rewind(self) -> None:
        """Begins anew with the first text of each distance."""
        self._next = dict.fromkeys(self._made, 0)

    def __call__(self, distance: int) -> Any:
        known, place = self._made.setdefault(distance, []), self._next.get(distance, 0)
        if place == len(known):
            known.append(self._make(distance))
        self._next[distance] = place + 1
        return known[place]


def group_name(barred: Sequence[int]) -> str:
    """Barred layers as `tables.attention.needle` writes them."""
    return ", ".join(map(str, barred)) or NONE


def border_name(border: int | None) -> str:
    """Where the needle stands, in words."""
    if border is None:
        return "text from position 0"
    return f"fact {-border} before a border" if border < 0 else f"fact {border + 1} behind a border"


def _notes(table: pd.DataFrame) -> list[str]:
    """Further lines of the tooltips: both measures, what was guessed, and the borders between."""
    names = {
        "accuracy": "right answers",
        "log_prob": "log probability",
        "guessed": "right without the fact",
        "crossed": "borders between",
    }
    columns = {label: table[name].tolist() for name, label in names.items() if name in table}
    lines = [dict(zip(columns, numbers, strict=True)) for numbers in zip(*columns.values(), strict=True)]
    return ["\n".join(f"{label}: {each:.3g}" for label, each in line.items() if not pd.isna(each)) for line in lines]
