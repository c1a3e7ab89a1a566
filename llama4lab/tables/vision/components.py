"""Principal components of features, and a colour for each place made of the first three."""

# pandas declares what it gives as wide unions.
# pyright: reportArgumentType=false, reportReturnType=false

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from llama4lab.tables.vision.feature_grids import Features

COLOURS = ("red", "green", "blue")
CLIPPED = 0.02  # of the places at each end of a colour's scale


def pca(features: Features | Sequence[Features], n: int = 3) -> pd.DataFrame:
    """Gives the principal components of the features at every place, on one basis for all images.

    Places that show only filling do not shape the basis, and are given their components on it like the others. The sign
    of a component is such that its largest weight is positive.

    Args:
        features: of one run, or of several with vectors of one width, for example of two sets of images.
        n: number of components.

    Columns:
        row, image, ..., left, top, right, bottom: the places, as in `features.table`.
        source: which of the features, from 0; only for a sequence.
        pc_1, pc_2, ...: the components.
        red, green, blue: the first three components as colours from 0 to 1. Each runs over the middle 96 % of the
            places that show a picture; a component that there is not is 0.5.

    The share of the variance that each component explains is in `attrs["explained"]`.

    Raises:
        ValueError: if there are not so many components, or widths differ.
    """
    vectors, shown, places = gathered(features)
    if not 1 <= n <= min(int(shown.sum()), vectors.shape[1]):
        raise ValueError(
            f"n={n} components were asked for, of {int(shown.sum())} places with {vectors.shape[1]} features each.\n"
            "There are at most as many as the smaller of the two."
        )
    vectors = vectors - vectors[shown].mean(0)
    basis, explained = _basis(vectors[shown], n)
    components = vectors @ basis
    names = [f"pc_{number + 1}" for number in range(n)]
    table = pd.concat([places, pd.DataFrame(components.numpy(), columns=names)], axis=1)
    for colour, component in zip(COLOURS, components.T[:3], strict=False):
        low, high = torch.quantile(component[shown], torch.tensor([CLIPPED, 1 - CLIPPED], dtype=component.dtype))
        scaled = (component - low) / (high - low) if high > low else torch.full_like(component, 0.5)
        table[colour] = scaled.clamp(0, 1).numpy()
    for colour in COLOURS[n:]:
        table[colour] = 0.5
    table.attrs["explained"] = explained
    return table


def gathered(
    features: Features | Sequence[Features],
) -> tuple[Float[Tensor, "place feature"], Tensor, pd.DataFrame]:
    """Gives the vectors of all places in float64, which of them show a picture, and the table of the places."""
    several = [features] if isinstance(features, Features) else list(features)
    widths = {one.at: one.values.shape[-1] for one in several}
    if len(set(widths.values())) != 1:
        found = ", ".join(f"{at} {width}" for at, width in widths.items()) or "none"
        raise ValueError(f"Features of one width are needed to share a basis. Their widths: {found}.")
    vectors = torch.cat([one.rows.cpu().double() for one in several])
    if not vectors.isfinite().all():
        raise ValueError(f"The features of {', '.join(widths)} are not all finite: nothing can be measured by them.")
    places = pd.concat([one.table for one in several], ignore_index=True)
    if not isinstance(features, Features):
        places["source"] = np.repeat(np.arange(len(several)), [len(one.table) for one in several])
    return vectors, torch.cat([one.shows_picture.cpu() for one in several]), places


def _basis(vectors: Float[Tensor, "place feature"], n: int) -> tuple[Float[Tensor, "feature n"], list[float]]:
    """The directions of most variance, and the share of it that lies in each."""
    count, width = vectors.shape
    # Products of the smaller side: a picture has few places, and some hook points thousands of features.
    products = vectors.T @ vectors if width <= count else vectors @ vectors.T
    sizes, directions = torch.linalg.eigh(products)
    sizes, directions = sizes.flip(0)[:n].clamp(min=0), directions.flip(1)[:, :n]
    if width > count:
        directions = torch.nn.functional.normalize(vectors.T @ directions, dim=0)
    strongest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    total = products.trace().clamp(min=torch.finfo(products.dtype).tiny)
    return directions * torch.where(strongest < 0, -1.0, 1.0), (sizes / total).tolist()
