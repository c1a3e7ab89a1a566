"""The keywords of `rerouted`, read and checked as a whole: which layers, which rules, what excludes what."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor

from llama4lab.model.facts import facts
from llama4lab.model.moe import MixtureOfExperts, Router
from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.run.routes.changes import Gate, LayerChange, RouteChanges, as_list, layer_change
from llama4lab.run.routes.routed_experts import RoutedExperts
from llama4lab.run.run import Run

SELECTIONS = ("force", "swap", "replay")


@dataclass(frozen=True, eq=False)
class RoutePlan:
    """All that `rerouted` was asked for.

    Attributes:
        layers: Layer -> the change of its choice.
        gate: The rule of the gates; "held" for those of a replayed run.
        only: What writes, or None for both.
        replay: The run whose choices are repeated, or routes for each row; None for neither.
        fill: The token ids with which generation fills up rows that have ended.
    """

    layers: dict[int, LayerChange]
    gate: Gate
    only: str | None
    replay: Run | list[RoutedExperts] | None
    fill: list[int]


def planned_changes(
    model: HookedPreTrainedModel, layers: int | Sequence[int] | None, changes: RouteChanges
) -> RoutePlan:
    """Reads and checks what was asked for.

    Args:
        model: The model.
        layers: The layers that are meant, or None.
        changes: The keywords of `rerouted`.

    Raises:
        TypeError: for an unknown keyword.
        ValueError: for changes that have no meaning, for this model or together.
    """
    known = facts(model.config)
    asked: dict[str, Any] = {name: value for name, value in changes.items() if value is not None}
    names = list(RouteChanges.__annotations__)
    unknown = [name for name in asked if name not in names]
    if unknown:
        raise TypeError(f"rerouted does not know {unknown[0]!r}; it takes {', '.join(names)}.")
    if not asked:
        raise ValueError(f"No change was asked for; rerouted takes {', '.join(names)}.")
    _check_together(asked)
    _check_rules(asked)
    replay = _replay(asked, known)
    chosen = _layers(layers, asked, replay, known["moe_layers"])
    plans = {}
    for layer in chosen:
        slots = _slots(asked, router_of(model, layer).top_k, layer, replay)
        plans[layer] = layer_change(asked, layer, slots, known["num_experts"])
    held = isinstance(replay, Run) and all(router_name(layer, "gates") in replay for layer in chosen)
    gate = asked.get("gate", "held" if held else "own")
    return RoutePlan(plans, gate, asked.get("only"), replay, _fill(model))


def router_name(layer: int, point: str) -> str:
    """The name of a hook point of a router."""
    return f"layers.{layer}.feed_forward.router.{point}"


def router_of(model: HookedPreTrainedModel, layer: int) -> Router:
    """The router of a layer that has one."""
    return cast(MixtureOfExperts, model.text.layers[layer].feed_forward).router


def _check_together(asked: Mapping[str, Any]) -> None:
    """Whether each change leaves room for the others."""
    first = next((name for name in SELECTIONS if name in asked), None)
    if first is None:
        return
    others = [name for name in (*SELECTIONS, "ban", "prefer") if name in asked and name != first]
    force = asked.get("force")
    whole = any(isinstance(value, Tensor) for value in (force.values() if isinstance(force, Mapping) else [force]))
    if first == "force" and not whole:  # the slots behind the forced ones are still to be given
        others = [name for name in others if name in SELECTIONS]
    if first == "replay" and "top_k" in asked:
        others.append("top_k")
    if others:
        raise ValueError(
            f"{first} and {others[0]} were asked for together, but {first} alone says which experts are chosen.\n"
            "Put one block into another: the inner one changes what the outer one chose."
        )


def _check_rules(asked: Mapping[str, Any]) -> None:
    gate = asked.get("gate", "own")
    if isinstance(gate, str) and gate not in ("own", "original"):
        raise ValueError(f"gate={gate!r} was asked for; it is 'own', 'original', a number or a function of the gates.")
    if isinstance(gate, int | float) and not (math.isfinite(gate) and gate >= 0):
        raise ValueError(f"gate={gate} was asked for; a gate is a number from 0 to 1, or beyond, but not below 0.")
    if not (isinstance(gate, str | int | float) or callable(gate)):
        raise ValueError(f"gate is of type {type(gate).__name__}; it is a word, a number or a function of the gates.")
    if asked.get("only") not in (None, "shared", "routed"):
        raise ValueError(f"only={asked['only']!r} was asked for; it is 'shared' or 'routed'.")


def _replay(asked: Mapping[str, Any], known: Mapping[str, Any]) -> Run | list[RoutedExperts] | None:
    replay = asked.get("replay")
    if replay is None or isinstance(replay, Run):
        return replay
    listed = [replay] if isinstance(replay, RoutedExperts) else list(replay)
    if not listed or not all(isinstance(routes, RoutedExperts) for routes in listed):
        raise ValueError("replay takes a Run, a RoutedExperts, or a list of RoutedExperts, one for each row.")
    for routes in listed:
        if (routes.num_layers, routes.num_experts) != (known["num_layers"], known["num_experts"]):
            raise ValueError(
                f"The routes are of a model of {routes.num_layers} layers and {routes.num_experts} experts; this one "
                f"has {known['num_layers']} and {known['num_experts']}."
            )
    return listed


def _layers(
    layers: int | Sequence[int] | None,
    asked: Mapping[str, Any],
    replay: Run | list[RoutedExperts] | None,
    known: list[int],
) -> list[int]:
    """The layers that are meant: those given, else those that a mapping or routes name, else all with a router."""
    named = {int(layer) for name in ("ban", "force") if isinstance(asked.get(name), Mapping) for layer in asked[name]}
    traced = set(known)
    if isinstance(replay, list):
        traced &= set.intersection(*(set(routes.layers) for routes in replay))
    chosen = sorted(named or traced) if layers is None else as_list(layers)
    wrong = [layer for layer in (*chosen, *named) if layer not in known]
    if wrong or not chosen:
        raise ValueError(
            f"Tokens were to be rerouted in layer {wrong[0] if wrong else 'none'}; the layers with a router are "
            f"{', '.join(map(str, known)) or 'none'}."
        )
    outside = [layer for layer in named if layer not in chosen]
    if outside:
        raise ValueError(f"A change names layer {outside[0]}, but layers={chosen} leaves it out.")
    lost = [layer for layer in chosen if layer not in traced]
    if lost:
        raise ValueError(f"Layer {lost[0]} was to be replayed, but the routes are of layers {sorted(traced)}.")
    return chosen


def _slots(asked: Mapping[str, Any], now: int, layer: int, replay: Run | list[RoutedExperts] | None) -> int:
    """How many experts a token gets."""
    if isinstance(replay, Run):
        name = router_name(layer, "indices")
        return replay[name].shape[-1] if name in replay else now
    if replay is not None:
        widths = {routes.top_k for routes in replay}
        if len(widths) > 1:
            raise ValueError(f"The routes of the rows have {sorted(widths)} experts a token; give all the same number.")
        return widths.pop()
    return int(asked.get("top_k", now))


def _fill(model: HookedPreTrainedModel) -> list[int]:
    options = model.generation_config
    ids = options.eos_token_id if options.pad_token_id is None else options.pad_token_id
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
