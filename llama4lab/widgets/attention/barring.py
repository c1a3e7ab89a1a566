"""Switches for layers that are to see no earlier chunk."""

from collections.abc import Sequence
from typing import Any

import ipywidgets
import traitlets

from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.widgets.controls import ROW


def far_layers(model: HookedPreTrainedModel) -> list[int]:
    """The layers that see past chunks, and so can be barred; none in a model without chunks."""
    sizes = model.text.chunk_sizes
    return [layer for layer, size in enumerate(sizes) if size is None] if any(sizes) else []


def switches(view: traitlets.HasTraits, name: str, layers: Sequence[int], label: str) -> ipywidgets.Widget:
    """One button for each layer; those that are down are the value of a trait, a tuple."""
    buttons = [ipywidgets.ToggleButton(description=str(layer), layout={"width": "auto"}) for layer in layers]
    for layer, button in zip(layers, buttons, strict=True):
        button.value = layer in getattr(view, name)

    def pressed(_: Any) -> None:
        setattr(view, name, tuple(layer for layer, button in zip(layers, buttons, strict=True) if button.value))

    def shown(_: Any) -> None:
        chosen = getattr(view, name)
        for layer, button in zip(layers, buttons, strict=True):
            if button.value != (layer in chosen):
                button.unobserve(pressed, "value")
                button.value = layer in chosen
                button.observe(pressed, "value")

    for button in buttons:
        button.observe(pressed, "value")
    view.observe(shown, name)
    children = [ipywidgets.Label(label), *buttons]
    return ipywidgets.HBox(children, layout={**ROW, "margin": "2px 14px 2px 2px"}).add_class(f"l4-{name}")


def checked_layers(proposed: Sequence[int], layers: Sequence[int]) -> tuple[int, ...]:
    """Layers in order, each once.

    Raises:
        TraitError: if one of them cannot be barred.
    """
    wrong = [layer for layer in proposed if layer not in layers]
    if wrong:
        known = ", ".join(map(str, layers)) or "none"
        raise traitlets.TraitError(f"Layer {wrong[0]} was to be barred; layers that see past chunks: {known}.")
    return tuple(sorted(set(proposed)))
