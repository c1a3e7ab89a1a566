"""What `rerouted` can be asked for, and what that means for the choice of one router."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor

from llama4lab.run.routes.routed_experts import RoutedExperts
from llama4lab.run.run import Run

Experts = int | Iterable[int]
Gate = str | float | int | Callable[[Tensor], Tensor]


class RouteChanges(TypedDict, total=False):
    """The keywords of `rerouted`; its docstring says what each does."""

    ban: Experts | Mapping[int, Experts]
    prefer: Experts | Mapping[int, float | int]
    force: Experts | Tensor | Mapping[int, Experts | Tensor]
    swap: Sequence[int] | Mapping[int, int]
    top_k: int
    gate: Gate
    only: Literal["shared", "routed"]
    replay: Run | RoutedExperts | Sequence[RoutedExperts]


@dataclass(frozen=True, eq=False)
class LayerChange:
    """What happens to the choice of one router.

    Attributes:
        slots: How many experts a token gets.
        barred: Experts that are never chosen.
        preferred: Experts that come before all others.
        biases: Expert -> what is added to its logit, for the choice only.
        forced: Experts of the first slots, or of every slot of the prompt's tokens.
        swapped: Expert -> the one that is used in its place.
    """

    slots: int
    barred: list[int] = field(default_factory=list)
    preferred: list[int] = field(default_factory=list)
    biases: dict[int, float] = field(default_factory=dict)
    forced: list[int] | Tensor | None = None
    swapped: dict[int, int] = field(default_factory=dict)

    @property
    def reorders(self) -> bool:
        """Whether the choice has to be made anew from how the experts stand."""
        return bool(self.barred or self.preferred or self.biases)


def layer_change(asked: Mapping[str, Any], layer: int, slots: int, num_experts: int) -> LayerChange:
    """Reads and checks what was asked for of one layer.

    Args:
        asked: The keywords of `rerouted`.
        layer: The layer.
        slots: How many experts a token gets.
        num_experts: How many there are.

    Raises:
        ValueError: for what has no meaning in this layer.
    """
    if not 1 <= slots <= num_experts:
        raise ValueError(f"top_k={slots} was asked for; the model has {num_experts} experts, so 1 to {num_experts}.")
    barred = _listed("ban", _of_layer(asked.get("ban", []), layer, []), num_experts)
    if num_experts - len(barred) < slots:
        raise ValueError(
            f"{len(barred)} of {num_experts} experts were banned in layer {layer}, but a token goes to {slots}.\n"
            f'Ban at most {num_experts - slots}, or silence all routed experts by only="shared".'
        )
    prefer = asked.get("prefer", [])
    preferred = _listed("prefer", list(prefer) if isinstance(prefer, Mapping) else prefer, num_experts)
    biases = {int(expert): float(bias) for expert, bias in prefer.items()} if isinstance(prefer, Mapping) else {}
    if not all(math.isfinite(bias) for bias in biases.values()):
        raise ValueError(f"prefer={prefer} was asked for; biases are finite numbers, added to the logits.")
    forced = _forced(_of_layer(asked.get("force"), layer, None), slots, num_experts)
    for name, others in (("preferred", preferred), ("forced", forced if isinstance(forced, list) else [])):
        both = sorted(set(barred).intersection(others))
        if both:
            raise ValueError(f"Expert {both[0]} of layer {layer} was to be both banned and {name}.")
    swapped = _swapped(asked.get("swap", {}), slots, num_experts)
    return LayerChange(slots, barred, [] if biases else preferred, biases, forced, swapped)


def as_list(value: Any) -> list[int]:
    """One whole number, of Python or numpy, or several."""
    return [int(value)] if isinstance(value, Integral) else [int(each) for each in value]


def _of_layer(value: Any, layer: int, default: Any) -> Any:
    return value.get(layer, default) if isinstance(value, Mapping) else value


def _listed(name: str, experts: Any, num_experts: int) -> list[int]:
    listed = as_list(experts)
    wrong = [expert for expert in listed if not 0 <= expert < num_experts]
    if wrong:
        raise ValueError(f"{name} holds expert {wrong[0]}; the model has experts 0 to {num_experts - 1}.")
    if len(set(listed)) < len(listed):
        raise ValueError(f"{name}={listed} names an expert twice.")
    return listed


def _forced(force: Any, slots: int, num_experts: int) -> list[int] | Tensor | None:
    if force is None:
        return None
    if not isinstance(force, Tensor):
        listed = _listed("force", force, num_experts)
        if not 1 <= len(listed) <= slots:
            raise ValueError(
                f"force={listed} names {len(listed)} experts, but a token goes to {slots}.\n"
                "Name 1 to that many; top_k= gives a token more slots."
            )
        return listed
    if force.ndim != 3 or force.is_floating_point() or force.dtype == torch.bool or force.shape[-1] != slots:
        raise ValueError(
            f"force is a tensor of {force.dtype} and shape {list(force.shape)}.\n"
            f"Pass whole numbers of shape [batch, seq, {slots}]."
        )
    ordered = force.long().sort(-1).values
    if force.numel() and (int(ordered.min()) < 0 or int(ordered.max()) >= num_experts):
        raise ValueError(
            f"force holds experts {int(ordered.min())} to {int(ordered.max())}; the model has 0 to {num_experts - 1}."
        )
    if bool((ordered[..., 1:] == ordered[..., :-1]).any()):
        raise ValueError("force gives a token the same expert in two slots; the slots of a token need different ones.")
    return force.long()


def _swapped(swap: Any, slots: int, num_experts: int) -> dict[int, int]:
    if not isinstance(swap, Mapping):
        pair = as_list(swap)
        if len(pair) != 2:
            raise ValueError(f"swap={swap} was asked for; give two experts that trade places, or a mapping.")
        swap = dict(zip(pair, reversed(pair), strict=True))
    mapping = {int(expert): int(other) for expert, other in swap.items()}
    _listed("swap", sorted({*mapping, *mapping.values()}), num_experts)
    if slots > 1 and set(mapping) != set(mapping.values()):
        raise ValueError(
            f"swap={mapping} would give a token that has both experts one of them twice, as it has {slots} slots.\n"
            "Give a permutation, for example (a, b) or {a: b, b: c, c: a}; ban= or prefer= keep tokens off an expert."
        )
    return mapping
