"""Runs the cells of a plan: vision tower, text layers, head.

All cells of a call go through the model together, and so do the two runs that they compare: nothing is recorded before.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from llama4lab.model.token_layout import token_layout
from llama4lab.prompt.prompt import Prompt
from llama4lab.run.hook_names import is_vision
from llama4lab.run.listening import listening
from llama4lab.run.sweep_engine.head_pass import HeadPass, Outcome, in_batches, outcome
from llama4lab.run.sweep_engine.packing import Packing
from llama4lab.run.sweep_engine.pair_rows import PairRows, Rows
from llama4lab.run.sweep_engine.reach import reach
from llama4lab.run.sweep_engine.text_pass import Passed, Units, entered, text_pass
from llama4lab.run.sweep_engine.values_of_pass import PassValues
from llama4lab.run.sweep_engine.vision_pass import VisionPass, image_places
from llama4lab.run.sweep_plan import NEVER, SweepPlan, text_entry


@dataclass(frozen=True)
class Batches:
    """How much is computed at once.

    Attributes:
        tokens: The most tokens of one call of a layer.
        units: The most units whose attention is computed together.
        logits: The most logits of one call of the head, in rows of the vocabulary.
        tiles: The most tiles in the vision tower.
    """

    tokens: int = 8192
    units: int = 8192
    logits: int = 4096
    tiles: int = 64


@dataclass(frozen=True, eq=False)
class CellOutcomes:
    """What a call of the engine found.

    Attributes:
        base: Of the run that is patched.
        source: Of the other one, if there is one.
        value: The metric of every cell in every row.
        top_ids: The most probable next tokens.
        top_log_probs: The logarithms of their probabilities.
    """

    base: Outcome
    source: Outcome | None
    value: Float[Tensor, "cell row"]
    top_ids: Int[Tensor, "cell row shown"]
    top_log_probs: Float[Tensor, "cell row shown"]


class Engine:
    """Runs cells of one plan."""

    def __init__(self, plan: SweepPlan, batches: Batches = Batches()):
        self.plan, self.batches, self.points = plan, batches, plan.model.hook_points()
        self.vision: VisionPass | None = None
        if plan.base.pixel_values is not None:
            own = {name: entries for name, entries in plan.substitutions.items() if is_vision(name)}
            self.vision = VisionPass(
                plan.model, plan.base.pixel_values, own, plan.values, plan.constants, plan.vision_entry
            )
        self.pair = PairRows(
            self._rows(plan.base, is_source=False),
            None if plan.source is None else self._rows(plan.source, is_source=True),
        )
        text = plan.model.text
        positions = plan.metrics[0].positions
        last = positions[-1]
        if not isinstance(plan.values, str) and any("key" in s.shape.split() for s in plan.substitutions.values()):
            last = plan.base.input_ids.shape[1] - 1  # a pattern that is set by hand may look ahead
        chunks = [layer.self_attn.chunk_size for layer in text.layers]
        patches = plan.columns[1] >= 0
        first, end = (np.where(patches, column, 0) for column in plan.columns)
        found = reach(self.pair.base.layout, chunks, plan.row, plan.entry, (first, end), (positions[0], last))
        self.units = Units(plan.row, plan.entry, found)
        self.alive = patches & ~found.idle(plan.entry)

    def tokens(self, cells: Int[np.ndarray, " cell"]) -> Int[np.ndarray, " cell"]:
        """The largest number of tokens that each cell ever has in a layer."""
        width = (self.units.reach.end - self.units.reach.first).clip(min=0).max(0) * self.alive
        return width.reshape(-1, self.plan.num_rows).sum(1)[cells]

    @torch.no_grad()
    def run(self, cells: Int[np.ndarray, " cell"], done: Callable[[], None]) -> CellOutcomes:
        """Runs some cells.

        Args:
            cells: Their numbers in the plan.
            done: Called after every layer.
        """
        plan, num_rows = self.plan, self.plan.num_rows
        units = (cells[:, None] * num_rows + np.arange(num_rows)).reshape(-1)
        chosen = units[self.alive[units]]
        values = self._values()
        inside = [name for name in plan.substitutions if not is_vision(name) and self._entering_layer(name) is None]
        embedded = self._embedded(chosen)
        with listening(plan.model, values.listeners(inside)):
            passed = text_pass(
                *(plan.model.text, self.pair, self.units, chosen, values, self._entering, embedded),
                *((self.batches.tokens, self.batches.units), done),
            )
            names = self._entering(len(plan.model.text.layers))
            passed = Passed(entered(passed.x, names, values, passed.packing), passed.packing)
            lengths = (plan.base.input_ids.shape[1], 0 if plan.source is None else plan.source.input_ids.shape[1])
            head = HeadPass(plan.model, values, passed, lengths, plan.metrics, plan.pair.sources(plan.into))
            return self._outcomes(head, units)

    def _outcomes(self, head: HeadPass, units: Int[np.ndarray, " unit"]) -> CellOutcomes:
        plan, num_rows = self.plan, self.plan.num_rows
        base, source, base_logits = head.pair()
        parts = [outcome(plan.metrics[0], base_logits[:0], torch.zeros(0, dtype=torch.long), num_rows)]
        most = max(self.batches.logits // len(plan.metrics[0].positions), 1)
        for some in in_batches(units, num_rows, most):
            logits, rows = head.units(self.units, some, base_logits), torch.from_numpy(plan.row[some])
            parts.append(outcome(plan.metrics[0], logits, rows, num_rows))
        value = torch.cat([part.value for part in parts]).unflatten(0, (-1, num_rows))
        ids = torch.cat([part.top_ids for part in parts]).unflatten(0, (-1, num_rows))
        log_probs = torch.cat([part.top_log_probs for part in parts]).unflatten(0, (-1, num_rows))
        return CellOutcomes(base, source, value, ids, log_probs)

    def _rows(self, prompt: Prompt, *, is_source: bool) -> Rows:
        model = self.plan.model
        ids, mask = prompt.input_ids.to(model.device), prompt.attention_mask.to(model.device)
        if prompt.pixel_values is None:
            with torch.no_grad():
                x = model.text.embedded(ids)
        else:
            assert self.vision is not None
            x = self.vision.encoded(prompt, is_source=is_source)
        x = model.text.embed_merged(x.detach())
        return Rows(x, token_layout((ids.shape[0], ids.shape[1]), x.device, attention_mask=mask))

    def _values(self) -> PassValues:
        plan = self.plan
        own = {name: entries for name, entries in plan.substitutions.items() if not is_vision(name)}
        source = slice(self.pair.base.size, self.pair.size)
        return PassValues(self.points, own, plan.values, plan.source_at, source, plan.constants)

    def _entering_layer(self, name: str) -> int | None:
        """The layer that a hook point's tensor enters, for those between two layers."""
        between = name in ("embed", "embed_merged") or (name.endswith(".resid_post") and not is_vision(name))
        return text_entry(name, len(self.plan.model.text.layers)) if between else None

    def _entering(self, layer: int) -> list[str]:
        return [name for name in self.plan.substitutions if self._entering_layer(name) == layer]

    def _embedded(self, chosen: Int[np.ndarray, " unit"]) -> Callable[[Tensor, Packing], Tensor]:
        """Puts the image features of units that are patched in the vision tower in their places."""
        plan = self.plan
        own = chosen[plan.vision_entry[chosen] < NEVER]
        places = image_places(plan.model, plan.base)
        if not len(own) or self.vision is None or places is None:
            return lambda x, _: x
        pairs = [(unit, tile) for unit in own for tile in np.flatnonzero(places[:, 0, 0] == plan.row[unit])]
        unit, tile = (np.array(each) for each in zip(*pairs, strict=True))
        features = self.vision.features(unit, tile, self.batches.tiles)

        def put(x: Tensor, packing: Packing) -> Tensor:
            column = places[tile, :, 1]
            at = packing.start[unit][:, None] + column - packing.first[unit][:, None]
            inside = (column >= packing.first[unit][:, None]) & (column < packing.end[unit][:, None])
            new = x.clone()
            new[0, torch.from_numpy(at[inside])] = features[torch.from_numpy(inside)].to(x.device, x.dtype)
            return new

        return put
