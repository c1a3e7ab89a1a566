"""Two prompts as a pair: which position of the one stands for which position of the other.

The *clean* prompt is the one that the model answers as it should; the *corrupted* one differs in what matters (another
name, another picture) and makes it answer otherwise.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.prompt.prompt import Prompt
from llama4lab.run.recording import as_prompt

Side = Literal["clean", "corrupted"]
Mapped = Mapping[int, int]
NOWHERE = -1


def other_side(side: Side) -> Side:
    """The other one of the two."""
    return "corrupted" if side == "clean" else "clean"


@dataclass(frozen=True, eq=False)
class Pair:
    """A clean and a corrupted prompt, row by row.

    Attributes:
        clean: The clean prompt.
        corrupted: The corrupted prompt.
        mapping: For each row and position of the corrupted prompt its position in the clean one; `NOWHERE` for none.
    """

    clean: Prompt
    corrupted: Prompt
    mapping: Int[Tensor, "row seq"]

    def prompt(self, side: Side) -> Prompt:
        """One of the two."""
        return self.clean if side == "clean" else self.corrupted

    def sources(self, into: Side) -> Int[Tensor, "row seq"]:
        """For each row and position of the patched prompt, the position in the other one; `NOWHERE` for none."""
        if into == "corrupted":
            return self.mapping
        back = torch.full(self.clean.input_ids.shape, NOWHERE)
        row, position = (self.mapping != NOWHERE).nonzero(as_tuple=True)
        back[row, self.mapping[row, position]] = position
        return back

    @property
    def alike(self) -> bool:
        """Whether every position stands for itself."""
        batch, seq = self.corrupted.input_ids.shape
        return self.clean.input_ids.shape == (batch, seq) and bool((self.mapping == torch.arange(seq)).all())


def paired(
    model: HookedPreTrainedModel, clean: Any, corrupted: Any, align: Mapped | Sequence[Mapped] | None = None
) -> Pair:
    """Checks that two prompts can be compared position by position.

    Args:
        model: The model that they are for.
        clean: A `Prompt`, or anything that `model.prompt` takes.
        corrupted: The same, with as many rows.
        align: Position in the clean prompt -> position in the corrupted one, padding counted, for prompts whose tokens
            do not stand at the same places; or one such mapping for each row. See `matching_positions`.

    Raises:
        ValueError: if the prompts differ in rows, length, padding or in where their images stand and there is no
            mapping; the message says where they part. Or if a mapping leaves a prompt or maps two positions to one.
    """
    clean, corrupted = as_prompt(model, clean), as_prompt(model, corrupted)
    if len(clean) != len(corrupted):
        raise ValueError(
            f"The clean prompt has {len(clean)} rows and the corrupted one {len(corrupted)}.\n"
            "Pair each row with one row of the other."
        )
    if align is not None:
        each = [align] * len(clean) if isinstance(align, Mapping) else list(align)
        return Pair(clean, corrupted, _from_mappings(each, clean, corrupted))
    for row in range(len(clean)):
        _check_row(row, clean, corrupted)
    return Pair(clean, corrupted, torch.arange(clean.input_ids.shape[1]).repeat(len(clean), 1))


def matching_positions(clean: Prompt, corrupted: Prompt, row: int = 0) -> dict[int, int]:
    """Gives a mapping for `align=`: the positions of tokens that two prompts have in common, in order.

    Replaced words of the same number of tokens are matched too; what only one prompt has is left out.

    Args:
        clean: The clean prompt.
        corrupted: The corrupted prompt.
        row: The row of both.
    """
    (first, a), (second, b) = _tokens(clean, row), _tokens(corrupted, row)
    mapping: dict[int, int] = {}
    for kind, start, end, other, other_end in SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if kind == "equal" or (kind == "replace" and end - start == other_end - other):
            mapping |= {first + start + i: second + other + i for i in range(end - start)}
    return mapping


def _tokens(prompt: Prompt, row: int) -> tuple[int, list[int]]:
    """The first position of a row that is not padding, and the ids from there."""
    first = int(prompt.attention_mask[row].argmax())
    return first, prompt.input_ids[row, first:].tolist()


def _check_row(row: int, clean: Prompt, corrupted: Prompt) -> None:
    (first, a), (second, b) = _tokens(clean, row), _tokens(corrupted, row)
    where = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    advice = (
        "Pass align={clean position: corrupted position, ...}, for example lab.matching_positions(clean, corrupted)."
    )
    if len(a) != len(b):
        raise ValueError(
            f"Row {row} has {len(a)} tokens in the clean prompt and {len(b)} in the corrupted one; they part at "
            f"position {first + where}: {_shown(clean, row, first + where)} against "
            f"{_shown(corrupted, row, second + where)}.\n" + advice
        )
    if first != second or clean.input_ids.shape != corrupted.input_ids.shape:
        raise ValueError(
            f"Row {row} begins at position {first} in the clean prompt and at {second} in the corrupted one, because "
            f"they are padded otherwise.\nPair the rows that are equally long, or {advice[0].lower()}{advice[1:]}"
        )
    kinds = zip(clean.modality[row], corrupted.modality[row], strict=True)
    parted = next((i for i, (x, y) in enumerate(kinds) if (x == "image") != (y == "image")), None)
    grids = [[image.grid for image in prompt.images if image.row == row] for prompt in (clean, corrupted)]
    if parted is not None or grids[0] != grids[1]:
        where = f"position {parted}" if parted is not None else f"their tiles, {grids[0]} against {grids[1]}"
        raise ValueError(f"Row {row} has different images in the two prompts; they part at {where}.\n" + advice)


def _shown(prompt: Prompt, row: int, position: int) -> str:
    tokens = prompt.tokens[row]
    return repr(tokens[position]) if position < len(tokens) else "the end"


def _from_mappings(each: Sequence[Mapped], clean: Prompt, corrupted: Prompt) -> Int[Tensor, "row seq"]:
    if len(each) != len(clean):
        raise ValueError(f"align has {len(each)} mappings, but there are {len(clean)} rows.")
    mapping = torch.full(corrupted.input_ids.shape, NOWHERE)
    for row, pairs in enumerate(each):
        taken: set[int] = set()
        for source, target in pairs.items():
            for side, prompt, position in (("clean", clean, source), ("corrupted", corrupted, target)):
                if not 0 <= position < prompt.input_ids.shape[1] or not prompt.attention_mask[row, position]:
                    raise ValueError(f"align maps {source} to {target}; the {side} prompt has no token {position}.")
            if target in taken:
                raise ValueError(f"align maps two clean positions to the corrupted position {target} of row {row}.")
            taken.add(target)
            mapping[row, target] = source
    return mapping
