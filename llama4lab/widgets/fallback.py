"""What a saved notebook shows of a widget where no kernel runs: a picture, without any script."""

import base64
import io
from html import escape
from typing import Any

import ipywidgets
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

DPI = 110


class WithFallback(ipywidgets.DOMWidget):
    """A widget that also gives itself as a picture; list it first among the base classes.

    A live notebook shows the widget. The picture is what remains in a saved one, on a page made of it, and on GitHub.
    """

    def draw(self) -> Axes:
        """The static twin, in a figure of its own."""
        raise NotImplementedError

    @property
    def caption(self) -> str:
        """What the picture shows, as plain text."""
        return ""

    def _repr_mimebundle_(self, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        bundle = super()._repr_mimebundle_(**options)  # pyright: ignore[reportAttributeAccessIssue]
        data, metadata = bundle if isinstance(bundle, tuple) else (bundle or {}, {})
        picture = base64.b64encode(png(self.draw())).decode()
        alt = escape(self.caption, quote=True)
        image = f'<img alt="{alt}" style="max-width:100%" src="data:image/png;base64,{picture}">'
        return {**data, "text/html": f"{image}<div>{escape(self.caption)}</div>", "image/png": picture}, metadata


def png(ax: Axes) -> bytes:
    """The figure of some axes as PNG. The figure is closed, so that the notebook does not show it once more."""
    figure = ax.figure
    assert isinstance(figure, Figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, bbox_inches="tight", facecolor="white")
    plt.close(figure)
    return buffer.getvalue()
