"""What the text model makes of an image token in each layer, as HTML."""

from html import escape

import pandas as pd

from llama4lab.viz.expert_colors import expert_color
from llama4lab.widgets.token_text import visible

CELL = "padding:1px 12px 1px 0;text-align:left;white-space:nowrap"


def place_html(heading: str, lens: pd.DataFrame, experts: pd.DataFrame) -> str:
    """Gives a table: for each layer the best words of the lens, and the experts. Every text in it is escaped.

    Args:
        heading: Which place it is.
        lens: Lines of `tables.vision.lens` of one image token; may be empty.
        experts: Lines of `tables.vision.experts` of it; may be empty.
    """
    layers = sorted({*(lens["layer"] if len(lens) else ()), *(experts["layer"] if len(experts) else ())})
    head = "".join(f'<th style="{CELL}">{name}</th>' for name in ("layer", "words of the lens", "expert (gate)"))
    lines = "".join(_line(layer, lens, experts) for layer in layers)
    table = f'<div style="max-height:260px;overflow:auto"><table><tr>{head}</tr>{lines}</table></div>' if layers else ""
    return f"<b>{escape(heading)}</b>{table}"


def _line(layer: int, lens: pd.DataFrame, experts: pd.DataFrame) -> str:
    words = [
        f'<code style="background:none">{escape(visible(str(line["token"])))}</code> {line["prob"]:.2f}'
        for line in (lens.loc[lens["layer"] == layer, :].to_dict("records") if len(lens) else ())
    ]
    chosen = [
        f"{_swatch(int(line['expert']))} {line['expert']} ({line['gate']:.2f})"
        for line in (experts.loc[experts["layer"] == layer, :].to_dict("records") if len(experts) else ())
    ]
    name = "input" if layer == -1 else str(layer)
    cells = (name, " &nbsp; ".join(words), " ".join(chosen))
    return "<tr>" + "".join(f'<td style="{CELL}">{cell}</td>' for cell in cells) + "</tr>"


def _swatch(expert: int) -> str:
    red, green, blue = (round(255 * part) for part in expert_color(expert))
    return f'<span style="display:inline-block;width:10px;height:10px;background:rgb({red},{green},{blue})"></span>'
