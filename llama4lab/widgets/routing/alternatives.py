"""What would have happened if a token had gone to another expert, to point at."""

from collections.abc import Callable
from html import escape
from typing import Any

import ipywidgets
import numpy as np
import pandas as pd
import traitlets
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from torch import Tensor

from llama4lab.run.patching import patched
from llama4lab.run.recording import record
from llama4lab.run.run import Run
from llama4lab.tables import logits
from llama4lab.tables.routing.choices import ROUTER
from llama4lab.tables.routing.counterfactuals import counterfactual as counterfactual_of
from llama4lab.tables.routing.counterfactuals import regret as regret_of
from llama4lab.viz import routing, style
from llama4lab.viz.expert_colors import expert_colors
from llama4lab.widgets.bars import Bars, Details
from llama4lab.widgets.controls import buttons, one_of
from llama4lab.widgets.levels import Levels
from llama4lab.widgets.map_view import Picture, lines_of
from llama4lab.widgets.routing.choices import CHOSEN, choice_picture, chosen
from llama4lab.widgets.routing.places import SLOT, PlaceView
from llama4lab.widgets.token_text import visible
from llama4lab.widgets.top_tokens import top_tokens_html

SHOWN = 6  # next tokens
BEST = "★"
GATES = [("own gate", "own"), ("original gate", "original")]


