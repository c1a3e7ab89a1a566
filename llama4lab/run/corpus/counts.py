"""Adds up what routers did, batch by batch, on the model's device."""

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llama4lab.run.corpus.arrays import AXES, BINS, KINDS, MEANS, MODALITIES, RESOLUTION, bin_of
from llama4lab.run.corpus.batch_pass import RoutedTokens

EXACT = 2.0**53  # whole numbers up to this size are exact in 64-bit floats
INT32 = 2**31
MOST_GROUPS = 4096


class Counts:
    """The arrays of `arrays.AXES`, as tensors.

    Args:
        sizes: Of the axes layer, slot, expert and d_model; with a vocabulary token_id, too.
        kinds: The kind of each token of the vocabulary, as its number in `MODALITIES`.
        words: The indices of the layers whose vocabulary is counted.
        device: Where to count.
    """

    def __init__(self, sizes: dict[str, int], kinds: Int[Tensor, " token_id"], words: list[int], device: torch.device):
        self.groups: dict[str, int] = {}
        self.sizes = {"modality": len(MODALITIES), "other": sizes["expert"], "bin": BINS, "same": 2, **sizes}
        self.words = words
        self.device = device
        self.tokens = 0
        self.whole = True  # False while a batch is half added
        self._kinds = kinds.to(device)
        self.arrays = {name: self._zeros(name, 0) for name in AXES if name != "vocabulary" or words}

    def add(self, seen: RoutedTokens, labels: list[str]) -> None:
        """Adds a batch.

        Args:
            seen: What its routers did.
            labels: What each row counts for.

        Raises:
            ValueError: if a router or an expert gave something that is not a number.
        """
        if seen.experts.shape[-1] != self.sizes["slot"]:
            raise ValueError(
                f"The tokens of a batch have {seen.experts.shape[-1]} experts each, those before {self.sizes['slot']}."
            )
        for label in labels:
            self._number(label)
        group = torch.tensor([self.groups[label] for label in labels], device=self.device)[seen.row]
        new = self._routes(seen, group) | self._means(seen, group)
        new |= {"writes": _fixed(seen.writes, "what experts write").long()}
        keys = self._word_keys(seen) if self.words else []
        # Of 32 bits while they suffice: the vocabulary is large.
        self.tokens += len(seen.ids)
        if self.words and self.tokens * self.sizes["slot"] >= INT32:
            self.arrays["vocabulary"] = self.arrays["vocabulary"].long()
        self.whole = False
        for name, counts in new.items():
            self.arrays[name] += counts.view(self.arrays[name].shape)
        for key in keys:
            words = self.arrays["vocabulary"].view(-1)
            words.index_add_(0, key, torch.ones_like(key, dtype=words.dtype))
        self.whole = True

    def load(self, groups: list[str], arrays: Mapping[str, np.ndarray]) -> None:
        """Goes on from counts that were saved."""
        self.groups = {label: number for number, label in enumerate(groups)}
        self.arrays = {name: torch.tensor(array, device=self.device) for name, array in arrays.items()}
        self.tokens = int(arrays["choices"][:, :, 0, 0].sum())

    def _number(self, label: str) -> None:
        """Makes room for a label that was not there before."""
        if label in self.groups:
            return
        if len(self.groups) == MOST_GROUPS:
            raise ValueError(
                f"The prompts have more than {MOST_GROUPS} labels, the last one {label!r}.\n"
                "Choose a by that puts prompts into fewer groups."
            )
        for name, axes in AXES.items():
            if axes[0] == "group":
                self.arrays[name] = torch.cat([self.arrays[name], self._zeros(name, 1)])
        self.groups[label] = len(self.groups)

    def _zeros(self, name: str, groups: int) -> Tensor:
        sizes = {**self.sizes, "group": groups}
        if name == "flow":
            sizes["layer"] -= 1
        if name == "vocabulary":
            sizes |= {"kind": len(KINDS), "layer": len(self.words)}
        dtype = torch.int32 if name == "vocabulary" else torch.int64
        return torch.zeros([sizes[axis] for axis in AXES[name]], dtype=dtype, device=self.device)

    def _count(self, name: str, *indices: Tensor) -> Int[Tensor, " cell"]:
        """How often each cell of an array is meant by indices on its axes."""
        shape = self.arrays[name].shape
        return torch.bincount(_flat(shape, indices), minlength=shape.numel())

    def _routes(self, seen: RoutedTokens, group: Int[Tensor, " token"]) -> dict[str, Tensor]:
        """Everything that only counts tokens."""
        experts, device = seen.experts, self.device
        layer = torch.arange(experts.shape[0], device=device)[:, None, None]
        slot = torch.arange(experts.shape[2], device=device)
        kind, place = self._kinds[seen.ids][:, None], bin_of(seen.place)[:, None]
        first = experts[..., 0]
        follows = (seen.row[1:] == seen.row[:-1]).nonzero().squeeze(1)
        same = (first[:, follows + 1] == first[:, follows]).long()
        ways = experts[:-1, :, :, None], experts[1:, :, None, :]
        found = {
            "choices": self._count("choices", group[:, None], kind, layer, slot, experts),
            "positions": self._count("positions", place, layer, experts),
            "flow": self._count("flow", layer[:-1, ..., None], *ways),
            "repeats": self._count("repeats", layer[..., 0], same),
        }
        if experts.shape[2] > 1:
            # All pairs of slots, in both orders; not only neighbours in rank.
            one, two = (~torch.eye(experts.shape[2], dtype=torch.bool, device=device)).nonzero().unbind(1)
            found["pairs"] = self._count("pairs", layer, experts[..., one], experts[..., two])
        return found

    def _means(self, seen: RoutedTokens, group: Int[Tensor, " token"]) -> dict[str, Tensor]:
        """Sums of real numbers for each group and expert, in fixed point."""
        experts = seen.experts
        layer = torch.arange(experts.shape[0], device=self.device)[:, None, None]
        key = _flat(self.arrays["gate"].shape, (group[:, None], layer, experts))
        size = self.arrays["gate"].numel()
        defined = (seen.margins.isfinite() | seen.margins.isnan())[..., None].expand(experts.shape)
        margins = seen.margins[..., None].expand(experts.shape)
        entropies = seen.entropies[..., None].expand(experts.shape)
        values = dict(zip(MEANS, (seen.gates, margins, entropies, seen.norms), strict=True))
        found: dict[str, Tensor] = {}
        for name, value in values.items():
            own = defined if name == "margin" else torch.ones_like(defined)
            found[name] = _exact_sums(key[own.flatten()], _fixed(value[own], name), size)
        found["with_margin"] = torch.bincount(key[defined.flatten()], minlength=size)
        return found

    def _word_keys(self, seen: RoutedTokens) -> list[Int[Tensor, " entry"]]:
        """Where each token counts in the vocabulary. Image tokens all have one id, which says nothing: left out."""
        word = self._kinds[seen.ids] != MODALITIES.index("image")
        followed = torch.zeros_like(word)
        followed[:-1] = seen.row[1:] == seen.row[:-1]
        assert seen.predicted is not None
        meant = [(seen.ids, word), (seen.ids.roll(-1), word & followed), (seen.predicted, word)]
        return [self._words(seen, kind, *own) for kind, own in enumerate(meant)]

    def _words(
        self, seen: RoutedTokens, kind: int, ids: Int[Tensor, " token"], own: Bool[Tensor, " token"]
    ) -> Int[Tensor, " entry"]:
        experts = seen.experts[self.words][:, own]
        layer = torch.arange(len(self.words), device=self.device)[:, None, None]
        number = torch.tensor(kind, device=self.device)
        return _flat(self.arrays["vocabulary"].shape, (number, layer, ids[own][:, None], experts))


