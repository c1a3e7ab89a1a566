"""What one pass of the model left behind."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from html import escape
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from llama4lab.prompt.prompt import Prompt
from llama4lab.run import run_file

Index = int | slice | Sequence[int]


@dataclass(repr=False)
class Run(Mapping[str, Tensor]):
    """The recorded tensors of a pass, by the names of their hook points.

    Attributes:
        tensors: Hook point name -> tensor.
        shapes: Hook point name -> shape in words, for example `"batch seq d_model"`.
        logits: Of every position of the pass (of the new tokens only, if the run was generated).
        prompt: What was run, the generated tokens included.
        meta: Facts about the model that readers of activations need; see `llama4lab.model.facts`.
        rows: The row of the prompt that each batch row of the tensors comes from.
        positions: The position in the prompt that each place of a "seq" or "query" axis comes from.
        logit_positions: The position in the prompt whose next token each place of the logits is about.
    """

    tensors: dict[str, Tensor]
    shapes: dict[str, str]
    logits: Float[Tensor, "batch seq vocab"]
    prompt: Prompt
    meta: dict[str, Any]
    rows: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    logit_positions: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rows = self.rows or list(range(self.prompt.input_ids.shape[0]))
        self.positions = self.positions or list(range(self.prompt.input_ids.shape[1]))
        if not self.logit_positions and self.logits.shape[1]:
            self.logit_positions = self.positions

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.tensors:
            near = get_close_matches(name, self.tensors, n=4, cutoff=0.4)
            raise KeyError(f"{name!r} was not recorded. Recorded and near: {', '.join(near) or 'none'}; see run.names.")
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    @property
    def names(self) -> list[str]:
        """The recorded hook points, in the order of the forward pass."""
        return list(self.tensors)

    @property
    def nbytes(self) -> int:
        """Size of all tensors, the logits included, in bytes."""
        return sum(tensor.nbytes for tensor in (*self.tensors.values(), self.logits))

    def layers(self, suffix: str) -> dict[int, Tensor]:
        """The tensors of one hook point of the text layers, by layer.

        Args:
            suffix: What follows `layers.{i}.` in the name, for example `"feed_forward.router.logits"`.

        Raises:
            KeyError: if it was recorded in no layer.
        """
        found = {
            int(name.split(".")[1]): tensor
            for name, tensor in self.tensors.items()
            if name.startswith("layers.") and name.split(".", 2)[2] == suffix
        }
        if not found:
            raise KeyError(
                f'No layer of this run has {suffix!r}. Record it with at="layers.*.{suffix}"; recorded are '
                f"{', '.join(self.names[:6])}{' ...' if len(self) > 6 else ''}."
            )
        return found

    def cut(self, *, rows: Index = slice(None), positions: Index = slice(None)) -> "Run":
        """A run of only some rows of the batch and some positions; axes stay, also those of length 1.

        Keys of scores and patterns, and tiles of the vision tower, are not cut.

        Args:
            rows: An index, a slice or a list of indices of batch rows.
            positions: The same for positions, negative ones counting from the end.
        """
        row = _indices(rows, len(self.rows), "rows")
        position = _indices(positions, len(self.positions), "positions")

        def cut(tensor: Tensor, words: list[str]) -> Tensor:
            for axis, word in enumerate(words):
                if word == "batch":
                    tensor = tensor[(slice(None),) * axis + (row,)]
                elif word in ("seq", "query") and words[0] == "batch":
                    tensor = tensor[(slice(None),) * axis + (position,)]
            return tensor

        tensors = {name: cut(tensor, self.shapes[name].split()) for name, tensor in self.tensors.items()}
        places = [self.positions[i] for i in position]
        index = {place: i for i, place in enumerate(self.logit_positions)}
        of_logits = [index[place] for place in places if place in index]
        return replace(
            self,
            tensors=tensors,
            logits=self.logits[row][:, of_logits],
            rows=[self.rows[i] for i in row],
            positions=places,
            logit_positions=[self.logit_positions[i] for i in of_logits],
        )

    def save(self, path: str | Path) -> None:
        """Writes the run to one safetensors file; a file that is there already is replaced only when all is written."""
        header = {"shapes": self.shapes, "meta": self.meta, "rows": self.rows, "positions": self.positions}
        header["logit_positions"] = self.logit_positions
        run_file.write(Path(path), {**self.tensors, "run.logits": self.logits}, header, self.prompt)

    @classmethod
    def load(cls, path: str | Path) -> "Run":
        """Reads what `save` wrote.

        Raises:
            ValueError: if the file is not a run of llama4lab.
        """
        tensors, header, prompt = run_file.read(Path(path))
        return cls(logits=tensors.pop("run.logits"), tensors=tensors, prompt=prompt, **header)

    def __repr__(self) -> str:
        batch, seq = self.logits.shape[0], len(self.positions)
        head = f"Run: {batch} x {seq} tokens, {len(self)} hook points, {self.nbytes / 2**20:.1f} MiB"
        return "\n".join([head, *(f"  {' '.join(row)}" for row in self._families())])

    def _repr_html_(self) -> str:
        batch, seq = self.logits.shape[0], len(self.positions)
        rows = "".join(
            "<tr>" + "".join(f"<td style='text-align:left'>{escape(cell)}</td>" for cell in row) + "</tr>"
            for row in self._families()
        )
        head = f"Run: {batch} × {seq} tokens, {self.nbytes / 2**20:.1f} MiB"
        return f"<b>{head}</b><table><tr><th>hook point</th><th>shape</th><th>layers</th></tr>{rows}</table>"

    def _families(self) -> list[tuple[str, str, str]]:
        """One row for hook points that differ only in the layer."""
        families: dict[tuple[str, str], list[str]] = {}
        for name, tensor in self.tensors.items():
            head, found, rest = name.partition("layers.")
            layer, _, tail = rest.partition(".")
            family = f"{head}layers.{{i}}.{tail}" if found else name
            families.setdefault((family, str(list(tensor.shape))), []).append(layer)
        return [(name, shape, ", ".join(filter(None, layers))) for (name, shape), layers in families.items()]


def _indices(index: Index, length: int, axis: str) -> list[int]:
    if isinstance(index, slice):
        return list(range(length))[index]
    wanted = [index] if isinstance(index, int) else list(index)
    wrong = [i for i in wanted if not -length <= i < length]
    if wrong:
        raise IndexError(f"{axis} holds {wrong[0]}, but the run has {length} {axis} (0 to {length - 1}).")
    return [i % length for i in wanted]