class Counterfactual(PlaceView):
    """What each other expert would have done with a token; a click on an expert shows the next tokens with it.

    Attributes:
        row: Row of the prompt.
        layer: Layer of the router.
        position: Position of the token.
        gate: How strongly the other expert is fed: "own", as its own logit says, or "original", as the chosen one is.
        regrets: Whether the map shows, for every token, how much better the best expert would be. This runs the model
            once for each layer, token and expert.
        expert: The expert whose next tokens are shown beside those of the chosen one; None for no other.
        selection: Row, layer and position.
        grid: The map, a `Grid`.
        bars: The effects of the experts, `Bars`.
    """

    gate = traitlets.Enum(["own", "original"], "own")
    regrets = traitlets.Bool(False)
    expert = traitlets.Int(None, allow_none=True)
    HINT = "Click a token in the map, then an expert among the bars."

    def compose(self) -> None:
        """Makes what is above and below the map."""
        self.bars = Bars()
        self._tokens = ipywidgets.HTML().add_class("l4-cell")
        switch = ipywidgets.ToggleButton(description="regret of all tokens", layout={"width": "auto"})
        traitlets.link((self, "regrets"), (switch, "value"))
        controls = [buttons(self, "gate", GATES), switch.add_class("l4-regrets")]
        self.start(controls, [self.bars, self._tokens], ["gate", "regrets"])
        self.bars.observe(lambda change: self.set_trait("expert", change["new"]), "selected")
        self.observe(lambda _: self._show_tokens(), "expert")

    @property
    def table(self) -> pd.DataFrame:
        """The lines of `tables.routing.counterfactual` of the picked token."""
        key = (self.row, self.layer, self.position, self.gate)
        if key not in self._tables:
            self._tables[key] = lines_of(self._alternatives(self.layer, self.position), row=self.row)
        return self._tables[key]

    @property
    def regret(self) -> pd.DataFrame:
        """`tables.routing.regret` of every token."""
        key = ("regret", self.gate)
        if key not in self._tables:
            self._tables[key] = regret_of(self._alternatives(None, None))
        return self._tables[key]

    def draw(self) -> Axes:
        """The static twin: `viz.routing.counterfactual` of `table`."""
        return routing.counterfactual(self.table)

    @property
    def caption(self) -> str:
        """What is shown, in a line."""
        return f"{self._metric} with each expert; layer {self.layer}, position {self.position}, {self.gate} gate"

    def picture(self) -> Picture:
        """The map of what the model chose, or of the regret."""
        if not self.regrets:
            return super().picture()
        own = chosen(self._whole, self.row, SLOT)
        plain = choice_picture(own)
        table = self.regret
        cells = lines_of(table, row=self.row).pivot(index="layer", columns="position", values=["regret", "best"])
        values, best = cells["regret"].to_numpy(dtype=float), cells["best"].to_numpy(dtype=float)
        highest = float(np.nanmax(table["regret"])) or 1.0
        title = f"regret: how much better the best expert would be\n{self._metric}, {self.gate} gate"
        levels = Levels.of_numbers(np.abs(values), Normalize(0, highest), style.SEQUENTIAL, title=title)
        experts = own.pivot(index="layer", columns="position", values="expert").to_numpy(dtype=float)
        notes = [
            [f"chosen: {now:.0f}\nbest: {then:.0f}" for now, then in zip(*line, strict=True)]
            for line in zip(experts.tolist(), best.tolist(), strict=True)
        ]
        return Picture(levels, plain.rows, plain.columns, plain.titles, None, notes)

    def describe(self) -> None:
        """Shows the effect of each expert on the picked token."""
        table = self.table
        count = table.attrs["num_experts"]
        effects, tips = np.full((1, count), np.nan), [""] * count
        marks = [""] * count
        for line in table.to_dict("records"):
            expert = int(line["expert"])
            effects[0, expert] = line["effect"]
            tips[expert] = f"{self._metric} {line['value']:.4g}\ngate {line['gate']:.3g}"
        if table.attrs.get("lower_is_better") is not None:
            best = regret_of(table).iloc[0]
            marks[int(best["best"])] = BEST
        marks[int(table.loc[table["chosen"], "expert"].iloc[0])] = CHOSEN
        token = visible(self._token)
        place = f"layer {self.layer}, position {self.position}, token {token}"
        title = f"{place}: change of the {self._metric} with each expert"
        details: Details = {
            "titles": ("expert", f"change of the {self._metric}"),
            "marks": marks,
            "mark_names": {CHOSEN: "chosen", BEST: "best"},
            "notes": tips,
        }
        names, colors = [str(expert) for expert in range(count)], expert_colors(np.arange(count))
        self.bars.show(effects, names, colors, title, **details)
        if self.expert not in [None, *table["expert"]]:
            self.expert = None
        self._show_tokens()

    @property
    def _metric(self) -> str:
        return str(self.table.attrs["metric"])

    def _alternatives(self, layer: int | None, position: int | None) -> pd.DataFrame:
        gate: Any = self.gate
        return counterfactual_of(
            self.model, self.run.prompt, layer=layer, position=position, metric=self.metric, gate=gate
        )

    def _show_tokens(self) -> None:
        """Shows the next tokens with another expert beside those of the model as it is."""
        if self.bars.selected != self.expert:
            self.bars.selected = self.expert
        self._tokens.value = "" if self.expert is None else self._next_tokens(self.expert)

    def _next_tokens(self, expert: int) -> str:
        """Tables of the next tokens after the picked token and at the end, as HTML."""
        other = self._rerouted(expert)
        parts = []
        for name, position in (("after this token", self.position), ("at the end", self.run.positions[-1])):
            tables = [
                logits.top_tokens(run, SHOWN, position).assign(run=label)
                for run, label in ((self.run, "as it is"), (other, f"expert {expert}"))
            ]
            found = lines_of(pd.concat(tables), row=self.row)
            parts.append(f"<div><b>{escape(name)}</b>{top_tokens_html(found)}</div>")
        return f'<div style="display:flex;flex-wrap:wrap;gap:8px 28px">{"".join(parts)}</div>'

    def _rerouted(self, expert: int) -> Run:
        """The run in which the picked token goes to another expert."""
        line = lines_of(self.table, expert=expert)
        place = (self.run.rows.index(self.row), self.run.positions.index(self.position), SLOT)
        changes = {"indices": expert, "gates": float(line["gate"].iloc[0])}

        def at_place(value: float | int) -> Callable[[Tensor], Tensor]:
            def change(old: Tensor) -> Tensor:
                new = old.clone()
                new[place] = value
                return new

            return change

        names = {f"layers.{self.layer}.{ROUTER}{name}": at_place(value) for name, value in changes.items()}
        with patched(self.model, names):
            return record(self.model, self.run.prompt, at=[])

    @traitlets.validate("expert")
    def _is_expert(self, proposal: Any) -> int | None:
        wanted = proposal["value"]
        if wanted is None:
            return None
        return one_of("expert", wanted, self.table["expert"].tolist())
