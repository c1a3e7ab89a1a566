"""What config.json says of how matrices are quantized: a second witness beside the shapes of the tensors.

A scale that lost half of its columns still fits its matrix, in groups twice as wide, and would give wrong numbers
without a word. Config and tensors must tell the same.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llama4lab.checkpoint.strict_json import read_json

# Under which keys writers put it, at the top of config.json or in its text_config.
CONFIG_KEYS = ("quantization_config", "compression_config", "quantization")
# compressed-tensors' words for what has a scale of its own.
GRAINS = {"tensor": "tensor", "channel": "row", "block": "block"}
# What a scale of float8 is for with other writers, by the name of their algorithm ("None" without one).
GRAINS_OF = {"fbgemm_fp8": {"None": "row"}, "modelopt": {"FP8": "tensor"}}


@dataclass(frozen=True)
class Group:
    """How some of the matrices are quantized. None is for what is not said.

    Attributes:
        kind: "int" or "float".
        bits: Of a value.
        size: Columns of a group that has a scale of its own.
        grain: "tensor", "row" or "block" where whole ones have a scale.
        block: Rows and columns of a block.
        symmetric: Whether there are no zero points.
    """

    kind: str | None = None
    bits: int | None = None
    size: int | None = None
    grain: str | None = None
    block: tuple[int, int] | None = None
    symmetric: bool | None = None


@dataclass(frozen=True)
class Declared:
    """All that a config says. Where it says nothing, it contradicts nothing.

    Attributes:
        file: The config.
        groups: How matrices may be quantized.
    """

    file: Path
    groups: tuple[Group, ...] = ()

    @classmethod
    def by(cls, folder: Path) -> "Declared":
        """Reads it from the config.json of a checkpoint, if it has one."""
        file = folder / "config.json"
        if not file.is_file():
            return cls(file)
        document = read_json(file)
        sections = [part for part in (document, document.get("text_config")) if isinstance(part, Mapping)]
        settings = [section.get(key) for section in sections for key in CONFIG_KEYS]
        return cls(file, tuple(group for found in settings if isinstance(found, Mapping) for group in _groups(found)))

    def refuse_integers(self, file: Path, name: str, bits: int, size: int, columns: int) -> None:
        """Raises ValueError when packed integers have bits or groups that the config does not know.

        Args:
            file: Where they are.
            name: Of a tensor to name.
            bits: Of a value, as the tensors show it.
            size: Columns of a group, as the tensors show it.
            columns: Of the matrix.
        """
        groups = [group for group in self.groups if group.kind == "int" and None not in (group.bits, group.size)]
        allowed = {(group.bits, columns if group.size == -1 else group.size) for group in groups}
        if allowed and (bits, size) not in allowed:
            said = " or ".join(f"int{bits} in groups of {size}" for bits, size in sorted(allowed, key=str))
            raise ValueError(
                f"{file}: {name} shows int{bits} in groups of {size} columns; by {self.file.name} it is {said}.\n"
                "Config and weights must belong together."
            )

    def refuse_symmetric(self, file: Path, name: str, bits: int) -> None:
        """Raises ValueError when values come without zero points, though by the config there are some."""
        said = {group.symmetric for group in self.groups if group.kind == "int" and group.bits in (bits, None)}
        if said == {False}:
            raise ValueError(
                f'{file}: {name} is stored without its weight_zero_point; {self.file.name} says "symmetric": false.\n'
                "Without zero points all its numbers would be shifted; download or save it again."
            )

    def refuse_eight_bits(self, file: Path, name: str, dtype: torch.dtype) -> None:
        """Raises ValueError when values of 8 bits are floats though the config says integers, or the reverse."""
        kind = "float" if dtype.is_floating_point else "int"
        said: set[str] = {group.kind for group in self.groups if group.bits == 8 and group.kind}
        if said and kind not in said:
            raise ValueError(
                f"{file}: {name} is stored as {str(dtype).removeprefix('torch.')}; by {self.file.name} its values are "
                f"of the type {' or '.join(sorted(said))}."
            )
        if kind == "int":
            self.refuse_symmetric(file, name, 8)

    def grains(self) -> tuple[set[str], set[tuple[int, int]]]:
        """Gives what of matrices in 8 bits may have a scale of its own, and which blocks; both empty if not said."""
        groups = [group for group in self.groups if group.bits in (8, None) and group.grain]
        return {str(group.grain) for group in groups}, {group.block for group in groups if group.block}


def _groups(settings: Mapping[str, Any]) -> Iterable[Group]:
    """The groups in the settings of a writer; MLX has one, and exceptions by module."""
    groups = settings.get("config_groups")
    if isinstance(groups, Mapping):
        for group in groups.values():
            weights = group.get("weights") if isinstance(group, Mapping) else None
            if isinstance(weights, Mapping):
                yield _group(weights)
    elif settings.get("quant_method") in GRAINS_OF:
        method = settings["quant_method"]
        yield Group("float", 8, grain=GRAINS_OF[method].get(str(settings.get("quant_algo"))))
    elif "quant_method" not in settings:
        for own in (settings, *(value for value in settings.values() if isinstance(value, Mapping))):
            bits, size = _whole(own.get("bits")), _whole(own.get("group_size"))
            if bits and size:
                yield Group("int", bits, size)


def _group(weights: Mapping[str, Any]) -> Group:
    strategy = weights.get("strategy")
    block = weights.get("block_structure")
    sides = [_whole(side) for side in block] if isinstance(block, list) else []
    symmetric = weights.get("symmetric")
    return Group(
        kind=weights["type"] if weights.get("type") in ("int", "float") else None,
        bits=_whole(weights.get("num_bits")),
        size=-1 if strategy == "channel" else _whole(weights.get("group_size")),
        grain=GRAINS.get(strategy) if isinstance(strategy, str) else None,
        block=(sides[0], sides[1]) if len(sides) == 2 and sides[0] and sides[1] else None,
        symmetric=symmetric if isinstance(symmetric, bool) else None,
    )


def _whole(value: Any) -> int | None:
    return value if type(value) is int and value > 0 else None
