"""The arrays of counts that statistics of a corpus are made of: their names, their axes, their units.

Every array is of whole numbers, so that sums do not depend on the order in which they are taken. Real numbers (gates,
norms, writes) are kept in fixed point: as multiples of `RESOLUTION`.
"""

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

MODALITIES = ("text", "image", "special")
KINDS = ("input", "next", "predicted")
MEANS = ("gate", "margin", "entropy", "write_norm")
RESOLUTION = 2.0**-24  # sums may go up to 2 ** 39 before 64 bits are full

AXES: dict[str, tuple[str, ...]] = {
    "choices": ("group", "modality", "layer", "slot", "expert"),
    **{name: ("group", "layer", "expert") for name in MEANS},
    "with_margin": ("group", "layer", "expert"),  # tokens that have a margin: not all experts were chosen or barred
    "positions": ("bin", "layer", "expert"),
    "flow": ("layer", "expert", "other"),  # `other` is of the next router
    "pairs": ("layer", "expert", "other"),
    "repeats": ("layer", "same"),
    "writes": ("layer", "expert", "d_model"),
    "vocabulary": ("kind", "layer", "token_id", "expert"),
}
BINS = 32  # of positions


def bin_of(places: Int[Tensor, " token"]) -> Int[Tensor, " token"]:
    """The bin of each place in a text: place 0 is in bin 0, places 1 and 2 in bin 1, 3 to 6 in bin 2, and so on."""
    # The exponent of a float is exact where a logarithm might be rounded down.
    return torch.frexp((places + 1).double()).exponent.long() - 1


def bin_edges(number: Int[np.ndarray, " bin"]) -> tuple[Int[np.ndarray, " bin"], Int[np.ndarray, " bin"]]:
    """The first and the last place of each bin."""
    return 2**number - 1, 2 ** (number + 1) - 2
