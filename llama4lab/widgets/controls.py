"""Controls that are linked to a trait: what the mouse can choose, code can set, and the other way."""

from collections.abc import Iterable, Sequence
from typing import Any

import ipywidgets
import traitlets

STYLE = {"description_width": "initial"}
ROW = {"flex_flow": "row wrap", "align_items": "center"}


def dropdown(view: traitlets.HasTraits, name: str, options: Sequence, width: str = "auto") -> ipywidgets.Widget:
    """A list to choose from; its CSS class is `l4-` and the name of the trait, as for all controls."""
    return _linked(view, name, ipywidgets.Dropdown, options, {"width": width, "margin": "2px 14px 2px 2px"})


def slider(view: traitlets.HasTraits, name: str, options: Sequence) -> ipywidgets.Widget:
    """A slider over a few ordered values."""
    return _linked(view, name, ipywidgets.SelectionSlider, options, {"width": "300px", "margin": "2px 14px 2px 2px"})


def buttons(view: traitlets.HasTraits, name: str, options: Sequence) -> ipywidgets.Widget:
    """Buttons of which one is down."""
    own = ipywidgets.ToggleButtons(options=options, value=getattr(view, name), style={"button_width": "auto"})
    traitlets.link((view, name), (own, "value"))
    return own.add_class(f"l4-{name}")


def bar(controls: Iterable[ipywidgets.Widget]) -> ipywidgets.Widget:
    """Controls in a line that wraps."""
    return ipywidgets.HBox(list(controls), layout=ROW)


def one_of(name: str, value: Any, allowed: Iterable) -> Any:
    """Gives the value if it can be chosen.

    Raises:
        TraitError: if it cannot.
    """
    known = list(allowed)
    if value in known:
        return value
    shown = ", ".join(map(str, known)) if len(known) <= 8 else f"{known[0]} to {known[-1]}"
    raise traitlets.TraitError(f"{name}={value!r} was asked for; there is {shown}.")


def _linked(
    view: traitlets.HasTraits, name: str, kind: type, options: Sequence, layout: dict[str, str]
) -> ipywidgets.Widget:
    label = name.replace("_", " ")
    own = kind(options=options, value=getattr(view, name), description=label, style=STYLE, layout=layout)
    traitlets.link((view, name), (own, "value"))
    return own.add_class(f"l4-{name}")
