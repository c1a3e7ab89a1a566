"""The entries of a sweep: which numbers of a hook point's tensor each cell replaces in each row."""

from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor

from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.prompt.prompt import Prompt
from llama4lab.run.hook_names import is_vision
from llama4lab.run.pairing import NOWHERE, Pair, Side, other_side
from llama4lab.run.size import shape as shape_of
from llama4lab.run.substitution import Substitution, Values, inner_words, place_axis
from llama4lab.run.sweep_axes import BY_EXPERT, Target

OTHER = "other"


def usable_tokens(pair: Pair, into: Side, values: Values) -> np.ndarray:
    """Which tokens of the base prompt can be patched: real ones, that have a counterpart where one is needed; and, if
    values come unchanged from the other run, only those that can differ from it.
    """
    base, sources = pair.prompt(into), pair.sources(into).numpy()
    usable = base.attention_mask.cpu().numpy().astype(bool)
    if values != OTHER and not callable(values):
        return usable
    usable = usable & (sources != NOWHERE)
    if values != OTHER:
        return usable
    other = pair.prompt(other_side(into))
    own_ids, ids = base.input_ids.cpu().numpy(), other.input_ids.cpu().numpy()
    row = np.arange(len(ids))[:, None]
    length = min(own_ids.shape[1], ids.shape[1])
    same = np.zeros(own_ids.shape, dtype=bool)
    column = np.arange(length)
    masks = [p.attention_mask.cpu().numpy()[:, :length] for p in (base, other)]
    same[:, :length] = ((sources[:, :length] == column) | (masks[0] == 0)) & (own_ids[row, column] == ids[row, column])
    same[:, :length] &= masks[0] == masks[1]
    if base.pixel_values is not None:
        images = np.array([[kind == "image" for kind in kinds] for kinds in base.modality])
        same &= ~(images & ~_same_pictures(pair)[:, None])
    # Causality: before the first difference both runs are the same.
    return usable & ~np.logical_and.accumulate(same, axis=1)


def same_tiles(pair: Pair) -> np.ndarray:
    """Which tiles hold the same pixels in both prompts."""
    clean, corrupted = pair.clean.pixel_values, pair.corrupted.pixel_values
    if clean is None or corrupted is None or clean.shape != corrupted.shape:
        return np.zeros(0)
    return (clean.cpu() == corrupted.cpu()).flatten(1).all(1).numpy()


def _same_pictures(pair: Pair) -> np.ndarray:
    """Which rows have the same images in both prompts."""
    same = same_tiles(pair)
    rows = np.ones(len(pair.clean), dtype=bool)
    for image in pair.corrupted.images:
        rows[image.row] &= bool(len(same)) and bool(same[image.tiles].all())
    return rows


def axis_sizes(model: HookedPreTrainedModel, base: Prompt, name: str, shape: str) -> dict[str, list[int]]:
    """The indices that may be chosen on each axis of a hook point."""
    mask = base.attention_mask.cpu().numpy().astype(bool)
    counts = dict(zip(shape.split(), shape_of(model, base, name, shape), strict=True))
    sizes = {word: list(range(count)) for word, count in counts.items()}
    if name.endswith(BY_EXPERT):
        sizes["expert"] = list(range(model.text.config.num_local_experts))
    for word in {"seq", "query"} & set(sizes) if not is_vision(name) else ():
        # A token before the first difference is a cell as well: its effect is known to be nothing.
        sizes[word] = np.flatnonzero(mask.any(0)).tolist()
    if "tile" in sizes:
        per_row = np.bincount([i.row for i in base.images for _ in range(i.num_tiles)], minlength=1)
        sizes["tile"] = list(range(int(per_row.max())))
    return sizes


@dataclass(frozen=True, eq=False)
class Entries:
    """Makes the entries of hook points."""

    model: HookedPreTrainedModel
    base: Prompt
    usable: np.ndarray
    sources: Tensor
    source_length: int
    same_tiles: np.ndarray

    def entries(self, name: str, shape: str, targets: list[tuple[int, Target]]) -> Substitution:
        """The entries of one hook point, for the cells that replace something there."""
        words, rows = inner_words(shape), len(self.base)
        by_expert = name.endswith(BY_EXPERT) and any("expert" in target.index for _, target in targets)
        columns: list[list[np.ndarray]] = [[] for _ in range(4 + len(words))]
        for cell, target in targets:
            chosen = [target.index.get("expert", (0,)), *(target.index.get(word, (0,)) for word in words)]
            inner = np.array(list(product(*chosen))).T
            for row in range(rows):
                lead, place = self._tokens(name, shape, target, row)
                token, combination = (t.ravel() for t in np.indices((len(lead), inner.shape[1])))
                own = [np.full(len(token), cell * rows + row), lead[token], place[token]]
                for store, values in zip(columns, [*own, *inner[:, combination]], strict=True):
                    store.append(values)
        unit, lead, place, expert, *inner = (
            torch.from_numpy(np.concatenate(c)) if c else torch.zeros(0, dtype=torch.long) for c in columns
        )
        given = {word for _, target in targets for word in target.index}
        chosen_inner = tuple(index if word in given else None for word, index in zip(words, inner, strict=True))
        return Substitution(name, shape, unit, lead, place, chosen_inner, expert if by_expert else None)

    def source_at(self, entries: Substitution, *, constant: bool) -> Tensor:
        """For each entry the token of the source run, or of the constants."""
        if is_vision(entries.name):
            places = shape_of(self.model, self.base, entries.name, entries.shape)[place_axis(entries.shape.split())]
            return entries.lead * places + entries.place
        if constant:
            return entries.lead * self.sources.shape[1] + entries.place
        mapped = self.sources[entries.lead, entries.place].clamp(min=0)
        return entries.lead * self.source_length + mapped

    def tiles(self, row: int) -> list[int]:
        """The tiles of a row."""
        return [
            tile
            for image in self.base.images
            if image.row == row
            for tile in range(image.tiles.start, image.tiles.stop)
        ]

    def _tokens(self, name: str, shape: str, target: Target, row: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens (row and column) or image patches (tile and patch) that a target replaces in a row."""
        words = shape.split()
        word = words[place_axis(words)]
        if not is_vision(name):
            place = np.array(target.index.get(word, range(self.usable.shape[1])))
            place = place[self.usable[row, place]]
            if name == "embed":  # overwritten by the image there
                place = place[[self.base.modality[row][column] != "image" for column in place]]
            return np.full(len(place), row), place
        tiles = self.tiles(row)
        wanted = [tiles[i] for i in target.index.get("tile", range(len(tiles))) if i < len(tiles)]
        wanted = [tile for tile in wanted if not (len(self.same_tiles) and self.same_tiles[tile])]
        count = shape_of(self.model, self.base, name, shape)[place_axis(words)]
        patches = np.array(target.index.get(word, range(count)))
        lead, place = np.meshgrid(np.array(wanted, dtype=np.int64), patches, indexing="ij")
        return lead.ravel(), place.ravel()
