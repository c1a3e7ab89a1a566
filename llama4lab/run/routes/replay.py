"""Routed experts in the places of a prompt or of a pass."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from llama4lab.model.facts import facts
from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.prompt.prompt import Prompt
from llama4lab.run.current_pass import CurrentPass
from llama4lab.run.routes.engine_formats import UNKNOWN
from llama4lab.run.routes.routed_experts import ROUTER, RoutedExperts
from llama4lab.run.run import Run


def run_of_routes(model: HookedPreTrainedModel, prompt: Prompt, routes: RoutedExperts | Sequence[RoutedExperts]) -> Run:
    """Gives a run that holds `router.indices` and nothing else, for tables of loads, flows, drift.

    Positions at which some row has a token with an unknown route, as the last one of an engine's output, are left out.

    Args:
        model: The model.
        prompt: The text, the output included; as many rows as routes.
        routes: The routes of each row.

    Raises:
        ValueError: if the routes are of another text or do not reach to the last token but one.
    """
    routes = [routes] if isinstance(routes, RoutedExperts) else list(routes)
    valid = prompt.attention_mask.bool()
    ordinals = valid.long().cumsum(1) - 1
    _check(routes, ordinals, valid, prompt.input_ids, fill=None)
    layers = sorted(set.intersection(*(set(own.layers) for own in routes)))
    tensors = {f"layers.{layer}.{ROUTER}": placed(routes, layer, ordinals) for layer in layers}
    known = torch.stack([(tensor >= 0).all(-1) for tensor in tensors.values()]).all(0) | ~valid
    positions = known.all(0).nonzero().flatten().tolist()
    if not positions:
        raise ValueError("No position has a known route in every row.")
    # Padding has to hold some expert, which nobody counts.
    tensors = {name: tensor[:, positions].clamp(min=0) for name, tensor in tensors.items()}
    none = torch.zeros(len(prompt), 0, model.text.config.vocab_size)
    shapes = dict.fromkeys(tensors, "batch seq slot")
    return Run(tensors, shapes, none, prompt, facts(model.config, model.text), positions=positions)


def routes_now(
    routes: Sequence[RoutedExperts], layer: int, current: CurrentPass, meant: Bool[Tensor, "batch seq"], fill: list[int]
) -> Int[Tensor, "batch seq slot"]:
    """The routes of the tokens of a pass; -1 where none is known.

    Args:
        routes: The routes of each row.
        layer: The layer.
        current: The pass.
        meant: The tokens whose routes are asked for.
        fill: The token ids that fill up a row whose generation has ended.
    """
    assert current.layout is not None
    valid = (current.layout.documents >= 0).expand(current.shape[0], -1)
    ordinals = (valid.long().cumsum(1) - 1)[:, current.first :].to(meant.device)
    _check(routes, ordinals, meant, current.input_ids, fill)
    return placed(routes, layer, ordinals)


def placed(
    routes: Sequence[RoutedExperts], layer: int, ordinals: Int[Tensor, "batch seq"]
) -> Int[Tensor, "batch seq slot"]:
    """The routes of the tokens with these numbers in each row's text; -1 where there is none."""
    rows = []
    for own, numbers in zip(routes, ordinals.cpu().numpy(), strict=True):
        column = own.experts[:, own.layers.index(layer)].astype(np.int64)
        column = np.concatenate([column, np.full((1, own.top_k), UNKNOWN)])
        rows.append(column[np.where((numbers < 0) | (numbers >= len(own)), len(own), numbers)])
    return torch.from_numpy(np.stack(rows)).to(ordinals.device)


def _check(
    routes: Sequence[RoutedExperts],
    ordinals: Int[Tensor, "batch seq"],
    meant: Bool[Tensor, "batch seq"],
    input_ids: Int[Tensor, "batch seq"] | None,
    fill: list[int] | None,
) -> None:
    """Whether the routes reach far enough, and are of this text where that is known."""
    if len(routes) != len(ordinals):
        raise ValueError(
            f"Routes of {len(routes)} rows were given; the prompt has {len(ordinals)}. Give one for each row."
        )
    for row, own in enumerate(routes):
        numbers, asked = ordinals[row].cpu(), meant[row].cpu()
        ids = None if input_ids is None else input_ids[row].cpu()
        filling = torch.zeros_like(asked) if ids is None or fill is None else torch.isin(ids, torch.tensor(fill))
        # Engines give no route for the last token; it is the only one that may lack.
        beyond = numbers[asked & (numbers > len(own)) & ~filling]
        if len(beyond):
            raise ValueError(
                f"Row {row} has routes for {len(own)} tokens, but its token {int(beyond[0])} was to be routed.\n"
                "Only the last token may lack a route; generate fewer tokens, or choose positions."
            )
        if own.token_ids is None or ids is None:
            continue
        inside = asked & (numbers < len(own)) & (numbers >= 0)
        theirs = torch.as_tensor(own.token_ids.astype(np.int64))[numbers.clamp(0, max(len(own) - 1, 0))]
        other = (inside & (theirs != ids)).nonzero().flatten().tolist()
        if other:
            number = int(numbers[other[0]])
            raise ValueError(
                f"The routes of row {row} are of a text whose token {number} is {int(theirs[other[0]])}; here it is "
                f"{int(ids[other[0]])}.\nRoutes without token_ids can be replayed on any text."
            )
