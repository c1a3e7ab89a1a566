"""Layouts: under which names, and in which shapes, a checkpoint stores the tensors of the model.

The model's names are those of transformers: `[language_model.]model.layers.N.feed_forward.experts.gate_up_proj`.
On disk text tensors may or may not carry the prefix `language_model.`, and the experts of a layer may be

    fused    experts.gate_up_proj [expert, in, 2 * out] (gate first), experts.down_proj [expert, in, out]
    unfused  experts.{e}.gate_proj.weight, .up_proj.weight, .down_proj.weight, each [out, in] like a Linear

which is what quantizers ask for and transformers' converter writes on request (`for_llm_compressor`).
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

PREFIX = "language_model."
UNFUSED = re.compile(r"\.feed_forward\.experts\.\d+\.(gate|up|down)_proj\.weight$")
FUSED = re.compile(r"\.feed_forward\.experts\.(gate_up|down)_proj$")
VISION = ("vision_model.", "multi_modal_projector.")

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """How the names on disk differ from the names in the model.

    Args:
        prefixed: Whether text tensors are stored under `language_model.`.
        fused: Whether the experts of a layer are stored as one tensor.
        vision: Whether the vision tower is stored too.
    """

    prefixed: bool
    fused: bool
    vision: bool

    @classmethod
    def of(cls, names: Iterable[str]) -> "Layout":
        """Gives the layout that these names on disk show. A checkpoint without experts counts as fused."""
        names = list(names)
        return cls(
            prefixed=any(name.startswith(PREFIX) for name in names),
            fused=any(FUSED.search(name) for name in names) or not any(UNFUSED.search(name) for name in names),
            vision=any(name.startswith(VISION) for name in names),
        )

    def stored(self, name: str, shape: Shape) -> dict[str, Shape]:
        """Gives the names and shapes on disk of one tensor of the model: one, or one or two for each expert.

        For experts the order is that of the parts: expert by expert, gate before up.
        """
        on_disk = name if name.startswith(VISION) else self._with_prefix(name)
        if self.fused or not FUSED.search(name) or len(shape) != 3:
            return {on_disk: shape}
        experts, _, projection = on_disk.rpartition(".")
        num_experts, d_in, d_out = shape
        if projection == "down_proj":
            return {f"{experts}.{expert}.down_proj.weight": (d_out, d_in) for expert in range(num_experts)}
        return {
            f"{experts}.{expert}.{part}_proj.weight": (d_out // 2, d_in)
            for expert in range(num_experts)
            for part in ("gate", "up")
        }

    def _with_prefix(self, name: str) -> str:
        plain = name.removeprefix(PREFIX)
        return PREFIX + plain if self.prefixed else plain

    def __str__(self) -> str:
        experts = "fused" if self.fused else "unfused"
        return f"{'text and vision' if self.vision else 'text only'}, {experts} experts"
