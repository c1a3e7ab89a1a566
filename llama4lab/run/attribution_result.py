"""`Attribution`: the estimated effect of patching, place by place."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from llama4lab.prompt.prompt import Prompt, shared_tokens
from llama4lab.run import run_file
from llama4lab.run.attribution_lines import AXES, has_axis, lines_of
from llama4lab.run.pairing import Side

KIND = "llama4lab.attribution/1"
PARTS = ("first_order", "jump")
STORED = (*PARTS, "by_expert")
BY_EXPERT = "batch seq expert"


@dataclass(repr=False, eq=False)
class Attribution:
    """Estimates of what patching each place of each hook point would do to a metric.

    The estimate of a place is the sum of two parts: what the slope of the metric tells, and what it cannot tell.
    Places whose token has no counterpart in the other prompt have 0, since nothing would be put there.

    Attributes:
        first_order: Hook point -> (source - base) times the derivative of the metric, summed over features.
        jump: Hook point -> what the exact recomputation of a block adds; 0 where nothing is recomputed.
        by_expert: Hook point -> first order with the expert as its last axis instead of the slot.
        shapes: Hook point -> the axes of its tensors in words, for example "batch seq head".
        prompt: The prompt that would be patched, the *base*.
        into: Whether that is the clean or the corrupted one.
        metric: The name of the metric.
        steps: At how many points of the line between the two inputs the slope was taken; 1 for the base run alone.
        clean: The metric of the clean run.
        corrupted: The metric of the corrupted run.
    """

    first_order: dict[str, Tensor]
    jump: dict[str, Tensor]
    by_expert: dict[str, Tensor]
    shapes: dict[str, str]
    prompt: Prompt
    into: Side
    metric: str
    steps: int
    clean: Float[Tensor, " row"]
    corrupted: Float[Tensor, " row"]
    _tensors: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self._tensors = {name: self.first_order[name] + self.jump[name] for name in self.first_order}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Hook point -> estimate, with the axes of `shapes`; that of a whole logit row at `router.logits`."""
        return self._tensors

    @property
    def names(self) -> list[str]:
        """The hook points, in the order of the forward pass."""
        return list(self.first_order)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise KeyError(f"{name!r} was not attributed; there are {', '.join(self.names[:4])}, ...: see .names.")
        return self._tensors[name]

    def only(self, names: Sequence[str]) -> "Attribution":
        """The estimates of some of the hook points."""
        missing = [name for name in names if name not in self.first_order]
        if missing:
            raise KeyError(
                f"{missing[0]!r} was not attributed; there are {', '.join(self.names[:4])}, ...: see .names."
            )
        parts = {part: {name: t for name, t in getattr(self, part).items() if name in names} for part in STORED}
        return replace(self, **parts)

    def table(self, over: Sequence[str] | None = None) -> pd.DataFrame:
        """Gives one line for each cell: means over the rows of the pair. The axes are those of a sweep.

        Args:
            over: The axes; estimates are summed over all others. By default component, layer and position, as far as
                all hook points have them.

        Columns:
            layer, position, head, ...: the axes, in the order of `over`.
            token: beside `position`, its text in the patched prompt; "" where rows differ.
            estimate: the estimated effect, `first_order + jump`.
            first_order: what the slope tells.
            jump: what the exact recomputation of a block adds.
            estimate_std: standard deviation of the estimate over the rows (0 for one row).
            pairs: the number of rows.

        Raises:
            ValueError: if an axis is unknown, or a hook point does not have it.
        """
        axes, lines = self._lines(over)
        rows = len(self.prompt)
        # Rows without a line have nothing to patch there: 0.
        lines = lines.assign(squares=lines["estimate"] ** 2).drop(columns="row")
        table = pd.DataFrame(lines.groupby(axes, sort=False, as_index=False).sum())
        variance = table.pop("squares") - table["estimate"] ** 2 / rows
        table["estimate_std"] = np.sqrt(np.maximum(variance, 0.0) / max(rows - 1, 1))
        for part in ("estimate", *PARTS):
            table[part] /= rows
        table["pairs"] = rows
        return self._finished(table, axes, self.prompt.tokens)

    def by_row(self, over: Sequence[str] | None = None) -> pd.DataFrame:
        """Gives one line for each cell and row of the pair; columns as in `table`, with `row`, without the last two."""
        axes, lines = self._lines(over)
        parts = [
            self._finished(lines.loc[lines["row"] == row], axes, [self.prompt.tokens[row]])
            for row in range(len(self.prompt))
        ]
        whole = pd.concat(parts, ignore_index=True)
        whole.attrs = parts[0].attrs
        return whole

    def save(self, path: str | Path) -> None:
        """Writes the attribution to one safetensors file, which is replaced only when all is written."""
        tensors = {"clean": self.clean, "corrupted": self.corrupted}
        for part in STORED:
            tensors |= {f"{part}.{name}": tensor for name, tensor in getattr(self, part).items()}
        header = {"shapes": self.shapes, "into": self.into, "metric": self.metric, "steps": self.steps}
        run_file.write(Path(path), tensors, header, self.prompt, KIND)

    @classmethod
    def load(cls, path: str | Path) -> "Attribution":
        """Reads what `save` wrote.

        Raises:
            ValueError: if the file is not an attribution.
        """
        tensors, header, prompt = run_file.read(Path(path), KIND)
        parts = {
            part: {name.removeprefix(f"{part}."): t for name, t in tensors.items() if name.startswith(f"{part}.")}
            for part in STORED
        }
        return cls(prompt=prompt, clean=tensors["clean"], corrupted=tensors["corrupted"], **parts, **header)

    def _lines(self, over: Sequence[str] | None) -> tuple[list[str], pd.DataFrame]:
        """The axes, and one line for each cell and row, in the order of the axes."""
        usual = ("component", "layer", "position")
        axes = [axis for axis in usual if self._all_have(axis)] if over is None else list(over)
        if not axes:
            raise ValueError(f"over is empty. Choose axes from {', '.join(AXES)}.")
        parts = []
        for name in self.names:
            shape, first_order, jump = self.shapes[name], self.first_order[name], self.jump[name]
            if "expert" in axes and name in self.by_expert:
                shape, first_order = BY_EXPERT, self.by_expert[name]
                jump = torch.zeros_like(first_order)
            columns = {"estimate": first_order + jump, "first_order": first_order, "jump": jump}
            parts.append(lines_of(name, shape, columns, axes, self.prompt))
        lines = pd.DataFrame(pd.concat(parts).groupby([*axes, "row"], sort=False, as_index=False).sum())
        orders = [_order(lines[axis].tolist()) for axis in axes]
        keys = [[order[value] for value in lines[axis]] for axis, order in zip(axes, orders, strict=True)]
        return axes, lines.iloc[np.lexsort([lines["row"].tolist(), *reversed(keys)])]

    def _all_have(self, axis: str) -> bool:
        return all(has_axis(name, self.shapes[name], axis) for name in self.names)

    def _finished(self, table: pd.DataFrame, axes: list[str], tokens: list[list[str]]) -> pd.DataFrame:
        table = table.reset_index(drop=True)
        table.attrs = {"metric": self.metric, "into": self.into}
        if "position" in axes:
            shared = shared_tokens(tokens)
            table.insert(axes.index("position") + 1, "token", [shared[position] for position in table["position"]])
        return table

    def __repr__(self) -> str:
        start, end = (self.corrupted, self.clean) if self.into == "corrupted" else (self.clean, self.corrupted)
        line = "the slope of the base run" if self.steps == 1 else f"slopes at {self.steps} points between the inputs"
        return (
            f"Attribution: {len(self.names)} hook points, {len(self.prompt)} pairs, {line}\n"
            f"  {self.metric}: {float(start.mean()):.3g} in the {self.into} run, {float(end.mean()):.3g} in the other"
        )

    def _repr_html_(self) -> str:
        lines = repr(self).split("\n")
        table = self.table().sort_values("estimate", key=np.abs, ascending=False).head(8)
        return f"<b>{lines[0]}</b><br>{lines[1]}; largest estimates:{table.to_html(index=False, float_format='%.3g')}"


def _order(values: list[Any]) -> dict[Any, int]:
    """The place of each value on its axis: names as they come, numbers by size."""
    own = list(dict.fromkeys(values))
    return {value: place for place, value in enumerate(own if isinstance(own[0], str) else sorted(own))}
