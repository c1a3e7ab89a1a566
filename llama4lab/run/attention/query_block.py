"""The attention of a block of queries, while blocks of keys go by: an online softmax and what is summed under it.

Whatever is a sum over keys is one matrix product with the exponentials. The entropy is one too: it is the logarithm of
the normaliser less the mean score, and the mean score is the query times the mean key.
"""

import torch
from einops import rearrange
from jaxtyping import Float, Int, Shaped
from torch import Tensor

SAFE = 30.0  # exponents up to here are left as they are: float32 sums of e^30 are as exact as those of 1
FEW = 32  # fewer than one pair in so many is summed pair by pair


class QueryBlock:
    """Running sums of a block of queries of one segment, inside which attention is causal.

    Attributes:
        shift: What is taken off the scores before exponentials are built.
        sums: Of the exponentials, times the keys (first d_head columns), and by chunk of the keys (the others).
        bins: Of the exponentials, by distance.
        same: Of the exponentials, over the earlier keys that hold what a query looks for: the same token, and what
            followed it.
        has_same: Which queries have such keys.
        best: The largest scores, if they are asked for.
        best_keys: Their keys, as numbers in the segment.
    """

    def __init__(
        self,
        q: Float[Tensor, "query head d_head"],
        first: int,
        *,
        kv_heads: int,
        edges: list[int],
        top: int = 0,
        looked_for: Int[Tensor, " query"] | None = None,
    ):
        """Starts a block.

        Args:
            q: The queries.
            first: Number of the first query in its segment.
            kv_heads: Number of key heads.
            edges: Where bins of distances begin, and where the last one ends.
            top: How many of the largest scores to keep.
            looked_for: The number of the token that each query looks for in `held` keys.
        """
        wide = torch.promote_types(q.dtype, torch.float32)
        self.q = rearrange(q.to(wide) * q.shape[-1] ** -0.5, "query (kv group) d -> kv (group query) d", kv=kv_heads)
        self.first, self.count, self.edges, self.top = first, q.shape[0], edges, top
        self.order = torch.arange(first, first + self.count, device=q.device).repeat(q.shape[1] // kv_heads)
        self.bins = self.q.new_zeros(*self.q.shape[:2], len(edges) - 1)
        self.best = self.q.new_empty(*self.q.shape[:2], 0)
        self.best_keys = torch.empty_like(self.best, dtype=torch.long)
        self.looked_for = looked_for
        self.same = self.q.new_zeros(2, *self.q.shape[:2])
        self.has_same = torch.zeros(2, self.count, dtype=torch.bool, device=q.device)
        self.shift = self.sums = self.q[:, :, :0]

    def see(
        self,
        k: Float[Tensor, "key kv_head d_head"],
        first: int,
        columns: Int[Tensor, " key"],
        num_columns: int,
        held: Int[Tensor, "2 key"] | None = None,
    ) -> None:
        """Takes in a block of keys; the first one has to hold the first key of the segment, which all queries see.

        Args:
            k: The keys.
            first: Number of the first key in the segment.
            columns: The chunk of each key, counted from that of the first key of the segment.
            num_columns: Number of chunks up to that of the last query.
            held: The numbers of the tokens of the keys, and of the tokens before them; needs `looked_for`.
        """
        k = rearrange(k.to(self.q.dtype), "key kv d -> kv key d")
        width, start = k.shape[-1], int(columns[0])
        if first == 0:
            self.sums = self.q.new_zeros(*self.q.shape[:2], width + num_columns)
        scores = self._shifted_scores(k, first)
        if self.top:
            self._keep_best(scores, first)
        weights = scores.exp_()
        chunk = torch.nn.functional.one_hot(columns - start, int(columns[-1]) - start + 1).to(k.dtype)
        added = torch.bmm(weights, torch.cat([k, chunk.expand(k.shape[0], -1, -1)], dim=-1))
        self.sums[..., :width] += added[..., :width]
        self.sums[..., width + start : width + start + chunk.shape[-1]] += added[..., width:]
        self._add_to_bins(weights, added[..., width:].sum(-1), first)
        if held is not None:
            self._add_to_same(weights, held, first)

    def chunk_mass(self) -> Float[Tensor, "head query chunk"]:
        """Attention by chunk of the keys, from the chunk of the first key of the segment on."""
        sums = self.sums[..., self.q.shape[-1] :]
        return self._by_head(sums / sums.sum(-1, keepdim=True))

    def bin_mass(self) -> Float[Tensor, "head query bin"]:
        """Attention by distance."""
        return self._by_head(self.bins / self._total())

    def entropy(self) -> Float[Tensor, "head query"]:
        """Entropy of the attention, in nats."""
        # Both terms may be far larger than what is left of them, so the difference is taken in float64.
        wide = torch.float32 if self.q.device.type == "mps" else torch.float64
        total = self._total().to(wide)
        mean_key = self.sums[..., : self.q.shape[-1]].to(wide) / total
        below = self.shift.to(wide) - (self.q.to(wide) * mean_key).sum(-1, keepdim=True)
        return self._by_head((below + total.log()).to(self.q.dtype)).squeeze(-1).clamp(min=0)

    def weight(self, k: Float[Tensor, "query kv_head d_head"]) -> Float[Tensor, "head query"]:
        """Attention of each query to one key."""
        k = rearrange(k.to(self.q.dtype), "query kv d -> kv query d").repeat(1, self.q.shape[1] // self.count, 1)
        score = (self.q * k).sum(-1, keepdim=True)
        return self._by_head((score - self._log_normaliser()).exp()).squeeze(-1).clamp(max=1)

    def same_mass(self) -> Float[Tensor, "2 head query"]:
        """Attention to earlier keys of the same token, and to those that followed it."""
        return torch.stack([self._by_head(same[..., None] / self._total()).squeeze(-1) for same in self.same])

    def top_weights(self) -> tuple[Float[Tensor, "head query rank"], Int[Tensor, "head query rank"]]:
        """The largest weights, falling, and their keys, as numbers in the segment; 0 and -1 where there are fewer."""
        weights = (self.best - self._log_normaliser()).exp()
        return self._by_head(weights), self._by_head(self.best_keys.masked_fill(self.best == -torch.inf, -1))

    def _total(self) -> Float[Tensor, "kv_head row 1"]:
        return self.sums[..., self.q.shape[-1] :].sum(-1, keepdim=True)

    def _log_normaliser(self) -> Float[Tensor, "kv_head row 1"]:
        return self.shift + self._total().log()

    def _keep_best(self, scores: Float[Tensor, "kv_head row key"], first: int) -> None:
        best, keys = scores.topk(min(self.top, scores.shape[-1]), dim=-1)
        best, keys = torch.cat([self.best, best + self.shift], -1), torch.cat([self.best_keys, keys + first], -1)
        self.best, places = best.topk(min(self.top, best.shape[-1]), dim=-1)
        self.best_keys = keys.gather(-1, places)

    def _shifted_scores(self, k: Float[Tensor, "kv_head key d_head"], first: int) -> Float[Tensor, "kv_head row key"]:
        if first == 0:
            scores = self._masked(torch.bmm(self.q, k.mT), first)
            self.shift = scores.amax(-1, keepdim=True)
            return scores.sub_(self.shift)
        scores = self._masked(torch.baddbmm(-self.shift, self.q, k.mT), first)
        if scores.amax() > SAFE:
            rise = scores.amax(-1, keepdim=True).clamp(min=0)
            self.shift = self.shift + rise
            self.sums *= (-rise).exp()
            self.bins *= (-rise).exp()
            self.same *= (-rise).exp().squeeze(-1)
            scores.sub_(rise)
        return scores

    def _masked(self, scores: Float[Tensor, "kv_head row key"], first: int) -> Float[Tensor, "kv_head row key"]:
        stop = first + scores.shape[-1]
        if stop - 1 <= self.first:
            return scores
        later = torch.arange(first, stop, device=scores.device) > self.order[:, None]
        return scores.masked_fill_(later, -torch.inf)

    def _add_to_bins(
        self, weights: Float[Tensor, "kv_head row key"], total: Float[Tensor, "kv_head row"], first: int
    ) -> None:
        stop = first + weights.shape[-1]
        nearest, farthest = max(self.first - stop + 1, 0), self.first + self.count - 1 - first
        reached = [
            number
            for number in range(len(self.edges) - 1)
            if self.edges[number] <= farthest and self.edges[number + 1] > nearest
        ]
        if len(reached) == 1:
            self.bins[..., reached[0]] += total
            return
        before = torch.nn.functional.pad(weights.cumsum(-1), (1, 0))
        edges = torch.tensor([self.edges[number] for number in [*reached, reached[-1] + 1]], device=weights.device)
        # Keys nearer than an edge come after this one; a sum between two edges is a difference of running sums.
        place = (self.order[:, None] - edges + 1 - first).clamp(0, weights.shape[-1])
        nearer = before.gather(-1, place.expand(weights.shape[0], -1, -1))
        self.bins[..., reached] += (nearer[..., :-1] - nearer[..., 1:]).clamp(min=0)

    def _add_to_same(self, weights: Float[Tensor, "kv_head row key"], held: Int[Tensor, "2 key"], first: int) -> None:
        assert self.looked_for is not None
        weights = weights.unflatten(1, (-1, self.count))
        order = torch.arange(max(weights.shape[-1], self.count), device=weights.device)
        earlier = order[: weights.shape[-1]] + first < order[: self.count, None] + self.first
        for which, numbers in enumerate(held):
            wanted = (self.looked_for[:, None] == numbers) & earlier
            same = self.same[which].unflatten(1, (-1, self.count))
            query, key = wanted.nonzero(as_tuple=True)
            if len(query) * FEW > wanted.numel():
                same += torch.einsum("hgqk,qk->hgq", weights, wanted.to(weights.dtype))
            else:
                same.index_add_(2, query, weights[:, :, query, key])
            self.has_same[which] |= wanted.any(-1)

    def _by_head(self, tensor: Shaped[Tensor, "kv_head row column"]) -> Shaped[Tensor, "head query column"]:
        return tensor.unflatten(1, (-1, self.count)).flatten(0, 1)
