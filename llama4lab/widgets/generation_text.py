"""The text of a generation as a widget shows it: its tokens, their colours and notes, and what is said about one."""

from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.colors import Normalize

from llama4lab.tables.generation_growth import GrowingTables
from llama4lab.viz import style
from llama4lab.viz.expert_colors import expert_color, expert_colors
from llama4lab.viz.generation import NAMES, SHARES
from llama4lab.widgets.levels import Levels
from llama4lab.widgets.map_view import lines_of
from llama4lab.widgets.token_text import visible

CHOICE = {"prob": "probability", "surprisal": "surprisal in nats", "rank": "rank"}
CELL = "padding:1px 10px 1px 0;text-align:left"
COLUMNS = ("layer", "", "expert", "gate", "margin", "own chunk", "earlier", "first token", "itself", "distance")
LEAST_TOP = 1e-3


@dataclass
class GenerationText:
    """The lines of the tables of a row, for the tokens that are shown.

    Attributes:
        tables: The tables.
        row: The row.
        positions: Of the tokens that are shown.
        texts: The tokens.
    """

    tables: GrowingTables
    row: int
    positions: list[int]
    texts: list[str]

    def levels(self, show: str, layer: int, slot: int = 0) -> Levels:
        """The colours: of experts, of how tokens were chosen, or of where they looked (the mean over heads)."""
        if show == "expert":
            return self._experts(layer, slot)
        own = self._choices(show) if show in CHOICE else self._looks(show, layer)
        values = np.array([[own.get(position, np.nan) for position in self.positions]], dtype=float)
        top = 1.0 if show in (*SHARES, "prob") else float(np.nanmax(values, initial=LEAST_TOP))
        title = CHOICE[show] if show in CHOICE else f"{NAMES[show]}\nlayer {layer} ({self._kind(layer)})"
        return Levels.of_numbers(values, Normalize(0, top), style.SEQUENTIAL, title=title)

    def notes(self) -> list[str]:
        """Further lines of each token's tooltip."""
        own = lines_of(self.tables.tokens, row=self.row)
        found = dict(zip(own["position"], map(_choice_note, own.to_dict("records")), strict=True))
        return [found.get(position, "prompt") for position in self.positions]

    def described(self, position: int, layer: int) -> str:
        """All that is known about a token, as HTML; the line of one layer is bold."""
        where = f"position {position}, token {visible(self.texts[self.positions.index(position)])}"
        choice = lines_of(self.tables.tokens, row=self.row, position=position)
        said = "part of the prompt" if choice.empty else _choice_line(choice.iloc[0].to_dict())
        experts = lines_of(self.tables.decisions, row=self.row, position=position)
        looked = lines_of(self.tables.attention, row=self.row, position=position)
        if experts.empty and looked.empty:
            return f"<b>{escape(where)}</b>: {escape(said)}<br>It has not been read: the next step would do so."
        lines = "".join(self._line(each, experts, looked, each == layer) for each in self._layers())
        head = "".join(f'<th style="{CELL}">{name}</th>' for name in COLUMNS)
        table = f'<div style="max-height:320px;overflow:auto"><table><tr>{head}</tr>{lines}</table></div>'
        return f"<b>{escape(where)}</b>: {escape(said)}{table}"

    def _experts(self, layer: int, slot: int) -> Levels:
        own = lines_of(self.tables.decisions, row=self.row, layer=layer, slot=slot) if self.tables.at else None
        experts, gates = np.full((1, len(self.positions)), -1), np.zeros((1, len(self.positions)))
        if own is not None and not own.empty:
            own = own.loc[own["position"].isin(self.positions), :]
            place = np.searchsorted(self.positions, own["position"])
            experts[0, place], gates[0, place] = own["expert"], own["gate"]
        names = [str(expert) for expert in range(self.tables.meta["num_experts"])]
        title = f"expert\nlayer {layer}" + ("" if layer in self.tables.meta["moe_layers"] else " is dense")
        return Levels.of_classes(
            experts, names, expert_colors(np.arange(len(names))), title=title, strengths=("gate", gates)
        )

    def _choices(self, show: str) -> dict[int, float]:
        """One number about the choice of each generated token, by position."""
        own = lines_of(self.tables.tokens, row=self.row)
        if own.empty:
            return {}
        own["surprisal"] = -own["log_prob"]
        return dict(zip(own["position"].tolist(), own[show].astype(float).tolist(), strict=True))

    def _looks(self, show: str, layer: int) -> dict[int, float]:
        """One mean over heads of each generated token that was read, by position."""
        own = lines_of(self.tables.attention, row=self.row, layer=layer)
        if own.empty:
            return {}
        means = own.groupby("position", as_index=False).agg(mean=(show, "mean"))
        return dict(zip(means["position"].tolist(), means["mean"].tolist(), strict=True))

    def _layers(self) -> list[int]:
        return list(range(self.tables.meta["num_layers"]))

    def _kind(self, layer: int) -> str:
        return "RoPE" if layer in self.tables.meta["rope_layers"] else "NoPE"

    def _line(self, layer: int, experts: pd.DataFrame, looked: pd.DataFrame, now: bool) -> str:
        own = experts.loc[experts["layer"] == layer, :] if not experts.empty else experts
        cells = [str(layer), self._kind(layer)]
        if own.empty:
            cells += ["", "", ""]
        else:
            cells += [" ".join(map(_swatch, own["expert"])), " ".join(f"{gate:.2f}" for gate in own["gate"])]
            cells += [f"{own['margin'].iloc[0]:.2f}"]
        if looked.empty:
            cells += [""] * 5
        else:
            mean = looked.loc[looked["layer"] == layer, ["own_chunk", "earlier", "first_token", "itself", "distance"]]
            *shares, distance = mean.mean().tolist()
            cells += [*(f"{share:.2f}" for share in shares), f"{distance:.1f}"]
        weight = ";font-weight:bold" if now else ""
        return "<tr>" + "".join(f'<td style="{CELL}{weight}">{cell}</td>' for cell in cells) + "</tr>"


def _swatch(expert: int) -> str:
    red, green, blue = (round(255 * part) for part in expert_color(int(expert)))
    box = f'<span style="display:inline-block;width:10px;height:10px;background:rgb({red},{green},{blue})"></span>'
    return f"{box} {expert}"


def _choice_note(line: dict[Any, Any]) -> str:
    other = "" if line["rank"] == 0 else f"\nbest: {visible(line['best'])} ({line['best_prob']:.3g})"
    return f"step {line['step']}: probability {line['prob']:.3g}, rank {line['rank']}{other}"


def _choice_line(line: dict[Any, Any]) -> str:
    return _choice_note(line).replace("\n", "; ") + f"; entropy {line['entropy']:.3g} nats"
