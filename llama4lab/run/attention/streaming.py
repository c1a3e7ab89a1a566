"""Attention of many layers, summed over keys: from recorded queries and keys, or while a model runs."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llama4lab.model.facts import chunk_sizes, facts
from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.model.token_layout import TokenLayout, token_layout
from llama4lab.prompt.prompt import Prompt
from llama4lab.run.attention.reductions import Reductions, Wanted, reduced
from llama4lab.run.attention.targets import token_numbers
from llama4lab.run.listening import listening, silent
from llama4lab.run.recording import as_prompt
from llama4lab.run.run import Run

Q_ROT, K_ROT = "self_attn.q_rot", "self_attn.k_rot"


@dataclass(eq=False)
class AttentionStream:
    """What attention comes to in each layer.

    Attributes:
        layers: Layer -> its sums. In every layer, chunks are those of the chunked layers.
        prompt: What was run.
        meta: Facts about the model; see `llama4lab.model.facts`.
        rows: The row of the prompt that each batch row comes from.
    """

    layers: dict[int, Reductions]
    prompt: Prompt
    meta: dict[str, Any]
    rows: list[int]


def attention_stream(
    model: HookedPreTrainedModel, prompt: Any, layers: Iterable[int] | None = None, *, wanted: Wanted | None = None
) -> AttentionStream:
    """Runs a prompt and sums the attention of each layer as soon as its queries and keys are there.

    Neither patterns nor queries and keys of several layers are kept, nor logits. Interventions that are active act here
    as in any run.

    Args:
        model: The model.
        prompt: A `Prompt`, or anything that `model.prompt` takes.
        layers: The layers; all by default.
        wanted: What to sum; its chunk size is always that of the model.

    Raises:
        ValueError: if there is no such layer, none was asked for, or single keys are barred in one.
    """
    prompt = as_prompt(model, prompt)
    meta = facts(model.config, model.text)
    chosen = _checked(range(meta["num_layers"]) if layers is None else layers, meta["num_layers"])
    _check_bars(meta, chosen)
    wanted = _for_model(wanted, meta)
    rows, length = list(range(len(prompt))), prompt.input_ids.shape[1]
    layout, tokens = _layout(prompt, rows, length), token_numbers(prompt, rows, length)
    queries: dict[int, Tensor] = {}
    found: dict[int, Reductions] = {}

    def keeper(layer: int) -> Callable[[Tensor], None]:
        def keep(tensor: Tensor) -> None:
            queries[layer] = tensor

        return keep

    def reducer(layer: int) -> Callable[[Tensor], None]:
        def reduce(tensor: Tensor) -> None:
            chunk = model.text.layers[layer].self_attn.chunk_size  # as it is now, should somebody have changed it
            found[layer] = reduced(queries.pop(layer), tensor, layout, chunk, wanted, tokens=tokens)

        return reduce

    names = {layer: (f"layers.{layer}.{Q_ROT}", f"layers.{layer}.{K_ROT}") for layer in chosen}
    listeners = {names[layer][0]: keeper(layer) for layer in chosen}
    listeners |= {names[layer][1]: reducer(layer) for layer in chosen}
    with torch.no_grad(), listening(model, listeners) as fired:
        model(**prompt.to(model.device).inputs(), use_cache=False, logits_to_keep=1)
    silent(list(listeners), fired, images=prompt.pixel_values is not None)
    return AttentionStream({layer: found[layer] for layer in chosen}, prompt, meta, rows)


def recorded_stream(run: Run, layers: Iterable[int] | None = None, *, wanted: Wanted | None = None) -> AttentionStream:
    """Sums the attention of a run from its recorded queries and keys.

    Args:
        run: A run with `layers.*.self_attn.q_rot` and `layers.*.self_attn.k_rot`. It may be cut to some rows, and to
            its first positions.
        layers: The layers; all that were recorded by default.
        wanted: What to sum; its chunk size is always that of the model.

    Raises:
        KeyError: if queries or keys of a layer were not recorded.
        ValueError: if positions before others were cut away, so that nothing is known of their keys; or single keys
            were barred in a layer.
    """
    if run.positions != list(range(len(run.positions))):
        raise ValueError(
            f"The run was cut to positions {', '.join(map(str, run.positions[:4]))}, ...; attention needs the keys of "
            "all positions before.\nSum the whole run, or cut only its end."
        )
    recorded = run.layers(Q_ROT)
    chosen = _checked(recorded if layers is None else layers, run.meta["num_layers"])
    _check_bars(run.meta, chosen)
    layout = _layout(run.prompt, run.rows, len(run.positions))
    tokens = token_numbers(run.prompt, run.rows, len(run.positions))
    wanted = _for_model(wanted, run.meta)
    found = {}
    for layer in chosen:
        q, k = run[f"layers.{layer}.{Q_ROT}"].detach(), run[f"layers.{layer}.{K_ROT}"].detach()
        found[layer] = reduced(q, k, layout, chunk_sizes(run.meta)[layer], wanted, tokens=tokens)
    return AttentionStream(found, run.prompt, run.meta, run.rows)


def _check_bars(meta: dict[str, Any], layers: list[int]) -> None:
    barred = sorted(set(layers) & set(meta.get("barred_layers", [])))
    if barred:
        raise ValueError(
            f"Layer {barred[0]} bars single keys, which a stream cannot follow.\nRecord its pattern instead."
        )


def _layout(prompt: Prompt, rows: list[int], length: int) -> TokenLayout:
    mask = prompt.attention_mask.cpu()[rows, :length]
    return token_layout((len(rows), length), mask.device, attention_mask=mask)


def _for_model(wanted: Wanted | None, meta: dict[str, Any]) -> Wanted:
    return replace(wanted or Wanted(), map_chunk=meta["chunk_size"])


def _checked(layers: Iterable[int], count: int) -> list[int]:
    chosen = list(dict.fromkeys(layers))
    if not chosen:
        raise ValueError(f"No layer was asked for; the model has layers 0 to {count - 1}.")
    wrong = [layer for layer in chosen if not 0 <= layer < count]
    if wrong:
        raise ValueError(f"Layer {wrong[0]} was asked for; the model has layers 0 to {count - 1}.")
    return chosen
