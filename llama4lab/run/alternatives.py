"""The metric of a prompt if places of its run held other given values: many such cases in one packed pass.

A sweep asks what happens if a place takes what another run has there. Here each case, a *cell*, brings its own values:
the same place can hold many, one after the other. The numbers are those of one patched run a cell.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypedDict, Unpack

import numpy as np
import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor
from tqdm.auto import tqdm

from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.prompt.prompt import Prompt
from llama4lab.run.cell_patching import single_runs
from llama4lab.run.listening import is_hooked
from llama4lab.run.metrics import BoundMetric, Metric, as_metric
from llama4lab.run.pairing import paired
from llama4lab.run.recording import record
from llama4lab.run.selection import selected
from llama4lab.run.substitution import Substitution, inner_words
from llama4lab.run.sweep_axes import Cells
from llama4lab.run.sweep_engine.engine import CellOutcomes, Engine
from llama4lab.run.sweep_engine.head_pass import Outcome, outcome
from llama4lab.run.sweep_memory import batches, nbytes, waves
from llama4lab.run.sweep_plan import NEVER, SweepPlan, text_entry


class Running(TypedDict, total=False):
    """How cells are run; see `cell_outcomes`."""

    memory: str | int | None
    progress: bool


@dataclass(frozen=True, eq=False)
class Given:
    """What cells put into one hook point of the text layers: K entries, each a value at one token.

    Attributes:
        name: The hook point, of shape `batch seq ...` or `batch seq slot ...`.
        cell: The cell of each entry.
        row: Its row of the prompt.
        position: Its position in the row, padding counted.
        slot: Its slot; None for all that the token has at the hook point.
        values: What can be put in, as the hook point has it for one token, or for one slot of a token.
        at: The value of each entry.
    """

    name: str
    cell: Int[Tensor, " entry"]
    row: Int[Tensor, " entry"]
    position: Int[Tensor, " entry"]
    slot: Int[Tensor, " entry"] | None
    values: Shaped[Tensor, "value ..."]
    at: Int[Tensor, " entry"]


def cell_outcomes(
    model: HookedPreTrainedModel,
    prompt: Prompt,
    given: Sequence[Given],
    num_cells: int,
    metric: Metric | Callable[[Tensor], Tensor],
    **running: Unpack[Running],
) -> CellOutcomes:
    """Runs every cell, and the prompt as it is.

    Rows of a cell without an entry stay as they are. With hooks of somebody else on the model, every cell gets an
    ordinary run of its own, for their functions expect ordinary tensors.

    Args:
        model: The model.
        prompt: The prompt.
        given: What the cells put in; one for each hook point.
        num_cells: How many cells there are.
        metric: One of `lab.metrics`, or a function of the logits.
        running: `memory`: what it may take, in bytes or as "2GiB"; half of the free memory by default. `progress`:
            whether to show a bar; none by default.

    Returns:
        The metric and the most probable next tokens of each cell in each row; `.base` has those of the prompt as it is.

    Raises:
        ValueError: if two of `given` are about the same hook point.
        MemoryError: if `memory` is not enough for one cell.
    """
    names = [each.name for each in given]
    if len(set(names)) < len(names):
        raise ValueError(f"Each hook point is given once, with all its entries; these were given: {', '.join(names)}.")
    plan = _plan(model, prompt, given, num_cells, as_metric(metric).bound(prompt))
    with tqdm(total=num_cells, disable=not running.get("progress", False), unit="cell") as bar:
        found = _singly(plan, bar) if is_hooked(model) else _together(plan, running.get("memory"), bar)
    return CellOutcomes(
        found[0].base,
        None,
        torch.cat([part.value for part in found]),
        torch.cat([part.top_ids for part in found]),
        torch.cat([part.top_log_probs for part in found]),
    )


def alone_in_its_row(
    row: Int[np.ndarray, " line"], runs: Bool[np.ndarray, " line"], metric: Metric | Callable[[Tensor], Tensor]
) -> Int[np.ndarray, " line"]:
    """Gives each line of a table a cell in which nothing else of its row is changed; -1 where no run is needed.

    Lines of different rows share a cell, unless the metric mixes rows.

    Args:
        row: The row of each.
        runs: Whether it changes something.
        metric: The metric that will be evaluated.
    """
    cell = np.full(len(row), -1)
    groups = [runs & (row == each) for each in np.unique(row)] if as_metric(metric).by_row else [runs]
    for own in groups:
        cell[own] = np.arange(own.sum())
    return cell


def line_outcomes(
    model: HookedPreTrainedModel,
    prompt: Prompt,
    given: Sequence[Given],
    row: Int[np.ndarray, " line"],
    cell: Int[np.ndarray, " line"],
    metric: Metric | Callable[[Tensor], Tensor],
    **running: Unpack[Running],
) -> Outcome:
    """Gives what each line of a table finds in its row: of its cell, or of the prompt as it is where that is -1.

    Args:
        model: The model.
        prompt: The prompt.
        given: What the cells put in.
        row: The row of each line.
        cell: Its cell.
        metric: One of `lab.metrics`, or a function of the logits.
        running: As in `cell_outcomes`.
    """
    found = cell_outcomes(model, prompt, given, int(cell.max(initial=-1)) + 1, metric, **running)
    each = torch.from_numpy(np.where(cell < 0, 0, cell + 1)), torch.from_numpy(row)
    parts = [(found.base.value, found.value), (found.base.top_ids, found.top_ids)]
    parts.append((found.base.top_log_probs, found.top_log_probs))
    return Outcome(*(torch.cat([base[None], cells])[each] for base, cells in parts))


def _plan(
    model: HookedPreTrainedModel, prompt: Prompt, given: Sequence[Given], num_cells: int, metric: BoundMetric
) -> SweepPlan:
    points, num_rows, length = model.hook_points(), len(prompt), prompt.input_ids.shape[1]
    num_units, num_layers = num_cells * num_rows, len(model.text.layers)
    order = selected(points, [each.name for each in given]) if given else []
    given = sorted(given, key=lambda each: order.index(each.name))
    substitutions, source_at, constants = {}, {}, {}
    entry, vision = np.full(num_units, num_layers), np.full(num_units, NEVER)
    first, last = np.full(num_units, NEVER), np.full(num_units, -1)
    for each in given:
        shape, unit = points[each.name], each.cell * num_rows + each.row
        inner = tuple(each.slot if word == "slot" else None for word in inner_words(shape))
        substitutions[each.name] = Substitution(each.name, shape, unit, each.row, each.position, inner)
        source_at[each.name] = each.at
        values = each.values
        if each.slot is not None:  # the same for all slots: only the one that is meant is read
            values = values[:, None].expand(-1, model.text.config.num_experts_per_tok, *values.shape[1:])
        constants[each.name] = values
        np.minimum.at(entry, unit.numpy(), text_entry(each.name, num_layers))
        np.minimum.at(first, unit.numpy(), each.position.numpy())
        np.maximum.at(last, unit.numpy(), each.position.numpy())
    if bool((last >= length).any()):
        raise IndexError(f"Position {last.max()} is to be changed; the prompt has {length} positions.")
    numbers = list(range(num_cells))
    cells = Cells({"cell": [*numbers]}, [{"cell": number} for number in numbers], [[] for _ in numbers])
    return SweepPlan(
        *(model, paired(model, prompt, prompt), "clean", cells, list(substitutions), constants, (metric, None)),
        *(substitutions, source_at, constants, np.arange(num_units) % num_rows, entry, (first, last), vision),
    )


def _together(plan: SweepPlan, memory: str | int | None, bar: tqdm) -> list[CellOutcomes]:
    engine, cells = Engine(plan), np.arange(len(plan.cells))
    engine.batches, waiting = batches(plan, None if memory is None else nbytes(memory), engine)
    found = []
    for wave in waves(engine.tokens(cells), waiting, max(len(cells), 1)) or [slice(0, 0)]:

        def done(step: float = len(cells[wave]) / len(plan.model.text.layers)) -> None:
            bar.update(step)

        found.append(engine.run(cells[wave], done))
    return found


def _singly(plan: SweepPlan, bar: tqdm) -> list[CellOutcomes]:
    metric, rows = plan.metrics[0], torch.arange(plan.num_rows)
    base = outcome(metric, record(plan.model, plan.base).logits[:, metric.positions], rows, len(rows))
    none = [tensor[None][:0] for tensor in (base.value, base.top_ids, base.top_log_probs)]
    found = [CellOutcomes(base, None, *none)]
    for cell in range(len(plan.cells)):
        own = outcome(metric, single_runs(plan, cell, None), rows, len(rows))
        found.append(CellOutcomes(base, None, own.value[None], own.top_ids[None], own.top_log_probs[None]))
        bar.update()
    return found
