"""How alike the geometry of the places is at two hook points: CKA.

Linear centred kernel alignment (Kornblith et al. 2019, arXiv 1905.00414) compares how places lie to each other, so that
hook points of different width and basis can be compared. Its plain form is too high where there are fewer places than
features, as in a picture; the debiased form (Song et al. 2012; Nguyen et al. 2020, arXiv 2010.15327) is not.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations_with_replacement

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from llama4lab.run.run import Run
from llama4lab.tables.vision.feature_grids import GRAINS, Features, features

KEY = ["row", "image", "tile", "tile_row", "tile_column"]


def cka(source: Run | Sequence[Features] | Mapping[str, Features], *, debiased: bool = True) -> pd.DataFrame:
    """Gives the alignment of every two hook points over the places that show a picture.

    Where hook points of image patches and of image tokens meet, the patches of an image token are averaged first.

    Columns:
        first, second: the hook points, or the names given; every pair in both orders.
        cka: 1 where the places lie to each other in the same way; around 0 (a little below too) where the one says
            nothing about the other. NaN where all places have the same vector.
        places: how many places were compared.

    Args:
        source: features by name; or a list of them, named by their hook points; or a run, of which every hook point
            with a vector for each place is taken.
        debiased: whether to correct for the number of places.

    Raises:
        ValueError: if there is nothing to compare, names repeat, places differ, or there are fewer than four.
    """
    named = _named(source)
    if len({one.grain for one in named.values()}) > 1:
        named = {name: one.by_token() for name, one in named.items()}
    _check_places(named)
    vectors = {name: _centred(one) for name, one in named.items()}
    count = min(map(len, vectors.values()))
    if count < 4:
        raise ValueError(f"The debiased alignment needs four places that show a picture, and there are {count}.")
    measure = _debiased_product if debiased else _product
    own = {name: measure(one, one) for name, one in vectors.items()}
    lines = []
    for first, second in combinations_with_replacement(named, 2):
        size = own[first] * own[second]
        value = measure(vectors[first], vectors[second]) / np.sqrt(size) if size > 0 else np.nan
        pairs = {(first, second), (second, first)}
        lines += [{"first": one, "second": other, "cka": value, "places": count} for one, other in pairs]
    order = {name: number for number, name in enumerate(named)}
    lines.sort(key=lambda line: (order[line["first"]], order[line["second"]]))
    return pd.DataFrame(lines)


def _named(source: Run | Sequence[Features] | Mapping[str, Features]) -> dict[str, Features]:
    if isinstance(source, Run):
        shapes = {name: shape.split() for name, shape in source.shapes.items()}
        usable = [name for name, words in shapes.items() if " ".join(words[:2]) in GRAINS and len(words) > 2]
        source = [features(source, name) for name in usable if source[name].is_floating_point()]
    if isinstance(source, Mapping):
        named = dict(source)
    else:
        named = {one.at: one for one in source}
        if len(named) < len(source):
            raise ValueError("Two of the features are of one hook point. Name them: {'before': ..., 'after': ...}.")
    if not named:
        raise ValueError("There are no features to compare: no hook point with a vector for each place was recorded.")
    return named


def _check_places(named: Mapping[str, Features]) -> None:
    (first, one), *others = named.items()
    for name, other in others:
        if not other.table[KEY].equals(one.table[KEY]):
            raise ValueError(
                f"{first} and {name} are of different places: {one!r}; {other!r}.\n"
                "Compare features of the same images in the same prompt."
            )


def _centred(one: Features) -> Float[Tensor, "place feature"]:
    vectors = one.rows.cpu().double()[one.shows_picture.cpu()]
    if not vectors.isfinite().all():
        raise ValueError(f"The features of {one.at} are not all finite: nothing can be measured by them.")
    vectors = vectors - vectors.mean(0)
    # The scale drops out; without it, equal vectors are told from nearly equal ones.
    size = vectors.abs().max()
    return vectors / size if size > 1e-12 * one.rows.abs().max().double().cpu() else torch.zeros_like(vectors)


def _product(first: Float[Tensor, "place one"], second: Float[Tensor, "place other"]) -> float:
    """The plain product of two geometries."""
    return float((first.T @ second).square().sum())


def _debiased_product(first: Float[Tensor, "place one"], second: Float[Tensor, "place other"]) -> float:
    """The unbiased estimate of the same (Song et al. 2012, equation 5), times a factor that drops out.

    It is about products of different places alone. The table of all products is not needed: sums over it are sums over
    features, and what a place has with itself is taken off.
    """
    count = len(first)
    own = first.square().sum(1), second.square().sum(1)
    sums = [vectors @ vectors.sum(0) - each for vectors, each in zip((first, second), own, strict=True)]
    together = (first.T @ second).square().sum() - own[0] @ own[1]
    spread = sums[0].sum() * sums[1].sum() / ((count - 1) * (count - 2))
    return float(together + spread - 2 / (count - 2) * (sums[0] @ sums[1]))
