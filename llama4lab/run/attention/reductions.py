"""What attention comes to, summed while it is computed: the pattern itself, of size seq x seq, never exists.

Memory is that of a block of the pattern, a few numbers for each query and head, and the map of chunks.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llama4lab.model.token_layout import PADDING, TokenLayout
from llama4lab.run.attention.query_block import QueryBlock
from llama4lab.run.attention.targets import KINDS, looked_for, numbers_before

BLOCKS = (256, 512)


@dataclass(eq=False)
class Reductions:
    """Attention of all heads of a layer, summed over keys. Places of padding hold 0.

    The first token is that of the row, or of the packed document. Chunks are numbered as positions count, and only
    those with queries are here.

    Attributes:
        valid: Which places are tokens.
        entropy: Of the attention over keys, in nats.
        first_token: Attention to the first token.
        itself: Attention of each token to its own place.
        own_chunk: Attention to keys of the query's chunk.
        earlier: Attention to keys of earlier chunks.
        chunks: Numbers of the chunks.
        chunk_queries: How many queries each chunk has in all rows.
        chunk_mass: Attention from chunk to chunk, as means over the queries of the chunk; None if it was not asked for.
        edges: Bin i has the keys that are `edges[i]` to `edges[i + 1] - 1` tokens before the query.
        distance_mass: Attention by distance, as means over all queries.
        top_weights: The largest weights of each query, falling; 0 where fewer keys can be seen.
        top_keys: Their keys, as places of the row; -1 where there are fewer.
        on_targets: For each of `KINDS`, attention to its keys: the one right before, those of the same token, those
            that followed the same token. None if it was not asked for.
        has_target: For each of `KINDS`, which queries can see such a key.
    """

    valid: Bool[Tensor, "batch seq"]
    entropy: Float[Tensor, "batch head seq"]
    first_token: Float[Tensor, "batch head seq"]
    itself: Float[Tensor, "batch head seq"]
    own_chunk: Float[Tensor, "batch head seq"]
    earlier: Float[Tensor, "batch head seq"]
    chunks: list[int]
    chunk_queries: Int[Tensor, " chunk"]
    chunk_mass: Float[Tensor, "head query_chunk key_chunk"] | None
    edges: list[int]
    distance_mass: Float[Tensor, "head bin"]
    top_weights: Float[Tensor, "batch head seq rank"]
    top_keys: Int[Tensor, "batch head seq rank"]
    on_targets: Float[Tensor, "kind batch head seq"] | None = None
    has_target: Bool[Tensor, "kind batch seq"] | None = None


@dataclass(frozen=True)
class Wanted:
    """What is to be summed.

    Attributes:
        map_chunk: Chunk size of the sums by chunk; None for one chunk.
        chunk_mass: Whether to sum from chunk to chunk, which takes heads x chunks x chunks numbers.
        top: How many of the largest weights of each query to keep.
        scores: Whether to sum over the keys that the kinds of heads look at; needs the tokens.
        blocks: How many queries and keys are looked at together. The result does not depend on it.
    """

    map_chunk: int | None = None
    chunk_mass: bool = True
    top: int = 0
    scores: bool = True
    blocks: tuple[int, int] = BLOCKS


@torch.no_grad()
def reduced(
    q: Float[Tensor, "batch seq head d_head"],
    k: Float[Tensor, "batch seq kv_head d_head"],
    layout: TokenLayout,
    chunk: int | None,
    wanted: Wanted | None = None,
    *,
    tokens: Int[Tensor, "batch seq"] | None = None,
) -> Reductions:
    """Sums the attention of a layer without building its pattern.

    Args:
        q: Its queries as scores are made of them (`q_rot`).
        k: Its keys (`k_rot`).
        layout: Where the tokens stand, of a pass without cached tokens.
        chunk: Chunk size of the layer, or None if it sees everything before.
        wanted: What to sum.
        tokens: The numbers of the tokens, as `token_numbers` gives them; without them, nothing is known of targets.

    Raises:
        ValueError: if queries, keys and layout are not of the same tokens.
    """
    if q.shape[:2] != k.shape[:2] or layout.past or layout.positions.shape[1] != q.shape[1]:
        raise ValueError(
            f"Queries of {q.shape[1]} tokens, keys of {k.shape[1]} and a layout of {layout.positions.shape[1]} after "
            f"{layout.past} cached ones were given.\nAll three have to be of the same whole pass."
        )
    summing = _Summing(q, k, layout, wanted or Wanted(), tokens)
    for row, places, begins in _segments(layout, chunk, q.shape[0]):
        summing.add(row, places.to(q.device), begins)
    return summing.result()


def _segments(layout: TokenLayout, chunk: int | None, batch: int) -> list[tuple[int, Int[Tensor, " token"], bool]]:
    """Runs of tokens in which attention is causal and that see no others: row, places, whether a document begins."""
    found = []
    for row in range(batch):
        own = min(row, layout.documents.shape[0] - 1), min(row, layout.positions.shape[0] - 1)
        document, position = layout.documents[own[0]].cpu(), layout.positions[own[1]].cpu()
        places = (document != PADDING).nonzero().squeeze(-1)
        if not len(places):
            continue
        document, position = document[places], position[places]
        begins = torch.ones(len(places), dtype=torch.bool)
        begins[1:] = document[1:] != document[:-1]
        borders = begins.clone()
        if chunk is not None:
            borders[1:] |= position[1:] // chunk != position[:-1] // chunk
        starts = borders.nonzero().squeeze(-1).tolist()
        for start, stop in pairwise([*starts, len(places)]):
            found.append((row, places[start:stop], bool(begins[start])))
    return found


class _Summing:
    """The results of a layer while they grow."""

    def __init__(self, q: Tensor, k: Tensor, layout: TokenLayout, wanted: Wanted, numbers: Tensor | None):
        self.q, self.k, self.wanted = q, k, wanted
        batch, seq, heads, _ = q.shape
        wide = torch.promote_types(q.dtype, torch.float32)
        self.valid = layout.query_valid.expand(batch, seq).to(q.device)
        positions = layout.positions.expand(batch, seq).to(q.device)
        label = positions // wanted.map_chunk if wanted.map_chunk else torch.zeros_like(positions)
        chunks, count = label[self.valid].unique(return_counts=True)
        self.label, self.chunks, self.chunk_queries = torch.bucketize(label, chunks), chunks.tolist(), count
        names = ("entropy", "first_token", "itself", "own_chunk", "earlier")
        self.by_query = {name: q.new_zeros(batch, heads, seq, dtype=wide) for name in names}
        self.top_weights = q.new_zeros(batch, heads, seq, wanted.top, dtype=wide)
        self.top_keys = torch.full((batch, heads, seq, wanted.top), -1, device=q.device)
        self.edges = [0, 1]
        while self.edges[-1] < seq:
            self.edges.append(2 * self.edges[-1])
        double = torch.float32 if q.device.type == "mps" else torch.float64
        self.bins = q.new_zeros(heads, len(self.edges) - 1, dtype=double)
        size = len(self.chunks) if wanted.chunk_mass else 0
        self.mass = q.new_zeros(heads, size, size, dtype=double)
        self.held = self.on_targets = self.has_target = None
        if wanted.scores and numbers is not None:
            numbers = numbers.to(q.device)
            self.held = torch.stack([numbers, numbers_before(numbers, layout.documents.to(q.device))])
            self.on_targets = q.new_zeros(len(KINDS), batch, heads, seq, dtype=wide)
            self.has_target = torch.zeros(len(KINDS), batch, seq, dtype=torch.bool, device=q.device)

    def add(self, row: int, tokens: Int[Tensor, " token"], begins: bool) -> None:
        """Adds the queries of one segment."""
        q, k, label = self.q[row], self.k[row], self.label[row, tokens]
        held = None if self.held is None else self.held[:, row, tokens]
        sought = None if held is None else looked_for(held[0])
        query_size, key_size = self.wanted.blocks
        for first in range(0, len(tokens), query_size):
            own = tokens[first : first + query_size]
            stop = first + len(own)
            block = QueryBlock(
                q[own],
                first,
                kv_heads=k.shape[1],
                edges=self.edges,
                top=self.wanted.top,
                looked_for=None if sought is None else sought[first:stop],
            )
            columns = label[:stop] - label[0]
            for start in range(0, stop, key_size):
                keys = slice(start, min(start + key_size, stop))
                numbers = None if held is None else held[:, keys]
                block.see(k[tokens[keys]], start, columns[keys], int(columns[-1]) + 1, numbers)
            self._take(row, tokens, block, label, k[tokens[0]] if begins else None)
            if self.on_targets is not None:
                self._take_targets(row, tokens, block)

    def _take(self, row: int, tokens: Tensor, block: QueryBlock, label: Tensor, first_key: Tensor | None) -> None:
        own, queries = tokens[block.first : block.first + block.count], slice(block.first, block.first + block.count)
        mass, own_label = block.chunk_mass(), label[queries]
        column = own_label - label[0]
        found = {"entropy": block.entropy(), "itself": block.weight(self.k[row, own])}
        found["own_chunk"] = mass.gather(-1, column[None, :, None].expand(mass.shape[0], -1, 1)).squeeze(-1)
        before = torch.arange(mass.shape[-1], device=mass.device) < column[:, None]
        found["earlier"] = (mass * before).sum(-1)
        if first_key is not None:
            found["first_token"] = block.weight(first_key.expand(block.count, -1, -1))
        for name, value in found.items():
            self.by_query[name][row][:, own] = value
        self.bins += block.bin_mass().to(self.bins.dtype).sum(1)
        if self.wanted.chunk_mass:
            columns = slice(int(label[0]), int(label[0]) + mass.shape[-1])
            self.mass[:, :, columns].index_add_(1, own_label, mass.to(self.mass.dtype))
        if self.wanted.top:
            weights, keys = block.top_weights()
            count = weights.shape[-1]
            self.top_weights[row][:, own, :count] = weights
            self.top_keys[row][:, own, :count] = torch.where(keys < 0, -1, tokens[keys.clamp(min=0)])

    def _take_targets(self, row: int, tokens: Tensor, block: QueryBlock) -> None:
        assert self.on_targets is not None
        assert self.has_target is not None
        number = torch.arange(block.first, block.first + block.count, device=tokens.device)
        has_before = number > 0
        before = block.weight(self.k[row, tokens[(number - 1).clamp(min=0)]]) * has_before
        self.on_targets[:, row][..., tokens[number]] = torch.cat([before[None], block.same_mass()])
        self.has_target[:, row][..., tokens[number]] = torch.cat([has_before[None], block.has_same])

    def result(self) -> Reductions:
        mean = self.mass / self.chunk_queries[:, None] if self.wanted.chunk_mass else None
        wide = self.top_weights.dtype
        return Reductions(
            valid=self.valid,
            **self.by_query,
            chunks=self.chunks,
            chunk_queries=self.chunk_queries,
            chunk_mass=None if mean is None else mean.to(wide),
            edges=self.edges,
            distance_mass=(self.bins / self.valid.sum()).to(wide),
            top_weights=self.top_weights,
            top_keys=self.top_keys,
            on_targets=self.on_targets,
            has_target=self.has_target,
        )
