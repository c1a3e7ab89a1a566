"""Attention that works otherwise for a while: other chunks, barred keys, other rotations, other temperatures."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

from torch import Tensor

from llama4lab.model.attention import SelfAttention
from llama4lab.model.config_parts import text_part
from llama4lab.model.facts import facts
from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.model.rope import RotaryEmbedding, frequencies

Layers = int | Sequence[int] | None
FIRST, EARLIER = "first_token", "earlier"
PLAIN = {"rope_type", "rope_theta"}
SCALING = {
    *("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "attention_factor"),
    *("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
}


class AttentionChanges(TypedDict, total=False):
    """The keywords of `edited`; it says what they mean."""

    temperature: bool | int | float | Callable[[Tensor], Tensor]
    chunk: int | None
    bar: str | int | Iterable[int | str]
    rope: bool | Mapping[str, Any]
    qk_norm: bool


@contextmanager
def edited(
    model: HookedPreTrainedModel, *, layers: Layers = None, **changes: Unpack[AttentionChanges]
) -> Iterator[None]:
    """While the block lasts, attention of the chosen layers works otherwise. However it ends, all is as it was.

    For example, what is recalled from far away without the way through layer 7:

        with lab.edited(model, layers=7, bar="earlier"):
            run = lab.record(model, prompt)

    Blocks nest. Recording, patching, sweeps, gradients and generation run under the changes, and the facts of a run
    (`run.meta`) are those of the changed layers. A cache goes on only under the changes that it was filled under; one
    that is made inside the block fits them.

    Args:
        model: The model.
        layers: The layers that are meant; by default, for each change, those that it says something about.
        changes: At least one of these.

            temperature: Whether far queries are sharpened, as the config says; or one factor for the queries of all
                positions (1 changes nothing); or a function of the positions `[batch, seq]`, counted without padding
                from 0, to factors. By default in the layers without RoPE.
            chunk: The chunk size; None lets the layers see everything before. By default in the layers with chunks.
            bar: "earlier": no attention to earlier chunks, of the size that chunked layers have; by default in the
                layers without chunks. Or positions of keys, padding counted as in a prompt, or "first_token", the first
                one of each document, that no token but themselves attends to; by default in the layers without chunks
                too.
            rope: Whether queries and keys are turned by their positions; nothing else about the layer changes. By
                default in all layers that do not yet. Or what is to be different in the `rope_parameters` of the
                config, for example `{"factor": 32.0}`, by default in the layers with RoPE.
            qk_norm: Whether queries and keys are normed. By default in the layers with RoPE.

    Raises:
        TypeError: for a keyword that is not in the list, or a value of a wrong type.
        ValueError: if no change was asked for, one has no meaning for a layer, or no layer is left that it is about.
        IndexError: if there is no such layer.
    """
    text, plan = model.text, _planned(model, layers, changes)
    before: list[tuple[SelfAttention, str, Any]] = []
    edits = {(layer, name): label for layer, name, label in text.edits}
    outer = text.edits
    try:
        for step in plan:
            attention = text.layers[step.layer].self_attn
            old = getattr(attention, step.attribute)
            if old is not step.value and (type(old) is not type(step.value) or old != step.value):
                before.append((attention, step.attribute, old))
                setattr(attention, step.attribute, step.value)
                edits[step.layer, step.attribute] = step.label
        text.edits = tuple((*key, label) for key, label in sorted(edits.items()))
        yield
    finally:
        for attention, attribute, old in reversed(before):
            setattr(attention, attribute, old)
        text.edits = outer


@dataclass(frozen=True, eq=False)
class _Step:
    """A new value of an attribute of a layer's attention; equal labels mean equal values."""

    layer: int
    attribute: str
    value: Any
    label: Any


def _planned(model: HookedPreTrainedModel, layers: Layers, changes: AttentionChanges) -> list[_Step]:
    planners = {"temperature": _temperature, "chunk": _chunk, "bar": _bar, "rope": _rope, "qk_norm": _qk_norm}
    unknown = [name for name in changes if name not in planners]
    if unknown:
        raise TypeError(f"edited does not know {unknown[0]!r}; it takes {', '.join(planners)}.")
    if not changes:
        raise ValueError(f"No change was asked for; edited takes {', '.join(planners)}.")
    if layers is not None and "chunk" in changes and changes.get("bar") == EARLIER:
        raise ValueError(
            'chunk and bar="earlier" both say what the layers see.\nGive one, or put a block into another.'
        )
    chosen = _checked(model, layers)
    steps = [step for name in planners if name in changes for step in planners[name](model, chosen, changes)]
    return steps


def _checked(model: HookedPreTrainedModel, layers: Layers) -> list[int] | None:
    if layers is None:
        return None
    chosen, count = [layers] if isinstance(layers, int) else list(layers), len(model.text.layers)
    wrong = [layer for layer in chosen if not 0 <= layer < count]
    if wrong:
        raise IndexError(f"Layer {wrong[0]} was to be edited; the model has layers 0 to {count - 1}.")
    if not chosen:
        raise ValueError("layers is empty; leave it out for all layers that the change is about.")
    return sorted(set(chosen))


def _meant(
    model: HookedPreTrainedModel, chosen: list[int] | None, about: Callable[[SelfAttention], bool], what: str
) -> list[int]:
    """The chosen layers, or all those that a change is about."""
    meant = [n for n, layer in enumerate(model.text.layers) if about(layer.self_attn)] if chosen is None else chosen
    if not meant:
        raise ValueError(f"{what} has no meaning here: no layer of this model is of that kind.\nName layers=...")
    return meant


