"""Tables of a generation that grow while it goes on, so that a step costs the same however long the text is."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from llama4lab.model.facts import facts, rotary_kind
from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.run.generated_prompt import extended
from llama4lab.run.generation_steps import GenerationSteps, Step
from llama4lab.run.run import Run
from llama4lab.tables import generation
from llama4lab.tables.query_summaries import looks
from llama4lab.tables.routing.choices import decisions

ROUTERS, PATTERN = "layers.*.feed_forward.router.*", "layers.{}.self_attn.pattern"
NO_TABLE = pd.DataFrame({name: [] for name in ("row", "step", "position", "layer", "slot", "head")}, dtype="int64")


class GrowingTables:
    """The tables of `tables.generation`, as far as a generation has come.

    Give `add` to `generate` as `each_step`, with `at` and `passing` as they are here.

    Attributes:
        at: The hook points to record.
        passing: The hook points to look at in each step.
        tokens: As `tables.generation.tokens` gives it.
        decisions: As `tables.routing.decisions` gives it, of the generated tokens and the end of the prompt.
        attention: As `tables.generation.attention` gives it.
    """

    def __init__(self, model: HookedPreTrainedModel, *, prompt_tail: int = 256):
        """Starts with empty tables.

        Args:
            model: The model.
            prompt_tail: How many tokens of the prompt to keep decisions of.
        """
        self.meta = facts(model.config, model.text)
        self.at = [ROUTERS] if self.meta["moe_layers"] else []
        self.passing = [PATTERN.format("*")]
        self.tokens = self.decisions = self.attention = NO_TABLE
        self._tail, self._steps, self._looks = prompt_tail, [], []
        self._passes = self._places = self._known = 0

    def add(self, step: Step) -> None:
        """Takes in a step; `catch_up` puts it into the tables."""
        if step.number:
            self._looks.append((step.number - 1, self._looked(step)))
        self._steps.append(step)

    def catch_up(self) -> None:
        """Puts what was added since the last time into the tables."""
        if not self._steps:
            return
        newest, steps = self._steps[-1], self._steps[-1].steps
        run = self._recent(steps, newest)
        self.tokens = _longer(self.tokens, generation.tokens(run))
        if self.at:
            first = max(run.prompt.input_ids.shape[1] - newest.number - 1 - self._tail, 0)
            own = [index for index, position in enumerate(run.positions) if position >= first]
            if own:
                self.decisions = _longer(self.decisions, decisions(run.cut(positions=own)))
        parts = [self._attention(run, step, found) for step, found in self._looks]
        if parts:
            self.attention = _longer(self.attention, pd.concat(parts, ignore_index=True))
        self._steps, self._looks, self._known = [], [], newest.number + 1

    def _recent(self, steps: GenerationSteps, newest: Step) -> Run:
        """A run of what came since the last time."""
        old = steps.prompt.input_ids.shape[1]
        whole = extended(steps.model, steps.prompt, newest.ids[:, old:], steps.ending)
        tensors = {name: torch.cat(passes[self._passes :], dim=1) for name, passes in steps.kept.items()}
        points, count = steps.model.hook_points(), whole.input_ids.shape[1] - 1
        positions = list(range(self._places if tensors else 0, count))
        self._passes += max((len(passes) - self._passes for passes in steps.kept.values()), default=0)
        self._places = count
        logits = torch.cat(steps.logits[self._known : newest.number + 1], dim=1)
        meta = self.meta | {"generated_from": old}
        shapes = {name: points[name] for name in tensors}
        chosen_from = list(range(old - 1 + self._known, old + newest.number))
        return Run(tensors, shapes, logits, whole, meta, positions=positions, logit_positions=chosen_from)

    def _looked(self, step: Step) -> dict[int, dict[str, np.ndarray]]:
        """Where the token that the step read looked, for each layer: arrays [row, head]."""
        prompt = step.steps.prompt
        seen = step.ids.shape[1] - 1
        mask = torch.ones(len(step.ids), seen, dtype=torch.long)
        mask[:, : prompt.input_ids.shape[1]] = prompt.attention_mask.cpu()
        place = torch.where(mask.bool(), mask.cumsum(1) - 1, -1)
        by_size: dict[int, list[int]] = {}
        for layer in range(self.meta["num_layers"]):
            by_size.setdefault(step.tensors[PATTERN.format(layer)].shape[-1], []).append(layer)
        found: dict[int, dict[str, np.ndarray]] = {}
        for layers in by_size.values():
            # Layers that keep as many keys are summed at once.
            pattern = torch.cat([step.tensors[PATTERN.format(layer)] for layer in layers], dim=1)
            found |= self._by_layer(pattern, place, layers)
        return found

    def _by_layer(
        self, pattern: Float[Tensor, "batch head 1 key"], place: Tensor, layers: list[int]
    ) -> dict[int, dict[str, np.ndarray]]:
        seen = place.shape[1]
        first = max(seen - pattern.shape[-1], 0)
        # Places of a static cache after the newest token are empty.
        sums = looks(pattern[:, :, 0, : seen - first], place[:, -1], place[:, first:], self.meta["chunk_size"])
        parts = {name: value.cpu().numpy().reshape(len(place), len(layers), -1) for name, value in sums.items()}
        return {layer: {name: part[:, i] for name, part in parts.items()} for i, layer in enumerate(layers)}

    def _attention(self, run: Run, step: int, found: dict[int, dict[str, np.ndarray]]) -> pd.DataFrame:
        """The lines of one token of each row that has not ended."""
        position, prompt, heads = run.meta["generated_from"] + step, run.prompt, self.meta["num_heads"]
        rows = [row for row in run.rows if prompt.attention_mask[row, position]]
        layers = sorted(found)
        shape = len(rows), len(layers), heads
        columns: dict[str, Any] = {
            "row": _spread(rows, shape, 0),
            "step": step,
            "position": position,
            "token": _spread([prompt.tokens[row][position] for row in rows], shape, 0),
            "layer": _spread(layers, shape, 1),
            "kind": _spread([rotary_kind(run.meta, layer) for layer in layers], shape, 1),
            "head": _spread(range(heads), shape, 2),
        }
        for name in found[layers[0]]:
            columns[name] = np.stack([found[layer][name][rows] for layer in layers], axis=1).reshape(-1)
        return pd.DataFrame(columns)


def _spread(values: Sequence[Any], shape: tuple[int, ...], axis: int) -> np.ndarray:
    """Values along one axis of an array, flattened."""
    ordered = np.expand_dims(np.asarray(values), tuple(other for other in range(len(shape)) if other != axis))
    return np.broadcast_to(ordered, shape).reshape(-1)


def _longer(table: pd.DataFrame, more: pd.DataFrame) -> pd.DataFrame:
    """A table with further lines, in the order of rows, or of layers in a row, and positions."""
    joined = more if table.empty else pd.concat([table, more], ignore_index=True)
    order = [name for name in ("row", "layer", "position", "slot", "head") if name in joined]
    if "step" in joined:
        order = [name for name in ("row", "step", "layer", "head") if name in joined]
    joined = joined.sort_values(order, ignore_index=True)
    joined.attrs = more.attrs
    return joined
