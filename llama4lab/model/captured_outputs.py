"""What transformers' `output_attentions`, `output_hidden_states` and `output_router_logits` ask for."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from llama4lab.model.hook_point import HookPoint
from llama4lab.model.moe import MixtureOfExperts
from llama4lab.model.text import TextModel


@contextmanager
def captured(text: TextModel, wanted: Mapping[str, bool]) -> Iterator[dict[str, Any]]:
    """Collects outputs with hooks that live as long as the block.

    They are set after every hook of the user, so they see what the user made of a tensor; and because they listen to
    the patterns, those are computed whichever attention kernel is set.

    Args:
        text: The text stack that will run.
        wanted: Which of "attentions", "hidden_states" and "router_logits" to collect.

    Yields:
        A dict that is filled when the block ends: tuples with an entry a layer (and, for the hidden states, the normed
        output behind), and `{layer: [batch, seq, expert]}` for the router logits.
    """
    seen: dict[str, dict[int | str, Tensor]] = {name: {} for name, asked in wanted.items() if asked}
    handles = [
        point.register_forward_hook(partial(_keep, seen[kind], key))
        for kind, key, point in (_points(text) if seen else ())
        if kind in seen
    ]
    result: dict[str, Any] = {}
    try:
        yield result
    finally:
        for handle in handles:
            handle.remove()
    for kind, tensors in seen.items():
        result[kind] = dict(tensors) if kind == "router_logits" else tuple(tensors.values())


def _points(text: TextModel) -> Iterator[tuple[str, int | str, HookPoint]]:
    for index, layer in enumerate(text.layers):
        yield "attentions", index, layer.self_attn.pattern
        yield "hidden_states", index, layer.resid_pre
        if isinstance(layer.feed_forward, MixtureOfExperts):
            yield "router_logits", index, layer.feed_forward.router.logits
    yield "hidden_states", "final_norm", text.final_norm


def _keep(store: dict[int | str, Tensor], key: int | str, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
    store[key] = output
