"""One number for each place of the pictures, from its vector: likeness to a place, segment, length."""

# pandas declares what it gives as wide unions.
# pyright: reportArgumentType=false, reportReturnType=false, reportGeneralTypeIssues=false

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from sklearn.cluster import KMeans

from llama4lab.tables.vision.components import gathered
from llama4lab.tables.vision.feature_grids import Features


def similarity(features: Features, *, tile: int, row: int, column: int, image: int | None = None) -> pd.DataFrame:
    """Gives the cosine between the vector of one place and that of every place, in all images.

    Columns:
        row, image, ..., left, top, right, bottom: the places, as in `features.table`.
        cosine: the cosine; NaN where a vector is zero.
        chosen: True for the place itself.

    Args:
        features: the features.
        tile: the tile of the image.
        row: row of the place in the tile, `tile_row` in the table.
        column: column of the place in the tile, `tile_column` in the table.
        image: number of the image; may be left out if there is only one.

    Raises:
        ValueError: if there is no such place, or several images and `image` does not say which.
    """
    table = features.table.copy()
    images = table["image"].unique().tolist()
    if image is None and len(images) > 1:
        raise ValueError(f"The features are of the images {', '.join(map(str, images))}. Say which one by image=.")
    image = images[0] if image is None else image
    asked = (table[["image", "tile", "tile_row", "tile_column"]].to_numpy() == [image, tile, row, column]).all(axis=1)
    if asked.sum() != 1:
        tiles, rows, columns, _ = features.values.shape
        raise ValueError(
            f"The place at row {row}, column {column} of tile {tile} of image {image} was asked for.\nThe images "
            f"{', '.join(map(str, images))} have {tiles} tiles of {rows} x {columns} places; all count from 0."
        )
    vectors = features.rows.cpu().double()
    sizes = vectors.norm(dim=-1, keepdim=True)
    units = vectors / torch.where(sizes > 0, sizes, torch.nan)
    table["cosine"] = (units @ units[int(asked.argmax())]).clamp(-1, 1).numpy()
    table["chosen"] = asked
    return table


def segments(features: Features | Sequence[Features], k: int, *, unit: bool = True, seed: int = 0) -> pd.DataFrame:
    """Divides the places of all images into `k` segments of like vectors, by k-means.

    Places that show only filling do not shape the segments; each is put into the nearest one.

    Columns:
        row, image, ..., left, top, right, bottom: the places, as in `features.table`.
        source: which of the features, from 0; only for a sequence.
        segment: number of the segment, from 0, which has the most places that show a picture.

    Args:
        features: of one run, or of several with vectors of one width, whose segments are then the same.
        k: number of segments.
        unit: divide vectors by their length first, so that their direction counts alone; few vectors of great length
            would otherwise have segments of their own.
        seed: for the first centres of k-means.

    Raises:
        ValueError: if there are fewer different vectors than segments, or widths differ.
    """
    vectors, shown, table = gathered(features)
    if unit:
        vectors = torch.nn.functional.normalize(vectors, dim=-1)
    different = len(np.unique(vectors[shown].numpy(), axis=0))
    if not 1 <= k <= different:
        raise ValueError(f"k={k} segments were asked for, of {different} different vectors.")
    fitted = KMeans(k, n_init=10, random_state=seed).fit(vectors[shown].numpy())
    labels = fitted.predict(vectors.numpy())
    counts = np.bincount(labels[shown.numpy()], minlength=k)
    numbers = np.empty(k, dtype=np.int64)
    numbers[np.argsort(-counts, kind="stable")] = np.arange(k)
    table["segment"] = numbers[labels]
    return table


def norms(features: Features, *, threshold: float | int = 5.2) -> pd.DataFrame:
    """Gives the length of the vector at every place, and flags those that are far longer than the others.

    Large vision transformers keep global information at a few places of little content, whose vectors are several times
    as long as the others (Darcet et al. 2023, "Vision Transformers Need Registers", arXiv 2309.16588). A place is
    flagged if it is longer than the median by more than `threshold` times the median distance from the median. For
    lengths of a normal distribution the default is 3.5 standard deviations, as Iglewicz and Hoaglin (1993) advise.

    Columns:
        row, image, ..., left, top, right, bottom: the places, as in `features.table`.
        norm: length of the vector.
        score: distance from the median of all places that show a picture, in median distances; negative below it. NaN
            where more than half of the lengths are the same, so that there is no scale.
        outlier: whether the place shows a picture and its score is above the threshold.

    Args:
        features: the features.
        threshold: the score from which on a place is an outlier.
    """
    vectors, shown, table = gathered(features)
    lengths = vectors.norm(dim=-1).numpy()
    seen = shown.numpy()
    middle = np.median(lengths[seen])
    scale = np.median(np.abs(lengths[seen] - middle))
    table["norm"] = lengths
    # Equal vectors differ in their last bits, which is no scale.
    table["score"] = (lengths - middle) / scale if scale > 1e-9 * middle else np.nan
    table["outlier"] = (table["score"].to_numpy() > threshold) & seen
    return table