def _temperature(model: HookedPreTrainedModel, chosen: list[int] | None, changes: AttentionChanges) -> list[_Step]:
    value = changes.get("temperature")
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = float(value)
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"temperature={value} was asked for; a factor is a finite number from 0 on.")
    elif not isinstance(value, bool) and not callable(value):
        raise TypeError(f"temperature is a {type(value).__name__}; it is True, False, a factor or a function.")
    meant = _meant(model, chosen, lambda attention: not attention.rope, "temperature, which is about NoPE layers,")
    return [_Step(layer, "tuning", value, value) for layer in meant]


def _chunk(model: HookedPreTrainedModel, chosen: list[int] | None, changes: AttentionChanges) -> list[_Step]:
    size = changes.get("chunk")
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
        raise ValueError(f"chunk={size!r} was asked for; it is a whole number from 1 on, or None for full attention.")
    meant = _meant(model, chosen, lambda attention: attention.chunk_size is not None, "chunk, which is about chunks,")
    return [_Step(layer, "chunk_size", size, size) for layer in meant]


def _bar(model: HookedPreTrainedModel, chosen: list[int] | None, changes: AttentionChanges) -> list[_Step]:
    asked = changes.get("bar")
    meant = _meant(model, chosen, lambda attention: attention.chunk_size is None, "bar, which is about full attention,")
    if asked == EARLIER:
        size = changes.get("chunk") or facts(model.config, model.text)["chunk_size"]
        size = size or text_part(model.config).attention_chunk_size
        if size is None:
            raise ValueError('bar="earlier" is about chunks, and this model has none.\nGive a size: chunk=...')
        chunked = [layer for layer in meant if model.text.layers[layer].self_attn.chunk_size is not None]
        if chunked:
            raise ValueError(
                f"Layer {chunked[0]} sees no earlier chunk anyway.\n"
                f"Layers that do: {_unchunked(model) or 'none'}; or change the size by chunk=..."
            )
        return [_Step(layer, "chunk_size", size, size) for layer in meant]
    barred = _barred_keys(asked)
    together = {layer: barred | model.text.layers[layer].self_attn.barred for layer in meant}
    return [_Step(layer, "barred", keys, tuple(sorted(map(str, keys)))) for layer, keys in together.items()]


def _unchunked(model: HookedPreTrainedModel) -> str:
    found = [n for n, layer in enumerate(model.text.layers) if layer.self_attn.chunk_size is None]
    return ", ".join(map(str, found))


def _barred_keys(asked: Any) -> frozenset[int | str]:
    keys = [asked] if isinstance(asked, int | str) else list(asked) if isinstance(asked, Iterable) else [asked]
    for key in keys:
        if key != FIRST and (not isinstance(key, int) or isinstance(key, bool) or key < 0):
            raise ValueError(
                f'bar={key!r} was asked for; it is "earlier", "first_token", or positions of keys, which count from 0.'
            )
    if not keys:
        raise ValueError("bar is empty; name the positions of the keys that nobody shall attend to.")
    return frozenset(keys)


def _rope(model: HookedPreTrainedModel, chosen: list[int] | None, changes: AttentionChanges) -> list[_Step]:
    asked = changes.get("rope")
    if isinstance(asked, bool):
        meant = _meant(model, chosen, lambda attention: attention.rope is not asked, f"rope={asked}")
        return [_Step(layer, "rope", asked, asked) for layer in meant]
    if not isinstance(asked, Mapping):
        raise TypeError(f"rope is a {type(asked).__name__}; it is True, False or a dict of rope_parameters.")
    meant = _meant(model, chosen, lambda attention: attention.rope, "rope, which is about RoPE layers,")
    without = [layer for layer in meant if not model.text.layers[layer].self_attn.rope]
    if without:
        raise ValueError(f"Layer {without[0]} has no RoPE whose parameters could differ.\nSwitch it on by rope=True.")
    rotary = _rotary(model, asked)
    label = tuple(sorted((name, repr(value)) for name, value in asked.items()))
    return [_Step(layer, "rotate", rotary.forward, label) for layer in meant]


def _rotary(model: HookedPreTrainedModel, asked: Mapping[str, Any]) -> RotaryEmbedding:
    """Rotations under changed parameters, checked."""
    config = copy.deepcopy(text_part(model.config))
    parameters: dict[str, Any] = {**dict(config.rope_parameters or {}), **asked}
    kind = parameters.get("rope_type", "default")
    fits = PLAIN if kind == "default" else PLAIN | SCALING
    wrong = [name for name in asked if name not in fits]
    if wrong:
        raise ValueError(
            f"rope has {wrong[0]!r}, which means nothing for rope_type {kind!r}.\n"
            f"That takes {', '.join(sorted(fits))}.\n"
            'A default RoPE is scaled by {"rope_type": "linear", "factor": ...} or another type.'
        )
    config.rope_parameters = parameters
    try:
        frequencies(config)
    except KeyError as problem:
        raise ValueError(f"rope_type {kind!r} needs {problem} too; rope has {', '.join(asked)}.") from problem
    return RotaryEmbedding(config)


def _qk_norm(model: HookedPreTrainedModel, chosen: list[int] | None, changes: AttentionChanges) -> list[_Step]:
    value = changes.get("qk_norm")
    if not isinstance(value, bool):
        raise TypeError(f"qk_norm is a {type(value).__name__}; it is True or False.")
    meant = _meant(model, chosen, lambda attention: attention.rope, "qk_norm, which is about RoPE layers,")
    return [_Step(layer, "qk_norm", value, value) for layer in meant]
