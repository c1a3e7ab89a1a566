"""The tokens that a change is about, in every pass over a text and in every step of a generation."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from llama4lab.run.current_pass import CurrentPass

Positions = int | Sequence[int] | slice | str | Tensor | None


class ChosenTokens:
    """Which tokens of each pass are meant.

    Positions count over the whole text, padding included, so they mean the same in one pass over the text and in
    generation, which reads one token a step.

    Args:
        positions: None for all; a position or several; a slice; "new" for the tokens that generation adds; or a boolean
            tensor `[batch, seq]` of the prompt's places. Negative positions count from the end of the prompt.

    Attributes:
        count: How many have been so far, a pass at a hook point each.
    """

    def __init__(self, positions: Positions):
        if isinstance(positions, str) and positions != "new":
            raise ValueError(f"positions={positions!r} has no meaning; as a word only 'new' has one.")
        if isinstance(positions, Tensor) and (positions.dtype != torch.bool or positions.ndim != 2):
            raise ValueError(
                f"positions is a tensor of {positions.dtype} and shape {list(positions.shape)}.\n"
                "Pass a boolean one [batch, seq], or positions as a list."
            )
        self.positions = [positions] if isinstance(positions, int) else positions
        self.count = 0
        self._length: int | None = None

    def mask(self, current: CurrentPass) -> Bool[Tensor, "batch seq"]:
        """The tokens of the current pass that are meant."""
        if current.first == 0:
            self._begin(*current.shape)
        mask = current.valid & self._meant(current)
        self.count += int(mask.sum())
        return mask

    def _begin(self, batch: int, length: int) -> None:
        """A pass that begins a text: its length is that of the prompt."""
        if isinstance(self.positions, Tensor) and tuple(self.positions.shape) != (batch, length):
            raise ValueError(f"positions has shape {list(self.positions.shape)}; the prompt is {batch} x {length}.")
        if self._length not in (None, length) and self._counts_from_the_end:
            raise ValueError(
                f"positions={self.positions!r} count from the end of the prompt, but passes of {self._length} and of "
                f"{length} tokens began in this block.\nGive positions from the front, for example slice(12, None)."
            )
        self._length = length

    @property
    def _counts_from_the_end(self) -> bool:
        if isinstance(self.positions, slice):
            return any(end is not None and end < 0 for end in (self.positions.start, self.positions.stop))
        listed = [] if self.positions is None or isinstance(self.positions, Tensor) else self.positions
        return listed == "new" or any(int(position) < 0 for position in listed)

    def _meant(self, current: CurrentPass) -> Bool[Tensor, "#batch seq"]:
        """The same without regard to padding."""
        seq, device = current.shape[1], current.valid.device
        places = torch.arange(current.first, current.first + seq, device=device)[None]
        length = self._length
        if self.positions is None:
            return torch.ones_like(places, dtype=torch.bool)
        if length is None:
            raise ValueError("The block began in the middle of a text; begin it before the prompt is read.")
        if isinstance(self.positions, str):
            return places >= length
        if isinstance(self.positions, Tensor):
            known = self.positions.to(device)
            return known.gather(1, places.clamp(max=length - 1).expand(len(known), seq)) & (places < length)
        if isinstance(self.positions, slice):
            return self._in_slice(self.positions, places, length)
        listed = [position + length if position < 0 else position for position in self.positions]
        if any(position < 0 for position in listed):
            raise ValueError(f"positions={list(self.positions)} was asked for; the prompt has {length} places.")
        return torch.isin(places, torch.tensor(listed, device=device))

    def _in_slice(self, asked: slice, places: Tensor, length: int) -> Bool[Tensor, "1 seq"]:
        first, step = asked.start or 0, asked.step or 1
        first = max(first + length, 0) if first < 0 else first
        last = asked.stop if asked.stop is None or asked.stop >= 0 else asked.stop + length
        within = (places >= first) & ((places - first) % step == 0)
        return within if last is None else within & (places < last)
