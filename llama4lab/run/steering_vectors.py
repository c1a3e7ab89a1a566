"""Steering vectors: the direction in which two kinds of prompts differ, at one or several hook points."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.prompt.prompt import Prompt
from llama4lab.run.examples import row_means, runs_over, token_mask
from llama4lab.run.run import Run
from llama4lab.run.selection import Selector, selected
from llama4lab.run.tensor_file import read_tensors, write_tensors

FORMAT = "llama4lab.steering_vector/1"
Position = int | None | Callable[[Prompt], Sequence[int]]


@dataclass(frozen=True, eq=False, repr=False)
class SteeringVector(Mapping[str, Tensor]):
    """What is added to a token at each hook point, by the name of the hook point.

    `2 * vector` and `-vector` are vectors too.

    Attributes:
        tensors: Hook point name -> its shape without "batch seq", in float32 on the CPU.
        facts: How the vector was made, as plain data: the number of examples, the position, and for pairs the
            `agreement`, the mean cosine between the difference of a pair and the vector.
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        wrong = [name for name, tensor in self.tensors.items() if not bool(torch.isfinite(tensor).all())]
        if wrong or not self.tensors:
            raise ValueError(
                f"A steering vector needs finite numbers; it has {wrong[0] if wrong else 'no hook point'}."
            )

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise KeyError(f"{name!r} is not in the vector, which has {', '.join(self.tensors)}.")
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    @property
    def norms(self) -> dict[str, float]:
        """The length of the vector at each hook point."""
        return {name: float(tensor.float().norm()) for name, tensor in self.tensors.items()}

    def unit(self) -> "SteeringVector":
        """The same directions with length 1 at each hook point.

        Raises:
            ValueError: if the vector is zero somewhere.
        """
        norms = self.norms
        zero = [name for name, norm in norms.items() if norm == 0]
        if zero:
            raise ValueError(f"The vector is zero at {zero[0]}; it has no direction there.")
        return replace(self, tensors={name: tensor / norms[name] for name, tensor in self.tensors.items()})

    def __mul__(self, factor: float | int) -> "SteeringVector":
        return replace(self, tensors={name: factor * tensor for name, tensor in self.tensors.items()})

    __rmul__ = __mul__

    def __neg__(self) -> "SteeringVector":
        return self * -1

    def __repr__(self) -> str:
        lines = [f"  {name} {list(self[name].shape)}, norm {norm:.3g}" for name, norm in self.norms.items()]
        known = ", ".join(f"{key} {value}" for key, value in self.facts.items() if not isinstance(value, dict))
        return "\n".join([f"SteeringVector: {known}" if known else "SteeringVector", *lines])

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file; a file that is there already is replaced only when all is written."""
        metadata = {"order": json.dumps(list(self)), "facts": json.dumps(self.facts)}
        write_tensors(path, FORMAT, self.tensors, metadata)

    @classmethod
    def load(cls, path: str | Path) -> "SteeringVector":
        """Reads what `save` wrote.

        Raises:
            ValueError: if the file is no steering vector.
        """
        stored, metadata = read_tensors(path, FORMAT)
        tensors = {name: stored[name] for name in json.loads(metadata["order"])}
        return cls(tensors, json.loads(metadata["facts"]))


def steering_vector(
    model: HookedPreTrainedModel,
    positive: Any,
    negative: Any,
    *,
    at: Selector,
    position: Position = -1,
    pairs: bool = False,
) -> SteeringVector:
    """Gives the difference between the means of two sets of prompts: from the negative ones to the positive ones.

    Every prompt counts the same, however long it is. The mean of the differences of pairs is the same vector; with
    `pairs=True` the vector also knows how far the pairs agree (`facts["agreement"]`).
    (Difference of means: Marks and Tegmark 2023, arXiv 2310.06824; pairs: Rimsky et al. 2023, arXiv 2312.06681.)

    Args:
        model: The model.
        positive: Prompts with what is to be added: a `Prompt`, a `Run`, a list of either, or anything that
            `model.prompt` takes.
        negative: Prompts without it.
        at: Hook points of the shape "batch seq ...", for example `"layers.*.resid_post"`.
        position: Where to read: a position of the prompts (padding counted, -1 is the last one); None for the mean over
            all tokens; or a function from a prompt to one position for each row, for example
            `lambda prompt: [prompt.position(" film", row) for row in range(len(prompt))]`.
        pairs: Whether row i of the one set is the counterpart of row i of the other.

    Raises:
        ValueError: if a hook point has other axes, or the sets of pairs differ in size.
        IndexError: if a prompt has no token at the position.
    """
    names = selected(model.hook_points(), at)
    for name in names:
        words = model.hook_points()[name].split()
        if words[:2] != ["batch", "seq"] or name in ("embed", "logits") or name.endswith(".indices"):
            raise ValueError(
                f"A steering vector was asked for at {name} ({' '.join(words)}).\n"
                "It is added to the values of a token: take embed_merged, resid_post, self_attn.out, ..."
            )
    plus, minus = (_values(model, examples, names, position) for examples in (positive, negative))
    counts = len(plus[names[0]]), len(minus[names[0]])
    if pairs and counts[0] != counts[1]:
        raise ValueError(
            f"pairs=True needs as many positive as negative prompts; there are {counts[0]} and {counts[1]}."
        )
    tensors = {name: plus[name].mean(0) - minus[name].mean(0) for name in names}
    where = "all tokens" if position is None else position if isinstance(position, int) else "chosen"
    facts: dict[str, Any] = {"positive": counts[0], "negative": counts[1], "position": where}
    if pairs:
        each = {name: plus[name] - minus[name] for name in names}
        facts["agreement"] = {name: _agreement(each[name], tensors[name]) for name in names}
    return SteeringVector(tensors, facts)


def _agreement(differences: Float[Tensor, "pair ..."], vector: Float[Tensor, "..."]) -> float:
    return torch.cosine_similarity(differences.flatten(1), vector.flatten()[None], dim=1).mean().item()


def _values(
    model: HookedPreTrainedModel, examples: Any, names: list[str], position: Position
) -> dict[str, Float[Tensor, "row ..."]]:
    """Hook point -> the value of each example."""
    kept: dict[str, list[Tensor]] = {name: [] for name in names}
    for run in runs_over(model, examples, names):
        places = None if position is None else _places(run, position)
        for name in names:
            tensor = run[name].detach().float()
            values = row_means(run, name) if places is None else tensor[range(len(tensor)), places]
            kept[name].append(values.cpu())
    return {name: torch.cat(parts) for name, parts in kept.items()}


def _places(run: Run, position: int | Callable[[Prompt], Sequence[int]]) -> list[int]:
    """The index on the "seq" axis for each row of a run."""
    length = run.prompt.input_ids.shape[1]
    asked = [position] * len(run.prompt) if isinstance(position, int) else list(position(run.prompt))
    if len(asked) != len(run.prompt):
        raise ValueError(f"position gave {len(asked)} positions for {len(run.prompt)} rows; give one for each row.")
    mask, places = token_mask(run), []
    for index, row in enumerate(run.rows):
        # The last token of a generated run was never read: -1 is the last one that was.
        place = run.positions[-1] + 1 + asked[row] if asked[row] < 0 else asked[row]
        if place not in run.positions or not mask[index, run.positions.index(place)]:
            raise IndexError(f"Position {asked[row]} was asked for; row {row} of {length} places has no token there.")
        places.append(run.positions.index(place))
    return places
