"""The cells of a sweep: which axes a hook point has, which values they take, and what each cell replaces."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from llama4lab.run.hook_names import component_of, layer_of

Value = int | str | tuple[int, ...]
Over = Sequence[str] | Mapping[str, Iterable[Value] | None]

# Axis -> the words that it means in a shape. The first three are read off the name of the hook point.
NAMED = ("layer", "component", "hook_point")
WORDS = {
    "position": ("seq", "query"),
    "tile": ("tile",),
    "patch": ("patch", "query"),
    "image_token": ("image_token",),
    "head": ("head", "kv_head"),
    "expert": ("expert",),
    "slot": ("slot",),
    "neuron": ("d_ff",),
    "key": ("key",),
    "feature": ("d_model", "d_head", "d_vision", "d_shuffled", "d_adapter"),
}
BY_EXPERT = (".experts.out", ".experts.hidden")  # a slot's expert is found through the router's indices


@dataclass(frozen=True)
class Target:
    """What a cell replaces at one hook point.

    Attributes:
        name: The hook point.
        index: Word of its shape (or "expert") -> the indices on that axis; axes that are missing are replaced whole.
    """

    name: str
    index: dict[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Cells:
    """All cells of a sweep.

    Attributes:
        axes: Axis -> its values, in order.
        labels: For each cell its value on each axis.
        targets: For each cell what it replaces.
    """

    axes: dict[str, list[Value]]
    labels: list[dict[str, Value]]
    targets: list[list[Target]]

    def __len__(self) -> int:
        return len(self.labels)


def word_of(axis: str, name: str, shape: str) -> str | None:
    """The word that an axis means in the shape of a hook point, or None if it has no such axis."""
    words = shape.split()
    if axis == "expert" and name.endswith(BY_EXPERT):
        return "expert"
    if (axis == "position") != (words[0] == "batch") and axis in ("position", "patch"):
        return None
    return next((word for word in WORDS[axis] if word in words), None)


def axes_of(name: str, shape: str) -> list[str]:
    """The axes that a hook point can be swept over."""
    named = ["layer"] if layer_of(name) is not None else []
    return [*named, *(axis for axis in WORDS if word_of(axis, name, shape) is not None), "component", "hook_point"]


def cells(shapes: Mapping[str, str], over: Over, sizes: Mapping[str, Mapping[str, Iterable[int]]]) -> Cells:
    """Gives every combination of the values of the axes that replaces something.

    Args:
        shapes: Hook point -> its shape in words.
        over: The axes, or axis -> its values (None for all). A tuple of values is replaced together, as one value.
        sizes: Hook point -> word -> the indices that may be chosen there.

    Raises:
        ValueError: if an axis is unknown, a hook point does not have it, or a value is none of its values.
    """
    asked = dict(over) if isinstance(over, Mapping) else dict.fromkeys(over)
    _check_axes(asked, shapes)
    values = {axis: _values(axis, chosen, shapes, sizes) for axis, chosen in asked.items()}
    labels, targets = [], []
    for combination in product(*values.values()):
        label = dict(zip(values, combination, strict=True))
        own = [target for name in shapes if (target := _target(name, shapes[name], label, sizes[name])) is not None]
        if own:
            labels.append(label)
            targets.append(own)
    present = {axis: {label[axis] for label in labels} for axis in values}
    axes = {axis: [value for value in each if value in present[axis]] for axis, each in values.items()}
    return Cells(axes, labels, targets)


def _check_axes(asked: Mapping[str, object], shapes: Mapping[str, str]) -> None:
    known = [*NAMED, *WORDS]
    if not asked:
        raise ValueError(f"over is empty. Choose axes from {', '.join(known)}.")
    for axis in asked:
        if axis not in known:
            raise ValueError(f"{axis!r} is not an axis. Choose from {', '.join(known)}.")
        for name, shape in shapes.items():
            if axis not in axes_of(name, shape):
                raise ValueError(
                    f"{name!r} ({shape}) cannot be swept over {axis!r}.\nIt has {', '.join(axes_of(name, shape))}."
                )
    if "slot" in asked and "expert" in asked:
        raise ValueError("A sweep goes over slots or over experts, not over both.")


def _named(axis: str, name: str) -> Value:
    value = {"layer": layer_of, "component": component_of, "hook_point": str}[axis](name)
    assert value is not None
    return value


def _values(
    axis: str,
    chosen: Iterable[Value] | None,
    shapes: Mapping[str, str],
    sizes: Mapping[str, Mapping[str, Iterable[int]]],
) -> list[Value]:
    """The values of an axis, checked."""
    if axis in NAMED:
        possible: list[Value] = list(dict.fromkeys(_named(axis, name) for name in shapes))
    else:
        words = {name: word_of(axis, name, shape) for name, shape in shapes.items()}
        possible = sorted({i for name, word in words.items() if word is not None for i in sizes[name][word]})
    if chosen is None:
        return possible
    wanted: list[Any] = [tuple(value) if isinstance(value, list) else value for value in chosen]
    for value in wanted:
        parts = value if isinstance(value, tuple) else (value,)
        wrong = [part for part in parts if part not in possible]
        if wrong or not parts:
            shown = f"{possible[0]!r} to {possible[-1]!r}" if possible else "no value"
            raise ValueError(f"{value!r} is no value of the axis {axis!r} here; it has {shown}.")
        if axis == "expert" and isinstance(value, tuple) and any(name.endswith(BY_EXPERT) for name in shapes):
            raise ValueError("Experts are replaced one by one at experts.out and experts.hidden: pass single numbers.")
    return wanted


def _target(name: str, shape: str, label: Mapping[str, Value], sizes: Mapping[str, Iterable[int]]) -> Target | None:
    """What a cell replaces at a hook point; None if it is not its business."""
    index: dict[str, tuple[int, ...]] = {}
    for axis, value in label.items():
        if axis in NAMED:
            if _named(axis, name) not in (value if isinstance(value, tuple) else (value,)):
                return None
            continue
        word = word_of(axis, name, shape)
        assert word is not None
        own = set(sizes[word])
        parts = value if isinstance(value, tuple) else (value,)
        chosen = tuple(part for part in parts if isinstance(part, int) and part in own)
        if not chosen:
            return None
        index[word] = chosen
    return Target(name, index)
