"""`Sweep`: what patching did, cell by cell."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from llama4lab.prompt.prompt import Prompt, shared_tokens
from llama4lab.prompt.tokenizer import token_strings
from llama4lab.run import run_file
from llama4lab.run.pairing import Side
from llama4lab.run.sweep_axes import Value

KIND = "llama4lab.sweep/1"
MEASURES = ("patched", "clean", "corrupted", "effect", "normalised", "effect_std")


@dataclass(frozen=True, eq=False)
class TopTokens:
    """The most probable next tokens at the last position that the metric reads.

    Attributes:
        ids: Their ids.
        log_probs: The logarithms (base e) of their probabilities.
    """

    ids: Int[Tensor, "*lead shown"]
    log_probs: Float[Tensor, "*lead shown"]


@dataclass(repr=False, eq=False)
class Sweep:
    """The metric of every cell of a grid of patches.

    Attributes:
        axes: Axis -> its values, in order.
        labels: For each cell its value on each axis.
        at: The hook points that were patched.
        metric: The name of the metric.
        into: Which of the two runs was patched.
        values: What was put in: "other" (the other run's values), or a description.
        prompt: The prompt that was patched.
        patched: The metric of each cell in each row; NaN for cells that have not run.
        clean: The metric of the clean run.
        corrupted: The metric of the corrupted run; NaN if there was none.
        top: The most probable tokens of each cell in each row, and of both runs ("patched", "clean", "corrupted").
    """

    axes: dict[str, list[Value]]
    labels: list[dict[str, Value]]
    at: list[str]
    metric: str
    into: Side
    values: str
    prompt: Prompt
    patched: Float[Tensor, "cell row"]
    clean: Float[Tensor, " row"]
    corrupted: Float[Tensor, " row"]
    top: dict[str, TopTokens]
    fingerprint: str = ""
    vocabulary: dict[int, str] = field(default_factory=dict)
    plotter: ClassVar[Callable[..., Any] | None] = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def complete(self) -> bool:
        """Whether every cell has run."""
        return not bool(self.patched.isnan().any())

    @property
    def base(self) -> Float[Tensor, " row"]:
        """The metric of the run that was patched, without the patch."""
        return self.corrupted if self.into == "corrupted" else self.clean

    @property
    def source(self) -> Float[Tensor, " row"]:
        """The metric of the other run."""
        return self.clean if self.into == "corrupted" else self.corrupted

    @property
    def table(self) -> pd.DataFrame:
        """One line for each cell: means over the rows of the pair.

        Columns:
            layer, position, head, ...: the axes of the sweep, in its order.
            token: beside `position`, its text in the patched prompt; "" where rows differ.
            patched: the metric under the patch.
            clean: of the clean run.
            corrupted: of the corrupted run.
            effect: `patched` minus the value of the run that was patched.
            normalised: `effect` as a share of the difference between the two runs: 0 if the patch does nothing, 1 if it
                makes the patched run like the other one.
            effect_std: standard deviation of the effect over the rows (0 for one row).
            pairs: the number of rows.
        """
        effect = self.patched - self.base
        spread = effect.std(dim=1) if self.patched.shape[1] > 1 else torch.zeros(len(self))
        table = self._labelled(self.labels)
        self._measure(table, self.patched.mean(1), self.clean.mean(), self.corrupted.mean())
        table["effect_std"] = spread.double().numpy()
        table["pairs"] = self.patched.shape[1]
        return table

    @property
    def by_row(self) -> pd.DataFrame:
        """One line for each cell and row of the pair; columns as in `table`, with `row` and without the last two."""
        parts = []
        for row in range(self.patched.shape[1]):
            part = self._labelled(self.labels, row)
            part.insert(len(part.columns), "row", row)
            self._measure(part, self.patched[:, row], self.clean[row], self.corrupted[row])
            parts.append(part)
        whole = pd.concat(parts, ignore_index=True)
        whole.attrs = parts[0].attrs
        return whole

    def tensor(self, column: str = "normalised") -> Float[Tensor, "..."]:
        """One column of the table, shaped by the axes in their order; NaN where there is no such cell.

        Raises:
            ValueError: if there is no such column.
        """
        if column not in MEASURES:
            raise ValueError(f"{column!r} is no measure of a sweep; choose from {', '.join(MEASURES)}.")
        grid = torch.full([len(values) for values in self.axes.values()], torch.nan, dtype=torch.float64)
        numbers = self.table[column].to_numpy()
        places = {axis: {value: i for i, value in enumerate(values)} for axis, values in self.axes.items()}
        for label, number in zip(self.labels, numbers, strict=True):
            grid[tuple(places[axis][value] for axis, value in label.items())] = number
        return grid

    def top_tokens(self, cell: Mapping[str, Value], row: int = 0) -> pd.DataFrame:
        """What the model expects next at a cell, and in both runs without any patch.

        Args:
            cell: The value of every axis, for example `{"layer": 3, "position": 5}`.
            row: The row of the pair.

        Columns:
            run: "clean", "corrupted" or "patched".
            rank: 0 for the most probable.
            token_id: id of the token.
            token: its text.
            prob: its probability.

        Raises:
            KeyError: if there is no such cell.
        """
        index = self._index(cell)
        parts = []
        for run in ("clean", "corrupted", "patched"):
            if run not in self.top:
                continue
            top = self.top[run]
            ids = (top.ids[index, row] if run == "patched" else top.ids[row]).tolist()
            log_probs = top.log_probs[index, row] if run == "patched" else top.log_probs[row]
            columns = {"run": run, "rank": range(len(ids)), "token_id": ids, "token": self._tokens(ids)}
            parts.append(pd.DataFrame({**columns, "prob": log_probs.double().exp().numpy()}))
        return pd.concat(parts, ignore_index=True)

    def plot(self, column: str = "normalised", *, ax: Any = None, **options: Any) -> Any:
        """Draws the sweep by `viz.patching.effects`, whose options it takes; gives the Axes."""
        if Sweep.plotter is None:
            raise RuntimeError("Plots are in llama4lab.viz: `import llama4lab` makes them known.")
        return Sweep.plotter(self.table, column=column, ax=ax, **options)

    def save(self, path: str | Path) -> None:
        """Writes the sweep to one safetensors file, which is replaced only when all is written."""
        tensors = {"patched": self.patched, "clean": self.clean, "corrupted": self.corrupted}
        for run, top in self.top.items():
            tensors |= {f"top.{run}.ids": top.ids, f"top.{run}.log_probs": top.log_probs}
        seen = sorted({int(i) for top in self.top.values() for i in top.ids.unique().tolist() if i >= 0})
        header = {
            "axes": self.axes,
            "labels": [list(label.values()) for label in self.labels],
            "at": self.at,
            "metric": self.metric,
            "into": self.into,
            "values": self.values,
            "fingerprint": self.fingerprint,
            "vocabulary": dict(zip(seen, self._tokens(seen), strict=True)),
        }
        run_file.write(Path(path), tensors, header, self.prompt, KIND)

    @classmethod
    def load(cls, path: str | Path) -> "Sweep":
        """Reads what `save` wrote.

        Raises:
            ValueError: if the file is not a sweep.
        """
        tensors, header, prompt = run_file.read(Path(path), KIND)
        axes = {axis: [_hashable(value) for value in values] for axis, values in header.pop("axes").items()}
        labels = [dict(zip(axes, map(_hashable, label), strict=True)) for label in header.pop("labels")]
        vocabulary = {int(i): text for i, text in header.pop("vocabulary").items()}
        runs = [name.split(".")[1] for name in tensors if name.endswith(".ids")]
        top = {run: TopTokens(tensors[f"top.{run}.ids"], tensors[f"top.{run}.log_probs"]) for run in runs}
        values = {name: tensors[name] for name in ("patched", "clean", "corrupted")}
        return cls(axes=axes, labels=labels, prompt=prompt, top=top, vocabulary=vocabulary, **values, **header)

    def _labelled(self, labels: list[dict[str, Value]], row: int | None = None) -> pd.DataFrame:
        """The axes of every cell, and the tokens of positions."""
        table = pd.DataFrame({axis: [label[axis] for label in labels] for axis in self.axes})
        table.attrs = {"metric": self.metric, "into": self.into}
        if "position" in self.axes:
            rows = self.prompt.tokens if row is None else [self.prompt.tokens[row]]
            shared = shared_tokens(rows)
            texts = ["".join(shared[p] for p in _parts(label["position"])) for label in labels]
            table.insert(list(self.axes).index("position") + 1, "token", texts)
        return table

    def _measure(self, table: pd.DataFrame, patched: Tensor, clean: Tensor, corrupted: Tensor) -> None:
        base, source = (corrupted, clean) if self.into == "corrupted" else (clean, corrupted)
        table["patched"], table["clean"], table["corrupted"] = patched.double().numpy(), float(clean), float(corrupted)
        table["effect"] = (patched.double() - base.double()).numpy()
        difference = float(source.double() - base.double())
        table["normalised"] = table["effect"] / difference if difference else np.nan

    def _index(self, cell: Mapping[str, Value]) -> int:
        wanted = {axis: _hashable(value) for axis, value in cell.items()}
        for index, label in enumerate(self.labels):
            if label == wanted:
                return index
        raise KeyError(f"There is no cell {dict(cell)}. The axes are {self._shown_axes()}.")

    def _tokens(self, ids: list[int]) -> list[str]:
        if self.prompt.tokenizer is None and self.vocabulary:
            return [self.vocabulary.get(i, f"<{i}>") for i in ids]
        return token_strings(self.prompt.tokenizer, ids)

    def _shown_axes(self) -> str:
        return ", ".join(f"{axis} ({values[0]} to {values[-1]})" for axis, values in self.axes.items() if values)

    def __repr__(self) -> str:
        done = int((~self.patched.isnan().any(1)).sum())
        state = "" if self.complete else f", {done} of them run"
        effect = f"{float(self.clean.mean()):.3g} clean, {float(self.corrupted.mean()):.3g} corrupted"
        return (
            f"Sweep: {len(self)} cells{state}, {self._shown_axes()}; {self.patched.shape[1]} pairs\n"
            f"  {self.metric}: {effect}; values {self.values} into {self.into}"
        )

    def _repr_html_(self) -> str:
        lines = repr(self).split("\n")
        table = self.table.sort_values("effect", key=np.abs, ascending=False).head(8)
        return f"<b>{lines[0]}</b><br>{lines[1]}; largest effects:{table.to_html(index=False, float_format='%.3g')}"


def _hashable(value: Any) -> Value:
    return tuple(value) if isinstance(value, list | tuple) else value


def _parts(value: Value) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)
