"""Where each token of a batch stands: one tensor of positions drives RoPE, chunks and attention temperature.

Positions count from 0 inside a document and skip padding. A position that does not exceed the one before it starts a
new document in the same row (a packed sequence); documents never see each other.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

PADDING = -1


@dataclass
class TokenLayout:
    """The positions and documents of all tokens that a forward pass can attend to.

    Attributes:
        positions: Of the tokens of this pass.
        key_positions: Of every token so far, the cached ones included, in the order of storage.
        documents: The number of the packed document of every token so far; `PADDING` for padding.
        start: If all rows hold positions start, start + 1, ... and there is nothing else, the first position of this
            pass; None for rows with padding or packed documents.
    """

    positions: Int[Tensor, "#batch seq"]
    key_positions: Int[Tensor, "#batch total"]
    documents: Int[Tensor, "#batch total"]
    start: int | None
    _blocks: dict[int | None, list[Tensor]] = field(default_factory=dict, repr=False)

    @property
    def past(self) -> int:
        """How many tokens are cached."""
        return self.key_positions.shape[1] - self.positions.shape[1]

    @property
    def offset(self) -> int | None:
        """The position of the first token of plain rows; None for rows with padding or packed documents."""
        return None if self.start is None else self.start - self.past

    def rows(self, batch: int, total: int) -> "TokenLayout":
        """The layout of the first `total` tokens, its rows repeated to `batch` (as beam search repeats the cache)."""
        have = self.key_positions.shape
        if have[1] < total or batch % have[0]:
            raise ValueError(
                f"The cache holds {total} tokens in {batch} rows, but {have[1]} tokens in {have[0]} rows were seen.\n"
                "Pass a cache that this model filled, and edit its batch only by whole repeats."
            )
        documents = self.documents[:, :total].repeat_interleave(batch // have[0], 0)
        positions = self.key_positions[:, :total].repeat_interleave(batch // have[0], 0)
        return TokenLayout(positions[:, :0], positions, documents, None)

    def selected(self, rows: Int[Tensor, " row"]) -> "TokenLayout":
        """The layout of some rows, or of the rows in another order."""

        def pick(tensor: Tensor) -> Tensor:
            return tensor if tensor.shape[0] == 1 else tensor[rows.to(tensor.device)]

        return TokenLayout(pick(self.positions), pick(self.key_positions), pick(self.documents), self.start)

    def asking(self, x: Shaped[Tensor, "#batch seq ..."]) -> Shaped[Tensor, "#batch seq ..."]:
        """What belongs to the tokens that attend, which are all; see `PackedLayout`."""
        return x

    @property
    def query_valid(self) -> Bool[Tensor, "#batch seq"]:
        """Which tokens of this pass are not padding."""
        return self.documents[:, self.past :] != PADDING

    def visible(self, chunk: int | None, first: int, length: int) -> Bool[Tensor, "#batch query key"]:
        """Which keys each query may attend to.

        A key is visible if it is in the same document, not later, and, where `chunk` is a number, in the same chunk.
        A token always sees itself, so that no row of padding is empty.

        Args:
            chunk: Chunk size in tokens, or None for full causal attention.
            first: Storage index of the first key.
            length: Number of keys; those past the last token (empty places of a static cache) are invisible.
        """
        keys = slice(first, first + length)
        key, document = self.key_positions[:, None, keys], self.documents[:, None, keys]
        query, own = self.positions[:, :, None], self.documents[:, self.past :, None]
        seen = (key <= query) & (document == own) & (own != PADDING)
        if chunk is not None:
            seen &= key // chunk == query // chunk
        storage = torch.arange(first, first + seen.shape[-1], device=seen.device)
        itself = storage == torch.arange(self.past, self.past + seen.shape[1], device=seen.device)[:, None]
        empty = first + length - self.key_positions.shape[1]
        return torch.nn.functional.pad(seen | itself, (0, max(empty, 0)))

    def blocks(self, chunk: int | None) -> list[Int[Tensor, "block length"]]:
        """The runs of tokens that attend only among themselves, for a pass without cached tokens.

        Attention is causal attention inside each run. Runs of like length are stacked, filled up with -1 at the end.

        Returns:
            Tensors of indices into the flattened `[batch * seq]` tokens. Padding is in none of them.
        """
        if chunk not in self._blocks:
            self._blocks[chunk] = self._find_blocks(chunk)
        return self._blocks[chunk]

    def _find_blocks(self, chunk: int | None) -> list[Int[Tensor, "block length"]]:
        batch, seq = self.documents.shape
        row = torch.arange(batch, device=self.documents.device)[:, None].expand(batch, seq)
        place = self.positions // chunk if chunk is not None else torch.zeros_like(self.positions)
        valid = (self.documents != PADDING).flatten().nonzero().squeeze(-1)
        keys = torch.stack([row, self.documents, place.expand(batch, seq)]).flatten(1)[:, valid]
        starts = torch.ones(valid.shape[0], dtype=torch.bool, device=valid.device)
        starts[1:] = (keys[:, 1:] != keys[:, :-1]).any(0)
        lengths = torch.diff(starts.nonzero().squeeze(-1), append=valid.new_tensor([valid.shape[0]]))
        by_size: dict[int, list[Tensor]] = {}
        for run in valid.split(lengths.tolist()):
            # Powers of two bound both the number of attention calls and the share of filling.
            by_size.setdefault((run.shape[0] - 1).bit_length(), []).append(run)
        return [torch.nn.utils.rnn.pad_sequence(runs, batch_first=True, padding_value=-1) for runs in by_size.values()]


def plain_layout(batch: int, seq: int, past: int, start: int, device: torch.device) -> TokenLayout:
    """The layout of rows without padding or packing, whose first position in this pass is `start`."""
    key_positions = torch.arange(start - past, start + seq, device=device).unsqueeze(0)
    return TokenLayout(key_positions[:, past:], key_positions, torch.zeros_like(key_positions), start)


def document_numbers(
    positions: Int[Tensor, "batch total"], valid: Bool[Tensor, "batch total"]
) -> Int[Tensor, "batch total"]:
    """Numbers the documents of each row: a valid token whose position is not beyond that of the valid token before it
    starts a new one. Padding is `PADDING`.
    """
    index = torch.arange(positions.shape[1], device=positions.device)
    last = torch.where(valid, index, PADDING).cummax(1).values
    before = torch.nn.functional.pad(last[:, :-1], (1, 0), value=PADDING)
    restarts = valid & (before >= 0) & (positions <= positions.gather(1, before.clamp(min=0)))
    return restarts.long().cumsum(1).masked_fill(~valid, PADDING)


def token_layout(
    shape: tuple[int, int],
    device: torch.device,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Int[Tensor, "#batch seq"] | None = None,
    past: int = 0,
    history: TokenLayout | None = None,
) -> TokenLayout:
    """Reads the layout off what a caller passed.

    Args:
        shape: Batch size and number of tokens of this pass.
        device: Of the hidden states.
        attention_mask: `[batch, past + seq]`, 1 for tokens, 0 for padding.
        position_ids: Positions of the tokens of this pass; counted along the mask if None.
        past: Number of cached tokens.
        history: The layout of the pass before, whose keys are cached. Without it they were counted along the mask.

    Raises:
        ValueError: if a shape does not fit or a position is negative.
    """
    batch, seq = shape
    if attention_mask is not None:
        attention_mask = _checked_mask(attention_mask.to(device), batch, seq, past)
    if position_ids is not None:
        position_ids = _checked_positions(position_ids.to(device), batch, seq)
    history = history if past else None
    offset = 0 if history is None else history.offset
    if attention_mask is None and offset is not None:
        start = past + offset if position_ids is None else _plain_start(position_ids)
        if start is not None and (not past or start == past + offset):
            return plain_layout(batch, seq, past, start, device)

    valid = torch.ones(batch, past + seq, dtype=torch.bool, device=device)
    if attention_mask is not None:
        valid = attention_mask.bool()
    if history is not None:
        known = history.rows(batch, past).documents != PADDING
        if attention_mask is not None and bool((valid[:, :past] & ~known).any()):
            raise ValueError(
                "attention_mask shows tokens where the cached rows have padding.\n"
                "Reorder the rows by the methods of the cache that this model made, or run the prompt again."
            )
        valid = torch.cat([valid[:, :past] & known, valid[:, past:]], dim=1)
    positions = (valid.long().cumsum(1) - 1).clamp(min=0)
    if history is not None:
        before = history.rows(batch, past).key_positions
        onwards = _last_position(before, valid[:, :past]) + valid[:, past:].long().cumsum(1)
        positions = torch.cat([before, onwards.clamp(min=0)], dim=1)
    if position_ids is not None:
        # Callers write anything at places of padding.
        new = position_ids.expand(batch, seq).masked_fill(~valid[:, past:], 0)
        positions = torch.cat([positions[:, :past], new], dim=1)
    return TokenLayout(positions[:, past:], positions, document_numbers(positions, valid), None)


def _last_position(positions: Int[Tensor, "batch past"], valid: Bool[Tensor, "batch past"]) -> Int[Tensor, "batch 1"]:
    """The position of the last token of each row that is not padding; -1 where there is none."""
    index = torch.where(valid, torch.arange(positions.shape[1], device=positions.device), PADDING)
    last = index.amax(1, keepdim=True)
    return positions.gather(1, last.clamp(min=0)).masked_fill(last < 0, -1)


def _checked_mask(mask: Tensor, batch: int, seq: int, past: int) -> Tensor | None:
    """The mask, or None if it hides nothing."""
    if tuple(mask.shape) != (batch, past + seq):
        raise ValueError(
            f"attention_mask has shape {list(mask.shape)}, but there are {batch} rows of {past} cached and {seq} new "
            f"tokens.\nPass a mask of shape [{batch}, {past + seq}]."
        )
    if not torch.compiler.is_compiling() and not bool(((mask == 0) | (mask == 1)).all()):
        wrong = mask[(mask != 0) & (mask != 1)][0].item()
        raise ValueError(
            f"attention_mask holds {wrong}; a 2-D mask holds 1 for tokens and 0 for padding.\n"
            "A mask of scores to add has the shape [batch, 1 or heads, queries, keys]."
        )
    # Reading the mask costs one synchronisation a pass and opens the paths that need no mask.
    return None if not torch.compiler.is_compiling() and bool(mask.all()) else mask


def _checked_positions(position_ids: Tensor, batch: int, seq: int) -> Tensor:
    if position_ids.is_floating_point():
        raise ValueError(f"position_ids has dtype {position_ids.dtype}; positions are whole numbers.")
    if position_ids.ndim != 2 or position_ids.shape[1] != seq or position_ids.shape[0] not in (1, batch):
        raise ValueError(
            f"position_ids has shape {list(position_ids.shape)}, but this pass has {batch} rows of {seq} tokens.\n"
            f"Pass positions of shape [{batch}, {seq}] or [1, {seq}]."
        )
    if not torch.compiler.is_compiling() and bool((position_ids < 0).any()):
        raise ValueError(f"position_ids holds the position {int(position_ids.min())}; positions count from 0.")
    return position_ids


def _plain_start(position_ids: Int[Tensor, "#batch seq"]) -> int | None:
    """The first position if every row counts on from the same one, else None."""
    if torch.compiler.is_compiling():
        return None
    start = int(position_ids[0, 0])
    consecutive = torch.arange(start, start + position_ids.shape[1], device=position_ids.device)
    return start if bool((position_ids == consecutive).all()) else None
