"""Sweeps: patching every cell of a grid, all in a few passes.

Activation patching asks one question: which places carry what makes the model answer as it does? The *clean* prompt is
answered as it should be, the *corrupted* one is not. Putting clean activations into the corrupted run (denoising) shows
where the answer can be restored; putting corrupted ones into the clean run (noising) shows where it can be destroyed. A
sweep does this for every cell of a grid, for example every layer at every position.

The numbers are those of a loop over single runs, one patched run a cell. They come from one pass for many cells: see
`llama4lab.run.sweep_engine`.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.run.cell_patching import recorded_source, single_runs
from llama4lab.run.listening import is_hooked
from llama4lab.run.metrics import Metric, as_metric
from llama4lab.run.pairing import Mapped, Side, other_side, paired
from llama4lab.run.recording import record
from llama4lab.run.selection import Selector
from llama4lab.run.substitution import Values
from llama4lab.run.sweep_axes import Over
from llama4lab.run.sweep_engine.engine import CellOutcomes, Engine
from llama4lab.run.sweep_engine.head_pass import Outcome, outcome
from llama4lab.run.sweep_memory import batches, nbytes, offloaded, waves
from llama4lab.run.sweep_plan import SweepPlan, planned
from llama4lab.run.sweep_result import Sweep, TopTokens

SAVES = 20  # how often a sweep with a path is saved, at least


class Running(TypedDict, total=False):
    """How a sweep is run; see `sweep`."""

    align: Mapped | Sequence[Mapped] | None
    memory: str | int | None
    path: str | Path | None
    progress: bool


def sweep(
    model: HookedPreTrainedModel,
    clean: Any,
    corrupted: Any = None,
    *,
    at: Selector,
    over: Over,
    metric: Metric | Callable[[Tensor], Tensor],
    values: Values = "other",
    into: Side = "corrupted",
    **running: Unpack[Running],
) -> Sweep:
    """Patches every cell of a grid and measures what it changes.

    A cell is one value on each axis of `over`; it replaces what `at` has there, in every row of the pair. Axes that are
    not in `over` are replaced whole: `over=["layer"]` at `self_attn.z` patches all heads at all positions of a layer.

    Args:
        model: The model.
        clean: The prompts that the model answers as it should: a `Prompt`, or anything that `model.prompt` takes.
        corrupted: As many prompts, each the counterpart of a clean one. None for ablations of the clean ones.
        at: Names or globs of hook points.
        over: The axes, out of layer, position, head, expert, neuron, slot, key, feature, tile, patch, image_token,
            component (the name without its layer) and hook_point; or axis -> its values, None for all. A tuple of
            values is replaced as one: `{"position": [(2, 3), 7]}`. An expert of `experts.out` is what it adds to the
            tokens that are sent to it; patching an expert that only the other run uses adds its part.
        metric: One of `lab.metrics`, or a function of the logits.
        values: "other": what the other run has there. A number (0 ablates). A mapping of hook point names to tensors
            that broadcast to theirs, such as means. Or a function of the patched run's and the other run's tensors,
            both `[token, ...]`, which has to treat each token alone.
        into: Which run is patched: "corrupted" for denoising, "clean" for noising and ablations.
        running: How it is run. `align`: see `matching_positions`. `memory`: what it may take, in bytes or as "2GiB";
            half of the free memory by default. `path`: where it is saved as it goes; a sweep that was interrupted goes
            on from there. `progress`: whether to show a bar.

    Returns:
        The sweep: `.table`, `.tensor(...)`, `.plot()`.

    Raises:
        ValueError: if the prompts cannot be compared position by position, an axis or a value does not fit the hook
            points, or a file at `path` holds another sweep.
        MemoryError: if `memory` is not enough for one cell.
    """
    has_source = corrupted is not None
    pair = paired(model, clean, corrupted if has_source else clean, running.get("align"))
    into = into if has_source else "clean"
    chosen = as_metric(metric)
    other = pair.prompt(other_side(into))
    bound = chosen.bound(pair.prompt(into)), chosen.bound(other) if has_source else None
    plan = planned(model, pair, into, at, over, values, bound)
    state = _State(plan, running.get("path"))
    with tqdm(
        total=len(plan.cells),
        initial=int(state.done.sum()),
        disable=not running.get("progress", True),
        unit="cell",
        bar_format="{desc}{percentage:3.0f}%|{bar}| {n:.0f}/{total_fmt} cells [{elapsed}<{remaining}]",
    ) as bar:
        if is_hooked(model):  # every cell gets a run of its own
            _run_singly(state, bar)
        else:
            _run_together(state, running.get("memory"), bar)
    return state.sweep


def _run_together(state: "_State", memory: str | int | None, bar: tqdm) -> None:
    plan = state.plan
    engine = Engine(plan)
    engine.batches, waiting = batches(plan, None if memory is None else nbytes(memory), engine)
    left = np.flatnonzero(~state.done)
    if not len(left):
        state.keep(left, engine.run(left, lambda: None))  # whether it is this model's sweep
        state.save()
    most = len(left) if state.path is None or offloaded(plan.model) else -(-len(plan.cells) // SAVES)
    for wave in waves(engine.tokens(left), waiting, most):
        cells, layers = left[wave], len(plan.model.text.layers)

        def done(step: float = len(cells) / layers) -> None:
            bar.update(step)

        state.keep(cells, engine.run(cells, done))
        state.save()


def _run_singly(state: "_State", bar: tqdm) -> None:
    plan = state.plan
    source, rows = recorded_source(plan), torch.arange(plan.num_rows)
    base, other = plan.metrics
    base_run = record(plan.model, plan.base)
    own = outcome(base, base_run.logits[:, base.positions], rows, len(rows))
    theirs = None
    if plan.source is not None and other is not None:
        run = record(plan.model, plan.source) if source is None else source
        theirs = outcome(other, run.logits[:, other.positions], rows, len(rows))
    state.check(own, theirs)
    for cell in np.flatnonzero(~state.done):
        found = outcome(base, single_runs(plan, int(cell), source), rows, len(rows))
        each = (found.value[None], found.top_ids[None], found.top_log_probs[None])
        state.keep(np.array([cell]), CellOutcomes(own, theirs, *each))
        state.save()
        bar.update()


@dataclass
class _State:
    """The sweep so far, and where it is saved."""

    plan: SweepPlan
    path: str | Path | None

    def __post_init__(self) -> None:
        plan, num_rows = self.plan, self.plan.num_rows
        nothing = torch.full((num_rows,), torch.nan)
        values = plan.values if isinstance(plan.values, str) else _described(plan.values)
        self.sweep = Sweep(
            *(plan.cells.axes, plan.cells.labels, plan.names, plan.metrics[0].name, plan.into, values, plan.base),
            patched=torch.full((len(plan.cells), num_rows), torch.nan),
            clean=nothing,
            corrupted=nothing.clone(),
            top={},
            fingerprint=_fingerprint(plan, values),
        )
        if self.path is not None and Path(self.path).exists():
            old = Sweep.load(self.path)
            if old.fingerprint != self.sweep.fingerprint:
                raise ValueError(
                    f"{self.path} holds another sweep: {repr(old).splitlines()[0]}.\n"
                    "Give another path, or delete the file to begin anew."
                )
            old.prompt = plan.base
            self.sweep = old

    @property
    def done(self) -> np.ndarray:
        """Which cells have run."""
        return ~self.sweep.patched.isnan().any(1).numpy()

    def check(self, base: Outcome, source: Outcome | None) -> None:
        """Takes up what both runs give without a patch, or compares it with what they gave when the file was made."""
        sweep, sides = self.sweep, {self.plan.into: base}
        if source is not None:
            sides[other_side(self.plan.into)] = source
        if not sweep.top:
            shape = (*sweep.patched.shape, base.top_ids.shape[-1])
            sweep.top["patched"] = TopTokens(torch.full(shape, -1), torch.full(shape, torch.nan))
            for side, own in sides.items():
                setattr(sweep, side, own.value)
                sweep.top[side] = TopTokens(own.top_ids, own.top_log_probs)
        for side, own in sides.items():
            if not torch.allclose(getattr(sweep, side), own.value, rtol=1e-3, atol=1e-3):
                raise ValueError(
                    f"{self.path} was made with another model, or with other tokens in its metric: its {side} "
                    f"{sweep.metric} is {getattr(sweep, side).tolist()}, and here it is {own.value.tolist()}."
                )

    def keep(self, cells: np.ndarray, found: CellOutcomes) -> None:
        """Takes up what the engine found."""
        self.check(found.base, found.source)
        sweep = self.sweep
        sweep.patched[cells] = found.value
        sweep.top["patched"].ids[cells] = found.top_ids
        sweep.top["patched"].log_probs[cells] = found.top_log_probs

    def save(self) -> None:
        """Writes the sweep, if it has a path."""
        if self.path is not None:
            self.sweep.save(self.path)


def _described(values: Values) -> str:
    if isinstance(values, Mapping):
        digest = hashlib.sha256()
        for name in sorted(values):
            digest.update(name.encode() + torch.as_tensor(values[name]).detach().cpu().double().numpy().tobytes())
        return f"given tensors {digest.hexdigest()[:8]}"
    return getattr(values, "__name__", type(values).__name__) if callable(values) else f"{values:g}"


def _fingerprint(plan: SweepPlan, values: str) -> str:
    """What must be equal for a saved sweep to be this one."""
    digest = hashlib.sha256()
    for prompt in (plan.pair.clean, plan.pair.corrupted):
        for tensor in (prompt.input_ids, prompt.attention_mask, prompt.pixel_values):
            digest.update(b"none" if tensor is None else tensor.cpu().float().numpy().tobytes())
    digest.update(plan.pair.mapping.numpy().tobytes())
    digest.update(
        repr(
            (plan.cells.labels, plan.names, plan.into, values, plan.metrics[0].name, plan.metrics[0].positions)
        ).encode()
    )
    return digest.hexdigest()
