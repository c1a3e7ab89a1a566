"""What a model expects next in several runs, side by side, as HTML. Every token is escaped."""

from html import escape

import numpy as np
import pandas as pd

from llama4lab.widgets.token_text import visible

CELL = "padding:1px 10px;text-align:left;white-space:nowrap"


def top_tokens_html(table: pd.DataFrame) -> str:
    """Gives one column for each run, one line for each rank; the bars behind the tokens are their probabilities.

    Args:
        table: As `Sweep.top_tokens` gives it.
    """
    runs = list(dict.fromkeys(table["run"]))
    keys, entries = zip(table["run"], table["rank"], strict=True), zip(table["token"], table["prob"], strict=True)
    found = dict(zip(keys, entries, strict=True))
    head = "".join(f'<th style="{CELL}">{escape(run)}</th>' for run in runs)
    lines = ""
    for rank in np.unique(table["rank"]).tolist():
        cells = "".join(_cell(*found[run, rank]) if (run, rank) in found else "<td></td>" for run in runs)
        lines += f"<tr>{cells}</tr>"
    return f'<table style="border-collapse:separate;border-spacing:6px 2px"><tr>{head}</tr>{lines}</table>'


def _cell(text: str, prob: float) -> str:
    share = 100 * prob
    bar = f"background:linear-gradient(to right,#4a90c855 {share:.1f}%,#8881 {share:.1f}%)"
    token = escape(visible(text))
    number = f'<span style="float:right;margin-left:16px;font-variant-numeric:tabular-nums">{_shown(prob)}</span>'
    return f'<td style="{CELL};{bar}"><code style="background:none">{token}</code>{number}</td>'


def _shown(prob: float) -> str:
    return f"{prob:.3f}" if prob >= 0.0005 else "&lt; 0.001"
