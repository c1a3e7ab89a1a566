"""Many continuations of the same rows in one packed row.

Whatever works token by token (norms, projections, experts) sees one long row `[1, token, ...]`; attention is computed
part by part, each part with keys and values of the rows that it continues.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from einops import rearrange
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from llama4lab.model.token_layout import TokenLayout

Attend = Callable[[Tensor, Tensor, Tensor, TokenLayout, Tensor | None], Tensor]


@dataclass(eq=False)
class Part:
    """Equally long rows that stand one after the other.

    Attributes:
        tokens: Their tokens in the packed row.
        asked: Those of their tokens that attend, among all that attend: the same number at the end of every row.
        layout: Of the tokens that attend, over the keys of the trunk that come before and the own ones.
        trunk_rows: For each row, the row of the trunk that it continues; None for rows that begin by themselves.
        past: How many tokens of the trunk come before the own ones.
        is_trunk: Whether these are the rows that others continue.
    """

    tokens: slice
    asked: slice
    rows: int
    layout: TokenLayout
    trunk_rows: Int[Tensor, " row"] | None = None
    past: int = 0
    is_trunk: bool = False


@dataclass(eq=False)
class Trunk:
    """Keys and values of the rows that others continue, in the layer that ran last."""

    keys: Tensor | None = None
    values: Tensor | None = None

    def before(
        self, part: Part, chunk: int | None
    ) -> tuple[Float[Tensor, "row kv_head key d_head"], Float[Tensor, "row kv_head key d_head"]]:
        """The keys and values before the tokens of a part; of a chunked layer only those that they can see."""
        assert self.keys is not None
        assert self.values is not None
        assert part.trunk_rows is not None
        start = part.layout.start
        first = part.past - min(part.past, (start - _asked_late(part)) % chunk) if chunk and start is not None else 0
        places = slice(first, part.past)
        if self.keys.shape[0] == 1:
            return tuple(t[:, :, places].expand(part.rows, -1, -1, -1) for t in (self.keys, self.values))  # pyright: ignore
        rows = part.trunk_rows.to(self.keys.device)
        return self.keys[:, :, places][rows], self.values[:, :, places][rows]


def _asked_late(part: Part) -> int:
    """How many tokens of each row come before the first that attends."""
    length = (part.tokens.stop - part.tokens.start) // part.rows
    return length - (part.asked.stop - part.asked.start) // part.rows


@dataclass(eq=False)
class PackedLayout:
    """Where the tokens of a packed row stand.

    Attributes:
        positions: Of all tokens.
        parts: The parts, in the order of the packed row.
        trunk: What remembers the keys and values that parts continue; a part that is the trunk fills it.
        queries: Indices of the tokens that attend; None if all do. The others only give keys and values.
        current: The part whose attention is being computed.
    """

    positions: Int[Tensor, "1 token"]
    parts: list[Part]
    trunk: Trunk = field(default_factory=Trunk)
    queries: Int[Tensor, " asking"] | None = None
    current: Part | None = None

    def asking(self, x: Shaped[Tensor, "1 token ..."]) -> Shaped[Tensor, "1 asking ..."]:
        """What belongs to the tokens that attend."""
        return x if self.queries is None else x[:, self.queries.to(x.device)]

    def attended(
        self,
        attend: Attend,
        q: Float[Tensor, "1 head asking d_head"],
        k: Float[Tensor, "1 kv_head token d_head"],
        v: Float[Tensor, "1 kv_head token d_head"],
        chunk: int | None,
    ) -> Float[Tensor, "1 head asking d_head"]:
        """Attention part by part.

        Args:
            attend: Attention of ordinary rows: queries, keys, values, layout, mask.
            q: Queries of the tokens that attend.
            k: Keys of all tokens.
            v: Values of all tokens.
            chunk: Chunk size; keys before the chunk of a part are left out.
        """
        pieces = []
        for part in self.parts:
            self.current = part
            own_q, own_k, own_v = _rows(q, part.asked, part), _rows(k, part.tokens, part), _rows(v, part.tokens, part)
            if part.is_trunk:
                self.trunk.keys, self.trunk.values = own_k, own_v
            if part.past:
                keys, values = self.trunk.before(part, chunk)
                own_k, own_v = torch.cat([keys, own_k], dim=2), torch.cat([values, own_v], dim=2)
            z = attend(own_q, own_k, own_v, part.layout, None)
            pieces.append(rearrange(z, "row head seq d_head -> 1 head (row seq) d_head"))
        self.current = None
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)


def _rows(x: Float[Tensor, "1 head token d"], places: slice, part: Part) -> Float[Tensor, "row head seq d"]:
    return rearrange(x[:, :, places], "1 head (row seq) d -> row head seq d", row=part.rows)
