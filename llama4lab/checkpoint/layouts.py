"""Layouts: under which names, and in which shapes, a checkpoint stores the tensors of the model.

The model's names are those of transformers: `[language_model.]model.layers.N.feed_forward.experts.gate_up_proj`.
On disk text tensors may or may not carry the prefix `language_model.`, and the experts of a layer may be

    fused    experts.gate_up_proj [expert, in, 2 * out] (gate first), experts.down_proj [expert, in, out]
    unfused  experts.{e}.gate_proj.weight, .up_proj.weight, .down_proj.weight, each [out, in] like a Linear
    stacked  experts.gate_proj.weight, .up_proj.weight, .down_proj.weight, each [expert, out, in]

Unfused is what quantizers ask for and transformers' converter writes on request (`for_llm_compressor`), stacked is what
MLX writes. A quantized tensor has other tensors in the place of `.weight`, or beside it.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

PREFIX = "language_model."
UNFUSED = re.compile(r"\.feed_forward\.experts\.\d+\.(gate|up|down)_proj\.weight(_packed)?$")
STACKED = re.compile(r"\.feed_forward\.experts\.(gate|up|down)_proj\.weight$")
FUSED = re.compile(r"\.feed_forward\.experts\.(gate_up|down)_proj$")
VISION = ("vision_model.", "multi_modal_projector.")

Shape = tuple[int, ...]
Banks = Literal["fused", "unfused", "stacked"]


class Place(NamedTuple):
    """Where a matrix [out, in] is on disk: its name without `.weight`, its shape, and its number if it is stacked."""

    base: str
    shape: tuple[int, int]
    index: int | None


@dataclass(frozen=True)
class Layout:
    """How the names on disk differ from the names in the model.

    Args:
        prefixed: Whether text tensors are stored under `language_model.`.
        experts: How the experts of a layer are stored.
        vision: Whether the vision tower is stored too.
    """

    prefixed: bool
    experts: Banks
    vision: bool

    @classmethod
    def of(cls, names: Iterable[str]) -> "Layout":
        """Gives the layout that these names on disk show. A checkpoint without experts counts as fused."""
        names = list(names)
        experts: Banks = "fused"
        if not any(FUSED.search(name) for name in names):
            experts = "unfused" if any(UNFUSED.search(name) for name in names) else experts
            experts = "stacked" if any(STACKED.search(name) for name in names) else experts
        return cls(
            prefixed=any(name.startswith(PREFIX) for name in names),
            experts=experts,
            vision=any(name.startswith(VISION) for name in names),
        )

    def stored(self, name: str, shape: Shape) -> dict[str, Shape]:
        """Gives the names and shapes on disk of one tensor of the model: one, or some for each expert.

        For unfused experts the order is that of the parts: expert by expert, gate before up.
        """
        on_disk = self._on_disk(name)
        if self.experts == "fused" or not is_bank(name, shape):
            return {on_disk: shape}
        num_experts, d_in, _ = shape
        parts = self._parts(on_disk, shape)
        if self.experts == "stacked":
            return {f"{base}.weight": (num_experts, d_out, d_in) for base, d_out in parts}
        return {f"{base}.weight": (d_out, d_in) for base, d_out in parts}

    def matrices(self, name: str, shape: Shape) -> list[list[Place]]:
        """Gives the matrices that one tensor of the model is made of: a list for each expert, or one in all.

        The matrices of an expert are joined along `out`, gate before up.
        """
        on_disk = self._on_disk(name)
        if not is_bank(name, shape):
            return [[Place(on_disk.removesuffix(".weight"), (shape[0], shape[1]), None)]]
        num_experts, d_in, d_out = shape
        if self.experts == "fused":
            return [[Place(on_disk, (d_out, d_in), expert)] for expert in range(num_experts)]
        parts = [(base, (own, d_in)) for base, own in self._parts(on_disk, shape)]
        if self.experts == "stacked":
            return [[Place(base, own, expert) for base, own in parts] for expert in range(num_experts)]
        each = len(parts) // num_experts
        return [[Place(base, own, None) for base, own in parts[i : i + each]] for i in range(0, len(parts), each)]

    def _on_disk(self, name: str) -> str:
        return name if name.startswith(VISION) else self._with_prefix(name)

    def _parts(self, on_disk: str, shape: Shape) -> list[tuple[str, int]]:
        """Name on disk and width of the matrices of a bank, for all experts where each has its own."""
        experts, _, projection = on_disk.rpartition(".")
        down = projection == "down_proj"
        parts = [("down", shape[2])] if down else [("gate", shape[2] // 2), ("up", shape[2] // 2)]
        if self.experts == "stacked":
            return [(f"{experts}.{part}_proj", width) for part, width in parts]
        return [(f"{experts}.{expert}.{part}_proj", width) for expert in range(shape[0]) for part, width in parts]

    def _with_prefix(self, name: str) -> str:
        plain = name.removeprefix(PREFIX)
        return PREFIX + plain if self.prefixed else plain

    def __str__(self) -> str:
        return f"{'text and vision' if self.vision else 'text only'}, {self.experts} experts"


def is_bank(name: str, shape: Shape) -> bool:
    """Whether a tensor of the model holds the weights of all experts of a layer."""
    return FUSED.search(name) is not None and len(shape) == 3
