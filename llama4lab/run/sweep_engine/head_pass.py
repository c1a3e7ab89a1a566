"""From the residual stream behind the last layer to the metric of every unit."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.run.metrics import BoundMetric
from llama4lab.run.sweep_engine.packing import Packing, blocks_of, packing
from llama4lab.run.sweep_engine.text_pass import Passed, Units
from llama4lab.run.sweep_engine.values_of_pass import PassValues, Place

SHOWN = 5  # how many of the most probable tokens are kept for each cell


@dataclass(frozen=True, eq=False)
class Outcome:
    """The metric of some logits, and the most probable next tokens at the last position that it reads."""

    value: Float[Tensor, " n"]
    top_ids: Int[Tensor, "n shown"]
    top_log_probs: Float[Tensor, "n shown"]


def outcome(
    metric: BoundMetric, logits: Float[Tensor, "n position vocab"], rows: Int[Tensor, " n"], batch: int
) -> Outcome:
    """Evaluates a metric on copies of a prompt of `batch` rows."""
    value = metric.over_batches(logits, rows, batch).float().cpu()
    best = logits[:, -1].float().log_softmax(-1).topk(min(SHOWN, logits.shape[-1]))
    return Outcome(value, best.indices.cpu(), best.values.cpu())


@dataclass(eq=False)
class HeadPass:
    """Final norm and unembedding, for the positions that the metric reads only.

    Attributes:
        model: The model.
        values: What hook points do; its listeners must be set.
        passed: What left the last layer.
        lengths: Columns of the base and of the source run.
        metrics: The metric for the base and the source run.
        mapped: For each row and column of the base run the column of the source run; -1 for none.
    """

    model: HookedPreTrainedModel
    values: PassValues
    passed: Passed
    lengths: tuple[int, int]
    metrics: tuple[BoundMetric, BoundMetric | None]
    mapped: Int[Tensor, "row seq"]

    def __post_init__(self) -> None:
        base, source = self.metrics
        self.positions = torch.tensor(base.positions)
        wanted = self.mapped[:, base.positions[0] : base.positions[-1] + 1].flatten().tolist()
        self.source_columns = sorted({*wanted, *(source.positions if source else [])} - {-1}) if source else []
        num_rows = len(self.mapped)
        base_size = num_rows * len(base.positions)
        self.values.source_tokens = slice(base_size, base_size + num_rows * len(self.source_columns))
        place = torch.zeros(self.lengths[1] + 1, dtype=torch.long)
        place[self.source_columns] = torch.arange(len(self.source_columns))
        if source is None:
            return
        self.values.source_at = {
            name: at
            if name in self.values.constants
            else at // self.lengths[1] * len(self.source_columns) + place[at % self.lengths[1]]
            for name, at in self.values.source_at.items()
        }

    def pair(self) -> tuple[Outcome, Outcome | None, Tensor]:
        """The outcome of the base and the source run, and the base run's logits `[row, position, vocab]`."""
        num_rows, (base, source) = len(self.mapped), self.metrics
        row = torch.arange(num_rows)
        own = row[:, None] * self.lengths[0] + self.positions
        theirs = row[:, None] * self.lengths[1] + torch.tensor(self.source_columns, dtype=torch.long)
        index = torch.cat([own.flatten(), num_rows * self.lengths[0] + theirs.flatten()])
        nobody = np.full(len(self.passed.packing.start), -1)
        empty = Packing([], len(index), nobody, nobody, nobody, nobody, nobody)
        logits = self._logits(index, empty, has_source=source is not None)
        base_logits = logits[: own.numel()].unflatten(0, tuple(own.shape))
        if source is None:
            return outcome(base, base_logits, row, num_rows), None, base_logits
        columns = [self.source_columns.index(position) for position in source.positions]
        source_logits = logits[own.numel() :].unflatten(0, tuple(theirs.shape))[:, columns]
        return outcome(base, base_logits, row, num_rows), outcome(source, source_logits, row, num_rows), base_logits

    def units(
        self, units: Units, chosen: Int[np.ndarray, " unit"], base_logits: Float[Tensor, "row position vocab"]
    ) -> Float[Tensor, "unit position vocab"]:
        """The logits of some units at the positions of the metric; where nothing changed, those of the base run."""
        final, rows = self.passed.packing, torch.from_numpy(units.row[chosen])
        alive = chosen[final.start[chosen] >= 0]
        first, end = final.first[alive], final.end[alive]
        packed = packing(blocks_of(alive, units.row[alive], first, end, first), len(units.row), 0)
        unit, _, column = packed.columns()
        index = torch.from_numpy(final.start[unit] + column - final.first[unit])
        whole = len(self.positions) == 1 and len(alive) == len(chosen)
        logits = torch.empty(0) if whole else base_logits[rows.to(base_logits.device)]
        if not len(alive):
            return logits
        new = self._logits(index, packed, has_source=False)
        place = np.full(len(units.row), -1)
        place[chosen] = np.arange(len(chosen))
        if whole:
            return new[torch.from_numpy(packed.start[chosen]).to(new.device), None]
        at = np.full(self.lengths[0], -1)
        at[self.positions.numpy()] = np.arange(len(self.positions))
        read = at[column] >= 0
        where = (torch.from_numpy(place[unit][read]), torch.from_numpy(at[column][read]))
        logits[where] = new[torch.from_numpy(np.flatnonzero(read))]
        return logits

    def _logits(
        self, index: Int[Tensor, " token"], packed: Packing, *, has_source: bool
    ) -> Float[Tensor, "token vocab"]:
        tokens = slice(0, len(index))
        self.values.place = Place(packed, tokens, tokens, None, has_source)
        text, head = self.model.text, cast(Any, self.model).get_output_embeddings()
        x = self.passed.x[:, index.to(self.passed.x.device)]
        x = text.final_norm(text.norm(x))
        return self.values.points.module("logits")(head(x))[0]


def in_batches(chosen: Int[np.ndarray, " unit"], num_rows: int, most: int) -> Iterator[Int[np.ndarray, " unit"]]:
    """Units in batches of whole cells: at most so many units, but at least one cell."""
    step = max(most // num_rows, 1) * num_rows
    for start in range(0, len(chosen), step):
        yield chosen[start : start + step]
