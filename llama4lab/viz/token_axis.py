"""Token strings along an axis, whatever they hold: spaces, line ends, control tokens, scripts that the font lacks."""

from collections.abc import Sequence
from itertools import groupby
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.font_manager import FontProperties, findfont, get_font

MARKS = {" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍"}
LONGEST = 12
FOLD_FROM = 3
ROOM = 8.0  # points along the axis that one label needs


def token_label(token: str, longest: int = LONGEST) -> str:
    r"""Gives a token as a label of one line that any plot can draw.

    A leading space is a middle dot, a line end an arrow; a character that cannot be printed, or that the font lacks,
    is written as its code (`\u4e2d`). A long token ends in an ellipsis.

    Args:
        token: The token's text.
        longest: The most characters of the label.
    """
    fonts = [get_font(findfont(FontProperties(family=[family]))) for family in FontProperties().get_family()]
    label = ""
    for index, character in enumerate(token):
        shown = MARKS.get(character, character)
        if not shown.isprintable() or not any(font.get_char_index(ord(shown)) for font in fonts):
            shown = character.encode("unicode_escape").decode()
        if len(label) + len(shown) > longest - (index < len(token) - 1):
            label += "…"
            break
        label += shown
    # A pair of dollars would be read as a formula.
    return label.replace("$", r"\$")


def label_tokens(
    ax: Axes, tokens: Sequence[str], positions: Sequence[int], points: float, axis: Literal["x", "y"] = "x"
) -> None:
    """Writes tokens beside the cells of a map.

    Runs of one token are written once with their number. Where cells are too narrow for every label, as many as fit are
    written, each after its position.

    Args:
        ax: Axes whose cell i is at coordinate i.
        tokens: Token of each cell.
        positions: Position of each cell in the prompt.
        points: Width of a cell along the axis, in points.
        axis: "x" or "y".
    """
    ticks, labels, spaced = [], [], -ROOM
    for first, count in _runs(tokens):
        tick = first + (count - 1) / 2
        if (tick * points) - spaced < ROOM * 0.999:
            continue
        label = token_label(tokens[first]) + (f" × {count}" if count > 1 else "")
        if points < ROOM:
            label = f"{positions[first]} {label}"
        ticks.append(tick)
        labels.append(label)
        spaced = tick * points
    size = min(9.0, max(5.5, 0.8 * points)) if points >= ROOM else 6.5
    if axis == "x":
        ax.set_xticks(ticks, labels, rotation=90, fontsize=size)
    else:
        ax.set_yticks(ticks, labels, fontsize=size)
    ax.tick_params(axis=axis, length=2)


def _runs(tokens: Sequence[str]) -> list[tuple[int, int]]:
    """First cell and length of every run of equal tokens; short runs are left as single cells."""
    runs, first = [], 0
    for _, same in groupby(tokens):
        count = len(list(same))
        runs += [(first, count)] if count >= FOLD_FROM else [(first + i, 1) for i in range(count)]
        first += count
    return runs
