"""Rerouting: routers choose otherwise, or what they choose is fed otherwise, while the model runs.

Which experts a token is sent to and how strongly they are fed are two things, and each can be changed alone. Llama 4
feeds an expert by the sigmoid of the expert's own router logit. Steering the choice by changing the logits (by a bias,
or to log probabilities) would change that number too. So the choice is changed behind the logits, which stay as they
are.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Unpack
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from llama4lab.model.moe import Router
from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.run.chosen_tokens import ChosenTokens, Positions
from llama4lab.run.current_pass import CurrentPass, following
from llama4lab.run.listening import listening
from llama4lab.run.patching import patched
from llama4lab.run.routes.changes import LayerChange, RouteChanges
from llama4lab.run.routes.freeze import frozen_routing
from llama4lab.run.routes.plan import RoutePlan, planned_changes, router_name, router_of
from llama4lab.run.routes.replay import routes_now
from llama4lab.run.routes.slots import Standing, forced_first, in_place, mapped
from llama4lab.run.run import Run

SILENCED = {"shared": "experts.out", "routed": "shared_expert.out"}

# What the blocks around a router have made of its logits so far in this pass, so that blocks in blocks add up.
_standings: WeakKeyDictionary[Router, Standing] = WeakKeyDictionary()


@contextmanager
def rerouted(
    model: HookedPreTrainedModel,
    *,
    layers: int | Sequence[int] | None = None,
    positions: Positions = None,
    **changes: Unpack[RouteChanges],
) -> Iterator[None]:
    """While the block lasts, routers choose other experts, or feed them otherwise. Padding is routed as before.

        with lab.rerouted(model, layers=3, ban=[1, 5], gate="original"):
            run = lab.record(model, prompt, at="layers.*.feed_forward.router.*")

    The hook points show what happens: `router.logits` the true logits, `router.indices` the experts that run,
    `router.gates` the numbers that feed them. An expert that stays chosen stays in its slot. Blocks nest: an inner one
    changes what the outer one chose, and keeps off the experts that the outer one banned unless it asks for them.

    Args:
        model: The model.
        layers: The layers that are meant; by default those that a mapping of layers names, else all with a router.
        positions: The tokens that are meant, as in `steered`: None for all, a position or several, a slice, "new" or a
            boolean tensor.
        changes: At least one of these. Of force, swap and replay only one, as each says by itself who is chosen.

            ban: Expert, or several, that no token goes to; or layer -> experts. The best of the others replace them.
            prefer: Experts that come before all others, the one with the highest logit first; or expert -> bias, which
                is added to its logit for the choice only.
            force: The expert of the first slot, or of the first slots in this order; the best others fill the rest. Or
                the experts of every slot, a tensor `[batch, seq, slot]` of the prompt's places, beyond which tokens go
                where they would. Or layer -> any of these.
            swap: `(a, b)`: tokens of a go to b and those of b to a. `{a: b}`: tokens of a go to b; if a token has
                several slots this has to be a permutation, such as `{a: b, b: c, c: a}`.
            top_k: How many experts a token goes to. It is the size of the axis "slot" then.
            gate: What feeds the chosen experts. "own": the sigmoid of their logit, as always (the default); "original":
                the gate of the expert that the choice replaces, slot by slot; a number from 0, which lets nothing
                through, to 1, or beyond, where no router can go; or a function of the gates `[batch, seq, slot]`.
            only: "shared": the routed experts write nothing. "routed": the shared expert writes nothing.
            replay: A run with `router.indices`, whose choices are repeated position by position, with its gates if it
                has them and `gate` says nothing else; see `frozen_routing`. Or a `RoutedExperts`, or one for each row:
                token by token, whatever the padding; tokens without a known route go where they would. The number of
                slots is that of the run or routes.

    Raises:
        TypeError: for a keyword that is not in the list.
        ValueError: if a change has no meaning for this model or beside the others, or does not fit the pass.
        RuntimeError: if no pass ran in the block, or no token was meant.
    """
    plan, chosen = planned_changes(model, layers, changes), ChosenTokens(positions)
    _check_slots(model, plan, positions)
    with following(model) as current, ExitStack() as stack:
        routings = {
            layer: _Rerouting(router_of(model, layer), layer, change, plan, current, chosen)
            for layer, change in plan.layers.items()
        }
        for routing in routings.values():
            stack.enter_context(routing.listening_to_logits())
        stack.enter_context(
            listening(model, {router_name(layer, "indices"): routing.note for layer, routing in routings.items()})
        )
        if isinstance(plan.replay, Run):
            held = plan.gate == "held"
            stack.enter_context(frozen_routing(model, plan.replay, gates=held, layers=list(plan.layers)))
        stack.enter_context(patched(model, _patches(plan, routings)))
        yield
    if not chosen.count:
        raise RuntimeError(
            f"No token was rerouted: positions={positions!r}, and the last pass had positions {current.first} to "
            f"{current.first + current.shape[1] - 1}."
            + ("\nOnly steps of generation with a cache read new tokens." if isinstance(positions, str) else "")
        )


def _check_slots(model: HookedPreTrainedModel, plan: RoutePlan, positions: Positions) -> None:
    for layer, change in plan.layers.items():
        now = router_of(model, layer).top_k
        if positions is not None and change.slots != now:
            raise ValueError(
                f"{change.slots} slots instead of {now} were asked for at positions={positions!r} only.\n"
                "All tokens of a layer have the same number; leave positions out."
            )


def _patches(plan: RoutePlan, routings: "dict[int, _Rerouting]"):
    patches = {}
    for layer, routing in routings.items():
        patches[router_name(layer, "indices")] = routing.choose
        if plan.gate != "own":
            patches[router_name(layer, "gates")] = routing.feed
        if plan.only is not None:
            patches[f"layers.{layer}.feed_forward.{SILENCED[plan.only]}"] = routing.silence
    return patches


class _Rerouting:
    """What is done at one router, and what is known of the pass there."""

    def __init__(
        self,
        router: Router,
        layer: int,
        change: LayerChange,
        plan: RoutePlan,
        current: CurrentPass,
        chosen: ChosenTokens,
    ):
        self.router, self.layer, self.change, self.plan = router, layer, change, plan
        self.current, self.chosen = current, chosen
        self.logits = self.original = self.mask = torch.empty(0)

    @contextmanager
    def listening_to_logits(self) -> Iterator[None]:
        """Sees the logits after everybody else, and lets the router give as many slots as are wanted."""
        slots, handles = self.router.top_k, []

        def remember(_module: nn.Module, _args: tuple, logits: Tensor) -> None:
            self.logits = logits
            if self.change.reorders:
                _standings[self.router] = Standing.of(logits)

        def come_last(*_: object) -> None:
            # Hooks run in the order of their registration, and blocks inside this one may edit the logits.
            handles.pop().remove()
            handles.append(self.router.logits.register_forward_hook(remember))

        with ExitStack() as stack:
            stack.callback(lambda: [handle.remove() for handle in handles])
            handles.append(self.router.logits.register_forward_hook(remember))
            stack.callback(self.router.register_forward_pre_hook(come_last).remove)
            stack.callback(_standings.pop, self.router, None)
            stack.callback(setattr, self.router, "top_k", slots)
            self.router.top_k = self.change.slots
            yield

    def note(self, indices: Tensor) -> None:
        """The choice before this block changes it."""
        if not self.current.is_of(indices):
            raise ValueError(
                f"A block reroutes the tokens of whole passes, but the router of layer {self.layer} was given "
                f"{list(indices.shape[:2])} tokens by itself.\nCall what runs pieces of the model outside the block."
            )
        self.original, self.mask = indices, self.chosen.mask(self.current).to(indices.device)

    def choose(self, now: Int[Tensor, "batch seq slot"]) -> Int[Tensor, "batch seq slot"]:
        """The experts that the tokens go to."""
        change, replay = self.change, self.plan.replay
        new = now
        if change.reorders:
            new = self._best(now)
        if isinstance(change.forced, Tensor):
            new = self._forced(new, change.forced)
        elif change.forced is not None:
            new = forced_first(new, change.forced)
        if change.swapped:
            new = mapped(new, change.swapped, self.router.out_features)
        if isinstance(replay, list):
            new = self._replayed(new)
        return torch.where(self.mask[..., None], new, self.original)

    def _best(self, now: Int[Tensor, "batch seq slot"]) -> Int[Tensor, "batch seq slot"]:
        change = self.change
        before = _standings[self.router].honouring(now)
        standing = before.changed(barred=change.barred, preferred=change.preferred, biases=change.biases)
        best = standing.best(now)
        if bool((standing.bars(best) & self.mask).any()):
            raise ValueError(
                f"Blocks inside each other have banned so many experts in layer {self.layer} that a token lacks "
                f'{change.slots} to go to.\nBan fewer, or silence all routed experts by only="shared".'
            )
        _standings[self.router] = standing.where(self.mask, before)
        return in_place(now, best)

    def _forced(
        self, now: Int[Tensor, "batch seq slot"], forced: Int[Tensor, "batch whole slot"]
    ) -> Int[Tensor, "batch seq slot"]:
        """A token beyond the tensor, in a step of generation, keeps its choice."""
        (rows, seq), first = self.current.shape, self.current.first
        if forced.shape[0] != rows or (first == 0 and forced.shape[1] != seq):
            raise ValueError(f"force has shape {list(forced.shape)}; the prompt is {rows} x {first + seq}.")
        known = forced.to(now.device)[:, first : first + seq]
        return torch.cat([known, now[:, known.shape[1] :]], dim=1)

    def _replayed(self, now: Int[Tensor, "batch seq slot"]) -> Int[Tensor, "batch seq slot"]:
        assert isinstance(self.plan.replay, list)
        known = routes_now(self.plan.replay, self.layer, self.current, self.mask, self.plan.fill)
        return torch.where(known >= 0, known, now)

    def feed(self, gates: Float[Tensor, "batch seq slot"]) -> Float[Tensor, "batch seq slot"]:
        """The gates of the chosen experts."""
        rule, new = self.plan.gate, gates
        if rule == "original":
            new = self._gates_of(self.original)
        elif rule == "held":
            return torch.where(self.mask[..., None], gates, self._gates_of(self.original))
        elif callable(rule):
            new = rule(gates)
            if not isinstance(new, Tensor) or new.shape != gates.shape:
                found = list(new.shape) if isinstance(new, Tensor) else type(new).__name__
                raise ValueError(f"The function for gates returned {found}; they have shape {list(gates.shape)}.")
        else:
            assert isinstance(rule, int | float)
            new = torch.full_like(gates, rule)
        return torch.where(self.mask[..., None], new.to(gates.device, gates.dtype), gates)

    def _gates_of(self, chosen: Int[Tensor, "batch seq slot"]) -> Float[Tensor, "batch seq slot"]:
        return torch.sigmoid(self.logits.gather(-1, chosen).float()).to(self.logits.dtype)

    def silence(self, written: Shaped[Tensor, "batch seq ..."]) -> Shaped[Tensor, "batch seq ..."]:
        """Nothing, where the mask says so."""
        mask = self.mask.reshape(*self.mask.shape, *[1] * (written.ndim - 2))
        return torch.where(mask, torch.zeros_like(written), written)
