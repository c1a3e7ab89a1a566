"""Frozen routing: every token keeps the experts that it had in a run, whatever else is changed."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.run.current_pass import CurrentPass, following
from llama4lab.run.patching import patched
from llama4lab.run.run import Run

ROUTER = "feed_forward.router."


@contextmanager
def frozen_routing(
    model: HookedPreTrainedModel, run: Run, *, gates: bool = True, layers: list[int] | None = None
) -> Iterator[None]:
    """While the block lasts, the router chooses what it chose in a run, position by position.

    So a change of the residual stream acts through what flows, and not by sending tokens to other experts. Passes of
    another text of the same length take the routes of the run too. Passes of a part of its text (the steps of a
    generation, or a beginning) have to be of the same tokens.

    Args:
        model: The model.
        run: A run with `layers.*.feed_forward.router.indices` and, with `gates`, `.gates`.
        gates: Whether the gates are held too. Otherwise the held experts are fed by the gates that the router gives
            them now, and gradients flow through these.
        layers: The layers that are held; by default all with a router.

    Raises:
        ValueError: if the run lacks a hook point, or a pass has other rows, padding or positions than it.
        RuntimeError: if no pass ran in the block.
    """
    known: list[int] = run.meta["moe_layers"]
    held = known if layers is None else layers
    wrong = [layer for layer in held if layer not in known]
    if wrong or not held:
        raise ValueError(
            f"Routing was to be frozen in layer {wrong[0] if wrong else 'none'}; the layers with a router are "
            f"{', '.join(map(str, known)) or 'none'}."
        )
    names = [f"layers.{layer}.{ROUTER}{kind}" for layer in held for kind in ("indices", "gates")[: 1 + gates]]
    missing = [name for name in names if name not in run]
    if missing:
        raise ValueError(
            f"Routing was to be frozen, but the run does not have {missing[0]}.\n"
            'Record it with at="layers.*.feed_forward.router.*".'
        )
    with following(model) as current:

        def holder(recorded: Tensor):
            def hold(old: Tensor) -> Tensor:
                if not current.is_of(old):
                    raise ValueError(
                        f"Routing is frozen to a run, but a router was given {list(old.shape[:2])} tokens outside a "
                        "pass of the whole model.\nCall what runs pieces of the model outside the block."
                    )
                return _held(run, recorded, current).to(old.device)

            return hold

        with patched(model, {name: holder(run[name].detach()) for name in names}):
            yield


def _held(
    run: Run, recorded: Shaped[Tensor, "batch seq slot"], current: CurrentPass
) -> Shaped[Tensor, "batch now slot"]:
    """What the run has for the tokens of the pass."""
    (rows, seq), first = current.shape, current.first
    if rows != len(run.rows):
        raise ValueError(f"Routing is frozen to a run of {len(run.rows)} rows, but the pass has {rows}.")
    index = {position: i for i, position in enumerate(run.positions)}
    absent = [position for position in range(first, first + seq) if position not in index]
    if absent:
        raise ValueError(
            f"Routing is frozen to a run of positions {run.positions[0]} to {run.positions[-1]}, but the pass has "
            f"position {absent[0]}.\nFreeze to a run of the whole text, or generate fewer tokens."
        )
    ids, mask = (tensor.cpu()[run.rows] for tensor in (run.prompt.input_ids, run.prompt.attention_mask))
    _check_text(run, ids[:, first : first + seq], current)
    # A row of a generation that has ended goes on with filling, which is padding in the run and a token in the pass.
    before = mask.cumsum(1)[:, first : first + seq] == 0
    if bool((current.valid.cpu() & before).any()):
        raise ValueError("Routing is frozen to a run that has padding where the pass has tokens; pad both alike.")
    now = [index[position] for position in range(first, first + seq)]
    return recorded[:, torch.tensor(now, device=recorded.device)]


def _check_text(run: Run, known: Int[Tensor, "batch now"], current: CurrentPass) -> None:
    """A pass that is not the whole text has to be a part of it."""
    if current.first == 0 and current.shape[1] == len(run.positions):
        return
    now = None if current.input_ids is None else current.input_ids.cpu()
    if now is None:
        raise ValueError(
            f"Routing is frozen to a run of {len(run.positions)} positions, but the pass has {current.shape[1]}."
        )
    other = ((now != known) & current.valid.cpu()).nonzero()
    if len(other):
        row, place = other[0].tolist()
        raise ValueError(
            f"Routing is frozen to a run of {len(run.positions)} positions; position {current.first + place} of the "
            f"pass in row {row} holds token {int(now[row, place])} instead of {int(known[row, place])}.\n"
            "A text of another length than the run has to be a part of its text."
        )
