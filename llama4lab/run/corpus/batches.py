"""Rows of a corpus -> batches of like length, always the same ones for the same rows."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llama4lab.run.corpus.items import Row

AHEAD = 16  # batches' worth of rows that are sorted together
MOST_ROWS = 4096  # of them, however short
MOST_TILES = 16  # of the images of a batch


@dataclass(frozen=True, eq=False)
class Batch:
    """The input of one pass: rows padded on the left, or rows that are the documents of one row.

    Attributes:
        input_ids: Tokens.
        attention_mask: 1 for tokens, 0 for padding.
        pixel_values: The tiles of all images in order; None without.
        labels: What each row counts for.
        items: How many items of the corpus have their first row here.
        position_ids: Of documents: each begins at 0. None for padded rows.
    """

    input_ids: Int[Tensor, "batch seq"]
    attention_mask: Int[Tensor, "batch seq"]
    pixel_values: Float[Tensor, "tile 3 side side"] | None
    labels: list[str]
    items: int
    position_ids: Int[Tensor, "batch seq"] | None = None

    @property
    def numbers(self) -> tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"]]:
        """The row of every place, and its number among the tokens of the row."""
        if self.position_ids is not None:
            return (self.position_ids == 0).long().cumsum(1) - 1, self.position_ids
        row = torch.arange(len(self.attention_mask))[:, None].expand(self.attention_mask.shape)
        return row, self.attention_mask.long().cumsum(1) - 1

    def inputs(self, device: torch.device) -> dict[str, Tensor]:
        """The arguments of the model."""
        inputs = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        if self.pixel_values is not None:
            inputs["pixel_values"] = self.pixel_values
        if self.position_ids is not None:
            inputs["position_ids"] = self.position_ids
        return {name: tensor.to(device) for name, tensor in inputs.items()}


def windows(items: Iterator[list[Row]], tokens: int) -> Iterator[list[list[Row]]]:
    """Gathers items, each a list of rows, until there is enough to sort; no item is cut.

    Args:
        items: The rows of each item.
        tokens: Of one batch.
    """
    window: list[list[Row]] = []
    total = num_rows = tiles = 0
    for rows in items:
        window.append(rows)
        total += sum(len(row.ids) for row in rows)
        num_rows += len(rows)
        tiles += sum(row.num_tiles for row in rows)
        if total >= AHEAD * tokens or num_rows >= MOST_ROWS or tiles >= AHEAD * MOST_TILES:
            yield window
            window, total, num_rows, tiles = [], 0, 0, 0
    if window:
        yield window


def bucketed(window: list[list[Row]], tokens: int) -> list[list[Row]]:
    """Sorts rows by length and cuts them into batches of at most so many tokens, padding counted.

    Rows with images are in batches of their own. A row that is longer than that is a batch by itself.
    """
    rows = sorted((row for rows in window for row in rows), key=lambda row: (row.num_tiles > 0, -len(row.ids)))
    batches: list[list[Row]] = []
    tiles = 0
    for row in rows:
        own = batches[-1] if batches else []
        full = not own or (len(own) + 1) * len(own[0].ids) > tokens or tiles + row.num_tiles > MOST_TILES
        if full or (row.num_tiles > 0) != (own[0].num_tiles > 0):
            batches.append([])
            tiles = 0
        batches[-1].append(row)
        tiles += row.num_tiles
    return batches


def packed_rows(window: list[list[Row]], tokens: int) -> list[list[Row]]:
    """Cuts rows, in their order, into passes of at most so many tokens; a row that is longer is a pass by itself."""
    passes: list[list[Row]] = []
    total = 0
    for row in (row for rows in window for row in rows):
        if not passes or total + len(row.ids) > tokens:
            passes.append([])
            total = 0
        passes[-1].append(row)
        total += len(row.ids)
    return passes


def batch_of(rows: list[Row], filler: int) -> Batch:
    """Puts rows, the longest first, into one batch.

    Args:
        rows: The rows.
        filler: The token to pad with.
    """
    shape = (len(rows), len(rows[0].ids))
    ids, mask = torch.full(shape, filler), torch.zeros(shape, dtype=torch.long)
    for place, row in enumerate(rows):
        ids[place, shape[1] - len(row.ids) :] = row.ids
        mask[place, shape[1] - len(row.ids) :] = 1
    return Batch(ids, mask, _tiles(rows), [row.label for row in rows], sum(row.first for row in rows))


def packed_batch(rows: list[Row]) -> Batch:
    """Puts rows one after the other into one row, whose positions begin anew with each of them: none sees another."""
    ids = torch.cat([row.ids for row in rows])[None]
    positions = torch.cat([torch.arange(len(row.ids)) for row in rows])[None]
    labels, items = [row.label for row in rows], sum(row.first for row in rows)
    return Batch(ids, torch.ones_like(ids), _tiles(rows), labels, items, positions)


def _tiles(rows: list[Row]) -> Float[Tensor, "tile 3 side side"] | None:
    pixels = [row.pixels for row in rows if row.pixels is not None]
    return torch.cat(pixels) if pixels else None