def _flat(shape: torch.Size, indices: tuple[Tensor, ...]) -> Int[Tensor, " entry"]:
    """Indices on every axis, which broadcast -> indices into the flattened array."""
    flat: Tensor | int = 0
    for size, index in zip(shape, indices, strict=True):
        flat = flat * size + index
    assert isinstance(flat, Tensor)
    return flat.flatten()


def _fixed(values: Float[Tensor, "..."], what: str) -> Float[Tensor, "..."]:
    """Real numbers as whole multiples of the resolution.

    Raises:
        ValueError: if one is not finite.
    """
    whole = (values.double() / RESOLUTION).round()
    if not bool(whole.isfinite().all()):
        raise ValueError(f"The {what} of {int((~whole.isfinite()).sum())} tokens or experts is not a finite number.")
    return whole


def _exact_sums(key: Int[Tensor, " entry"], values: Float[Tensor, " entry"], size: int) -> Int[Tensor, " cell"]:
    """Sums of whole numbers, which 64-bit floats hold exactly, whatever the order of adding.

    Raises:
        OverflowError: if they are too large for that.
    """
    if len(values) and float(values.abs().sum()) >= EXACT:
        raise OverflowError(
            f"Numbers of a batch add up to {float(values.abs().sum()) * RESOLUTION:.3g}; give fewer tokens."
        )
    return torch.bincount(key, weights=values, minlength=size).long()
