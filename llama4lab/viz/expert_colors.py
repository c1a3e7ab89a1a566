"""One fixed colour for every expert, whatever the model: expert 3 has the same colour in all plots.

The first eight are chosen by hand, from hues that colour-blind readers tell apart. Every further one is the colour
farthest from all before it, in a space where distances are as large as they look, for readers with and without colour
blindness; so colours differ in lightness as well as in hue. A hundred colours cannot all be told apart: plots write
the number of the expert wherever there is room.
"""

from functools import lru_cache

import numpy as np
from jaxtyping import Float
from matplotlib.colors import to_rgb

NUM_COLORS = 128
FIRST = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#5b3a8e", "#882255")

# Linear RGB as a reader without red, green or blue cones sees it (Machado, Oliveira and Fernandes 2009, severity 1).
BLINDNESS = {
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
# Linear RGB -> cone responses -> Oklab (Ottosson 2020): lightness from 0 to 1, and two axes of colour.
CONES = np.array(
    [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
     [0.0883024619, 0.2817188376, 0.6299787005]]
)  # fmt: skip
OKLAB = np.array(
    [[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
     [0.0259040371, 0.7827717662, -0.8086757660]]
)  # fmt: skip


def expert_color(expert: int, gate: float = 1.0) -> Float[np.ndarray, " 3"]:
    """Gives the red, green and blue (0 to 1) of an expert; from expert 128 on, colours come again.

    Args:
        expert: Number of the expert.
        gate: Its gate, from 0 to 1: the weaker, the lighter the colour. At 0 a quarter of the colour is left.
    """
    return expert_colors(np.array([expert]), np.array([gate]))[0]


def expert_colors(experts: np.ndarray, gates: Float[np.ndarray, "..."] | float = 1.0) -> Float[np.ndarray, "... 3"]:
    """Gives the colours of an array of experts of any shape; see `expert_color`."""
    return faded(_palette()[np.asarray(experts, dtype=int) % NUM_COLORS], gates)


def faded(rgb: Float[np.ndarray, "... 3"], gates: Float[np.ndarray, "..."] | float) -> Float[np.ndarray, "... 3"]:
    """Gives colours mixed with white: all of the colour at a gate of 1, a quarter of it at 0."""
    strength = 0.25 + 0.75 * np.clip(np.asarray(gates, dtype=float), 0, 1)[..., None]
    return 1 - strength * (1 - rgb)


def as_seen(rgb: Float[np.ndarray, "color 3"], blindness: str | None = None) -> Float[np.ndarray, "color 3"]:
    """Gives colours in Oklab, as a reader with a kind of colour blindness sees them; None is a reader without any."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    if blindness is not None:
        linear = (linear @ np.array(BLINDNESS[blindness]).T).clip(0, 1)
    return np.cbrt(linear @ CONES.T) @ OKLAB.T


@lru_cache(maxsize=1)
def _palette() -> Float[np.ndarray, "color 3"]:
    levels = np.linspace(0.08, 0.94, 16)
    candidates = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(-1, 3)
    seen = as_seen(candidates)
    chroma = np.hypot(seen[:, 1], seen[:, 2])
    # Neither grey nor shrill, neither black nor white: grey is for what is not an expert, white for a gate of zero.
    candidates = candidates[(chroma > 0.06) & (chroma < 0.16) & (seen[:, 0] > 0.32) & (seen[:, 0] < 0.84)]
    views = [as_seen(candidates, kind) for kind in (None, *BLINDNESS)]
    palette = [np.array(to_rgb(color)) for color in FIRST]
    nearest = np.full(len(candidates), np.inf)
    for index in range(NUM_COLORS):
        if index == len(palette):
            palette.append(candidates[nearest.argmax()])
        for view, kind in zip(views, (None, *BLINDNESS), strict=True):
            nearest = np.minimum(nearest, np.linalg.norm(view - as_seen(palette[index][None], kind), axis=1))
    return np.stack(palette)
