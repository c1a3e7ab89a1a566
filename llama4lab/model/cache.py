"""The cache of keys and values: chunked layers keep at most one chunk, NoPE layers keep everything."""

from collections.abc import Sequence
from typing import Any, cast

from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache, DynamicCache, Llama4TextConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from llama4lab.model.layer_kinds import is_chunked
from llama4lab.model.token_layout import TokenLayout


class ChunkedLayerCache(DynamicSlidingWindowLayer):
    """Keeps the last `chunk - 1` tokens, which is all that a later token of the same chunk can see."""

    keys: Tensor | None
    values: Tensor | None

    def update(
        self,
        key_states: Float[Tensor, "batch kv_head seq d"],
        value_states: Float[Tensor, "batch kv_head seq d"],
        *_,
        **__,
    ) -> tuple[Float[Tensor, "batch kv_head key d"], Float[Tensor, "batch kv_head key d"]]:
        """Gives the kept keys and values followed by the new ones, and keeps the end of them."""
        keys, values = super().update(key_states, value_states)
        if self.sliding_window == 1 and not self.record_past:
            # A slice from -0 would keep everything instead of nothing.
            self._keep(slice(0))
        if self.keys is not None and self.keys.untyped_storage().nbytes() > 2 * self.keys.nbytes:
            # What is kept of a long prompt is a view of all of it, which would stay in memory until the next token.
            self.keys, self.values = self.keys.clone(), None if self.values is None else self.values.clone()
        return keys, values

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens (a negative number, as everywhere in transformers).

        Raises:
            ValueError: if tokens of the chunk that would become the last one are gone already.
        """
        removed, kept = abs(tokens_to_remove), 0 if self.keys is None else self.keys.shape[-2]
        total = self.cumulative_length - removed
        if self.record_past or self.cumulative_length < self.sliding_window:
            super().crop(tokens_to_remove)
        elif removed and total % self.sliding_window > kept - removed:
            raise ValueError(
                f"The cache cannot go back {removed} of {self.cumulative_length} tokens: it keeps the last {kept}, and "
                f"the chunk of token {total} begins earlier.\nCall cache.activate_past_recording() first, or run again."
            )
        elif removed:
            self._keep(slice(-removed))
            self.cumulative_length = total

    def _keep(self, places: slice) -> None:
        assert self.keys is not None
        assert self.values is not None
        self.keys, self.values = self.keys[:, :, places], self.values[:, :, places]


class KeyValueCache(DynamicCache):
    """Keys and values of all layers, and where their tokens stand.

    Attributes:
        token_layout: The layout of the cached tokens, as the model wrote it; it follows every edit of the cache.
    """

    token_layout: TokenLayout | None = None

    def reorder_cache(self, beam_idx: Int[Tensor, " row"]) -> None:
        """Puts the rows into another order."""
        super().reorder_cache(cast(Any, beam_idx))
        self._select(beam_idx)

    def batch_select_indices(self, indices: Int[Tensor, " row"]) -> None:
        """Keeps some rows."""
        super().batch_select_indices(indices)
        self._select(indices)

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Forgets the last tokens, or, if a layer cannot, none."""
        before = [(layer, dict(vars(layer))) for layer in self.layers]
        try:
            super().crop(*args, **kwargs)
        except (ValueError, RuntimeError):
            for layer, state in before:
                vars(layer).update(state)
            raise

    def reset(self) -> None:
        """Empties the cache."""
        super().reset()
        self.token_layout = None

    def _select(self, rows: Tensor) -> None:
        if self.token_layout is not None:
            self.token_layout = self.token_layout.selected(rows)


def new_cache(
    config: Llama4TextConfig, *, chunks: Sequence[int | None] | None = None, offloading: bool = False
) -> KeyValueCache:
    """An empty cache for a model of this config; works without a chunk size too, unlike transformers' own.

    Args:
        config: Of the text model.
        chunks: The chunk size of each layer, None for full attention; by default as the config says.
        offloading: Whether layers wait in RAM until they are used.
    """
    cache = KeyValueCache(offloading=offloading)
    if chunks is None:
        numbers = range(config.num_hidden_layers)
        chunks = [config.attention_chunk_size if is_chunked(config, layer) else None for layer in numbers]
    layers = [DynamicLayer() if chunk is None else ChunkedLayerCache(sliding_window=chunk) for chunk in chunks]
    cache.layers = cast(Any, layers)
    cache.layer_class_to_replicate = None
    return cache


def check_room(cache: Cache, total: int) -> None:
    """Refuses a static cache that has fewer places than there are tokens.

    Args:
        cache: Any cache. Layers that keep one chunk have room for any number of tokens.
        total: How many tokens are in it after this pass.

    Raises:
        ValueError: if it is too short.
    """
    rooms = [layer.max_cache_len for layer in cache.layers if isinstance(layer, StaticLayer) and not layer.is_sliding]
    if rooms and total > min(rooms):
        raise ValueError(
            f"The static cache has room for {min(rooms)} tokens; with this pass there are {total}.\n"
            f"Make a longer one: StaticCache(config=model.config, max_cache_len={total})."
        )
