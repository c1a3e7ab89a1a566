"""Replacing chosen numbers of a hook point's tensor, token by token: by another run's, by constants, by a function.

Every tensor is looked at as tokens: its batch (or tile) axis and its token axis become one, the other axes follow. That
makes the same code serve whole runs, packed passes and the vision tower.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

PLACES = ("seq", "query", "patch", "image_token")
Function = Callable[[Tensor, Tensor], Tensor]
Values = str | float | int | Mapping[str, Tensor] | Function


def place_axis(words: list[str]) -> int:
    """The axis of a hook point that counts tokens or image patches."""
    return next(axis for axis, word in enumerate(words) if word in PLACES)


def inner_words(shape: str) -> list[str]:
    """The words of the axes besides batch (or tile) and token."""
    return [word for word in shape.split()[1:] if word not in PLACES]


def as_tokens(tensor: Shaped[Tensor, "..."], shape: str) -> Shaped[Tensor, "token ..."]:
    """A hook point's tensor with its first axis and its token axis joined, row by row."""
    return tensor.movedim(place_axis(shape.split()), 1).flatten(0, 1)


def from_tokens(tokens: Shaped[Tensor, "token ..."], shape: str, like: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """The inverse of `as_tokens` for a tensor of the shape of `like`."""
    axis = place_axis(shape.split())
    return tokens.unflatten(0, (like.shape[0], like.shape[axis])).movedim(1, axis)


@dataclass(frozen=True, eq=False)
class Substitution:
    """What is replaced at one hook point: K entries, each a token and, on the inner axes, an index or everything.

    Attributes:
        name: The hook point.
        shape: Its shape in words.
        unit: Whom each entry belongs to.
        lead: The row (or tile) of each entry in the patched prompt.
        place: The position (or image patch) of each entry in the patched prompt.
        inner: For each inner axis an index for every entry, or None for everything.
        expert: For `experts.out` and `experts.hidden`: the expert of each entry, whichever slot it has; or None.
    """

    name: str
    shape: str
    unit: Int[Tensor, " entry"]
    lead: Int[Tensor, " entry"]
    place: Int[Tensor, " entry"]
    inner: tuple[Tensor | None, ...]
    expert: Int[Tensor, " entry"] | None = None

    def only(self, kept: Bool[Tensor, " entry"]) -> "Substitution":
        """Some of the entries."""
        return replace(
            self,
            unit=self.unit[kept],
            lead=self.lead[kept],
            place=self.place[kept],
            inner=tuple(None if index is None else index[kept] for index in self.inner),
            expert=None if self.expert is None else self.expert[kept],
        )


@dataclass(frozen=True, eq=False)
class Source:
    """What the values are taken from, at the tokens of each entry.

    Attributes:
        tokens: The other run's tensor as tokens; None if it is not needed.
        at: Index into it for each entry.
        indices: The experts that each of its tokens was sent to, where entries speak of experts.
    """

    tokens: Shaped[Tensor, "token ..."] | None
    at: Int[Tensor, " entry"]
    indices: Int[Tensor, "token slot"] | None = None


def substituted(
    tokens: Shaped[Tensor, "token ..."],
    at: Int[Tensor, " entry"],
    entries: Substitution,
    source: Source,
    values: Values,
    indices: Int[Tensor, "token slot"] | None = None,
) -> Shaped[Tensor, "token ..."]:
    """Gives the tokens with the entries replaced.

    Args:
        tokens: What the hook point has now.
        at: The token of each entry.
        entries: What is replaced.
        source: The other run.
        values: "other" for the other run's values, a number, a mapping of names to tensors (which `source` then holds),
            or a function of both.
        indices: The experts that each token is sent to now, where entries speak of experts.
    """
    if entries.expert is not None:
        assert indices is not None
        if entries.name.endswith(".hidden"):
            return _with_neurons(tokens, at, entries, source, values, indices)
        return _with_expert(tokens, at, entries, source, values, indices)
    index = tuple(slice(None) if axis is None else axis for axis in entries.inner)
    new = tokens.clone()
    new[(at, *index)] = _new(values, entries.name, lambda: tokens[at], lambda: _taken(source, tokens), index, tokens)
    return new


def _taken(source: Source, like: Tensor) -> Tensor:
    """The other run's tokens; of patterns only as many keys as this pass has."""
    assert source.tokens is not None
    taken = source.tokens[source.at].to(like.device)
    return taken[..., : like.shape[-1]]


def _new(
    values: Values,
    name: str,
    now: Callable[[], Tensor],
    other: Callable[[], Tensor],
    index: tuple[Tensor | slice, ...],
    like: Tensor,
) -> Tensor:
    """The new numbers of the chosen inner indices of each entry."""
    if isinstance(values, int | float):
        return torch.tensor(values, dtype=like.dtype, device=like.device)
    if callable(values):
        old = now()
        full = values(old, other())
        if not isinstance(full, Tensor) or full.shape != old.shape:
            found = list(full.shape) if isinstance(full, Tensor) else type(full).__name__
            raise ValueError(
                f"The function for {name!r} returned {found}; it was called with tensors of shape {list(old.shape)}.\n"
                "Give a tensor of that shape; the first axis counts tokens, which are to be treated one by one."
            )
    else:
        full = other()
    each = torch.arange(full.shape[0], device=full.device)
    return full[(each, *index)].to(like.dtype)


def _of_expert(source: Source, expert: Int[Tensor, " entry"]) -> Float[Tensor, "entry d"]:
    """What the slots of an expert hold in the other run; 0 for tokens that are not sent to it there."""
    assert source.tokens is not None
    taken = source.tokens[source.at]
    if source.indices is None:  # given values, which have no slots
        return taken
    return (taken * (source.indices[source.at] == expert[:, None])[..., None]).sum(1)


def _with_expert(
    tokens: Float[Tensor, "token slot d_model"],
    at: Int[Tensor, " entry"],
    entries: Substitution,
    source: Source,
    values: Values,
    indices: Int[Tensor, "token slot"],
) -> Float[Tensor, "token slot d_model"]:
    """Replaces what one expert adds to each token: nothing, where the token was not sent to it."""
    expert = entries.expert
    assert expert is not None
    own = indices[at] == expert[:, None]

    def now() -> Tensor:
        return (tokens[at] * own[..., None]).sum(1)

    part = _new(values, entries.name, now, lambda: _of_expert(source, expert), (slice(None),), tokens)
    rows = tokens[at] * ~own[..., None]
    slot = own.int().argmax(1)
    rows[torch.arange(len(at)), slot] = rows[torch.arange(len(at)), slot] + part
    new = tokens.clone()
    new[at] = rows
    return new


def _with_neurons(
    tokens: Float[Tensor, "token slot d_ff"],
    at: Int[Tensor, " entry"],
    entries: Substitution,
    source: Source,
    values: Values,
    indices: Int[Tensor, "token slot"],
) -> Float[Tensor, "token slot d_ff"]:
    """Replaces neurons of one expert, at the tokens that are sent to it; 0 where the other run's token is not."""
    assert entries.expert is not None
    kept = (indices[at] == entries.expert[:, None]).any(1)
    at, entries, source = at[kept], entries.only(kept), replace(source, at=source.at[kept])
    expert = entries.expert
    assert expert is not None
    slot = (indices[at] == expert[:, None]).int().argmax(1)

    index = tuple(slice(None) if axis is None else axis for axis in entries.inner[1:])
    new = tokens.clone()
    new[(at, slot, *index)] = _new(
        values, entries.name, lambda: tokens[at, slot], lambda: _of_expert(source, expert), index, tokens
    )
    return new
