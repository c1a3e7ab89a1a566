"""What the routers did with the tokens of one batch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.run.corpus.batches import MOST_TILES, Batch
from llama4lab.run.listening import listening, silent
from llama4lab.run.unembedding import Unembedding

ROUTER, OUT = "layers.{}.feed_forward.router.{}", "layers.{}.feed_forward.experts.out"


@dataclass(frozen=True, eq=False)
class RoutedTokens:
    """The tokens of a batch without padding, row by row, and what each router did with them. All on one device.

    Attributes:
        ids: The token.
        row: Its row in the batch.
        place: Its number in the row, from 0.
        experts: The experts that it was sent to.
        gates: The factors on their inputs.
        margins: The lowest logit of the chosen experts minus the highest of the others; not finite without others.
        entropies: Of the softmax over the logits, in nats.
        norms: L2 norm of what each chosen expert wrote.
        writes: What each expert wrote, summed over the tokens.
        predicted: The most probable next token; None if it was not asked for.
    """

    ids: Int[Tensor, " token"]
    row: Int[Tensor, " token"]
    place: Int[Tensor, " token"]
    experts: Int[Tensor, "layer token slot"]
    gates: Float[Tensor, "layer token slot"]
    margins: Float[Tensor, "layer token"]
    entropies: Float[Tensor, "layer token"]
    norms: Float[Tensor, "layer token slot"]
    writes: Float[Tensor, "layer expert d_model"]
    predicted: Int[Tensor, " token"] | None


@torch.no_grad()
def routed_tokens(
    model: HookedPreTrainedModel, batch: Batch, layers: list[int], unembedding: Unembedding | None
) -> RoutedTokens:
    """Runs a batch.

    Args:
        model: The model.
        batch: The batch.
        layers: The layers with routers.
        unembedding: To predict the next token of every position; None if nobody asks.
    """
    device = counting_device(model)
    mask = batch.attention_mask.bool()
    places = None if bool(mask.all()) else mask.flatten().nonzero().squeeze(1)
    on: dict[torch.device, Tensor] = {}

    def tokens(tensor: Shaped[Tensor, "batch seq ..."]) -> Shaped[Tensor, "token ..."]:
        flat = tensor.flatten(0, 1)
        if places is None:
            return flat
        if flat.device not in on:
            on[flat.device] = places.to(flat.device)
        return flat[on[flat.device]]

    seen: dict[str, Tensor] = {}
    listeners: dict[str, Callable[[Tensor], None]] = {}
    for layer in layers:
        for part in ("logits", "indices", "gates"):
            listeners[ROUTER.format(layer, part)] = _keeper(seen, ROUTER.format(layer, part), tokens)
        listeners[OUT.format(layer)] = _write_keeper(seen, layer, tokens)
    if unembedding is not None:
        listeners["final_norm"] = _keeper(seen, "final_norm", tokens)
    with listening(model, listeners) as fired:
        model(**_inputs(model, batch), use_cache=False, logits_to_keep=1)
    silent(list(listeners), fired, images=batch.pixel_values is not None)

    def stacked(name: str) -> Shaped[Tensor, "layer token ..."]:
        return torch.stack([seen[name.format(layer)].to(device) for layer in layers])

    experts = stacked(ROUTER.format("{}", "indices")).long()
    margins, entropies = _sureness(stacked(ROUTER.format("{}", "logits")).float(), experts)
    ids, row, place = (tokens(tensor.to(device)) for tensor in (batch.input_ids, *batch.numbers))
    gates = stacked(ROUTER.format("{}", "gates")).float()
    predicted = None if unembedding is None else _predicted(unembedding, seen["final_norm"]).to(device)
    writes = stacked("{} writes").float()
    return RoutedTokens(ids, row, place, experts, gates, margins, entropies, stacked("{} norms"), writes, predicted)


def counting_device(model: HookedPreTrainedModel) -> torch.device:
    """Where counts are kept: with the model, if 64-bit floats exist there."""
    return torch.device("cpu") if model.device.type == "mps" else model.device


def _inputs(model: HookedPreTrainedModel, batch: Batch) -> dict[str, Any]:
    """The arguments of the model. Many images pass the vision tower one after the other, before the text."""
    inputs: dict[str, Any] = batch.inputs(model.device)
    vision = model.vision
    if vision is not None and batch.pixel_values is not None and len(batch.pixel_values) > MOST_TILES:
        encoded = torch.cat([vision(tiles) for tiles in inputs.pop("pixel_values").split(MOST_TILES)])
        inputs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(last_hidden_state=encoded)}
    return inputs


def _keeper(seen: dict[str, Tensor], name: str, tokens: Callable[[Tensor], Tensor]) -> Callable[[Tensor], None]:
    def keep(tensor: Tensor) -> None:
        seen[name] = tokens(tensor)

    return keep


def _write_keeper(seen: dict[str, Tensor], layer: int, tokens: Callable[[Tensor], Tensor]) -> Callable[[Tensor], None]:
    """Reduces what the experts wrote as soon as it is there: it is by far the largest."""

    def keep(tensor: Tensor) -> None:
        out, logits = tokens(tensor).float(), seen[ROUTER.format(layer, "logits")]
        chosen = seen[ROUTER.format(layer, "indices")].flatten().to(out.device)
        seen[f"{layer} norms"] = torch.linalg.vector_norm(out, dim=-1)
        membership = torch.zeros(logits.shape[-1], len(chosen), device=out.device)
        membership.scatter_(0, chosen[None], 1.0)
        seen[f"{layer} writes"] = membership @ out.flatten(0, 1)

    return keep


def _sureness(
    logits: Float[Tensor, "layer token expert"], experts: Int[Tensor, "layer token slot"]
) -> tuple[Float[Tensor, "layer token"], Float[Tensor, "layer token"]]:
    """Margin and entropy."""
    others = logits.scatter(-1, experts, -torch.inf).amax(-1)
    margins = logits.gather(-1, experts).amin(-1) - others
    return margins, torch.special.entr(logits.softmax(-1)).sum(-1)


def _predicted(unembedding: Unembedding, x: Float[Tensor, "token d_model"]) -> Int[Tensor, " token"]:
    """The best next token, a few positions at a time, so that no more logits are ever in memory."""
    chunks = unembedding.chunks(len(x))
    return torch.cat([unembedding.logits(x[chunk], normed=True).argmax(-1) for chunk in chunks])
