"""Passes in which layers with experts get the route, the input, or both, that they have in another run."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.prompt.prompt import Prompt
from llama4lab.run.current_pass import following
from llama4lab.run.listening import listening
from llama4lab.run.metrics import BoundMetric

# What of the source run a layer gets: its route, its input, both, or its gates for the experts of the base run.
VARIANTS = ("route", "content", "both", "gate")
TOKENS = 4096  # of one pass


@dataclass(frozen=True, eq=False)
class Observed:
    """What a run does at its layers with experts.

    Attributes:
        embedded: What goes into the first layer.
        inputs: Layer -> what goes into its router and experts.
        scores: Layer -> router logits.
        indices: Layer -> chosen experts.
        gates: Layer -> their gates.
        values: The metric.
    """

    embedded: Float[Tensor, "batch seq d_model"]
    inputs: dict[int, Tensor]
    scores: dict[int, Tensor]
    indices: dict[int, Tensor]
    gates: dict[int, Tensor]
    values: Float[Tensor, " row"]


@dataclass(frozen=True)
class Cell:
    """One change of the base run.

    Attributes:
        variant: What is changed, one of `VARIANTS`.
        layers: In which layers, all at once.
        position: At which position; None for all.
    """

    variant: str
    layers: tuple[int, ...]
    position: int | None


def measured(
    model: HookedPreTrainedModel,
    prompt: Prompt,
    base: Observed,
    source: Observed,
    cells: list[Cell],
    bound: BoundMetric,
) -> Float[Tensor, "cell row"]:
    """The metric of each cell: of the base run with that change.

    Args:
        model: The model.
        prompt: The prompt of the base run.
        base: What the base run does.
        source: What the source run does.
        cells: The changes, as many in one pass as `TOKENS` allows.
        bound: The metric.
    """
    size = max(1, TOKENS // prompt.input_ids.numel())
    parts = [cells[first : first + size] for first in range(0, len(cells), size)]
    return torch.stack([row for part in parts for row in _together(model, prompt, base, source, part, bound)])


def observed(model: HookedPreTrainedModel, prompt: Prompt, layers: list[int], bound: BoundMetric) -> Observed:
    """Runs a prompt and keeps what `measured` needs of it.

    Args:
        model: The model.
        prompt: The prompt.
        layers: Layers with experts.
        bound: The metric for this prompt.
    """
    kept: dict[str, dict[int, Tensor]] = {kind: {} for kind in ("inputs", "logits", "indices", "gates")}
    listeners = {
        f"layers.{layer}.feed_forward.router.{kind}": partial(kept[kind].__setitem__, layer)
        for layer, kind in product(layers, ("logits", "indices", "gates"))
    }
    with (
        following(model) as current,
        listening(model, listeners),
        _entering(model, {layer: partial(kept["inputs"].__setitem__, layer) for layer in layers}),
    ):
        logits = _logits(model, bound.positions, **prompt.to(model.device).inputs())
    values = bound(logits, torch.arange(len(prompt)))
    assert current.embedded is not None
    return Observed(current.embedded, kept["inputs"], kept["logits"], kept["indices"], kept["gates"], values.cpu())


def _logits(
    model: HookedPreTrainedModel, positions: list[int], **inputs: Tensor
) -> Float[Tensor, "row position vocab"]:
    with torch.no_grad():
        kept = torch.tensor(positions, device=model.device)
        return model(**inputs, use_cache=False, logits_to_keep=kept).logits


@contextmanager
def _entering(model: HookedPreTrainedModel, listeners: dict[int, Callable[[Tensor], Tensor | None]]) -> Iterator[None]:
    """Calls a function with what goes into the feed-forward of a layer; what it gives, unless None, replaces that."""

    def hook(listener: Callable[[Tensor], Tensor | None]):
        def before(_module: nn.Module, args: tuple) -> tuple | None:
            new = listener(args[0])
            return None if new is None else (new, *args[1:])

        return before

    with ExitStack() as handles:
        for layer, listener in listeners.items():
            module = model.text.layers[layer].feed_forward
            handles.callback(module.register_forward_pre_hook(hook(listener)).remove)
        yield


def _together(
    model: HookedPreTrainedModel,
    prompt: Prompt,
    base: Observed,
    source: Observed,
    cells: list[Cell],
    bound: BoundMetric,
) -> list[Float[Tensor, " row"]]:
    """The metric of each cell, all of them in one pass: the rows of the first cell, then those of the second, ..."""
    batch = len(prompt)
    inputs, routers = {}, {}
    for layer in sorted({layer for cell in cells for layer in cell.layers}):
        held = _routes(layer, base, source)
        own = [cell if layer in cell.layers else None for cell in cells]
        entering = [cell is not None and cell.variant in ("content", "both") for cell in own]
        changed = _places(own, prompt)
        vectors = source.inputs[layer].repeat(len(cells), 1, 1)
        inputs[layer] = _replacer(changed & torch.tensor(entering).repeat_interleave(batch)[:, None], vectors)
        for kind, choices in held.items():
            new = torch.cat([choices["content" if cell is None else cell.variant] for cell in own])
            routers[f"layers.{layer}.feed_forward.router.{kind}"] = _replacer(changed, new)
    mask = prompt.attention_mask.to(model.device).repeat(len(cells), 1)
    with listening(model, routers), _entering(model, inputs):
        embedded = base.embedded.repeat(len(cells), 1, 1)
        logits = _logits(model, bound.positions, inputs_embeds=embedded, attention_mask=mask)
    return [bound(part, torch.arange(batch)).cpu() for part in logits.split(batch)]


def _routes(layer: int, base: Observed, source: Observed) -> dict[str, dict[str, Shaped[Tensor, "batch seq slot"]]]:
    """Indices and gates of a layer in each variant."""
    kept, other = base.indices[layer], source.indices[layer]
    # The source's gate of an expert that the base chose, whether or not the source chose it, in whichever slot.
    across = torch.sigmoid(source.scores[layer].gather(-1, kept).float()).to(source.gates[layer].dtype)
    return {
        "indices": {"route": other, "content": kept, "both": other, "gate": kept},
        "gates": {
            "route": source.gates[layer],
            "content": base.gates[layer],
            "both": source.gates[layer],
            "gate": across,
        },
    }


def _places(cells: list[Cell | None], prompt: Prompt) -> Bool[Tensor, "row seq"]:
    """Which tokens of the stacked rows are changed."""
    valid, parts = prompt.attention_mask.cpu().bool(), []
    for cell in cells:
        part = torch.zeros_like(valid)
        if cell is not None:
            place = slice(None) if cell.position is None else cell.position
            part[:, place] = valid[:, place]
        parts.append(part)
    return torch.cat(parts)


def _replacer(changed: Bool[Tensor, "row seq"], new: Shaped[Tensor, "row seq x"]) -> Callable[[Tensor], Tensor]:
    return lambda old: torch.where(changed.to(old.device)[..., None], new.to(old.device, old.dtype), old)
