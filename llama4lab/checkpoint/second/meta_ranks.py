"""Matrices of Meta's checkpoints: opened by torch itself, and joined from the shares of the ranks.

Gate and up, queries, keys and values, embeddings and head are shared out by rows, what leads back by columns. Experts
are stored as [expert * in, out]: a rank has some columns of gate and up, and some of the inputs of down.
"""

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llama4lab.checkpoint.second.formulas import Columns, Formula, Rows, Strip, plain
from llama4lab.checkpoint.second.raw_tensor import STORED, RawTensor

AFTER_ATTENTION = (
    *("feed_forward.norm.weight", "feed_forward.mlp.layer_norm_weight", "feed_forward.mlp.layer_norm.weight"),
    "ffn_norm.weight",
)
# Ours -> Meta's in either spelling, and the axis along which ranks share it.
TEXT = {
    "input_layernorm.weight": (("attention.wqkv.layer_norm_weight", "attention_norm.weight"), None),
    "post_attention_layernorm.weight": (AFTER_ATTENTION, None),
    **{f"self_attn.{p}_proj.weight": ((f"attention.w{p}.weight",), 0) for p in "qkv"},
    "self_attn.o_proj.weight": (("attention.wo.weight",), 1),
    "feed_forward.gate_proj.weight": (("feed_forward.w1.weight",), 0),
    "feed_forward.up_proj.weight": (("feed_forward.w3.weight",), 0),
    "feed_forward.down_proj.weight": (("feed_forward.mlp.fc2_weight", "feed_forward.w2.weight"), 1),
    **{
        f"feed_forward.shared_expert.{part}_proj.weight": (
            (f"feed_forward.{published}.weight", f"feed_forward.shared_expert.{own}.weight"),
            axis,
        )
        for part, published, own, axis in (
            ("gate", "w_in_shared_FD", "w1", 0),
            ("up", "w_swiglu_FD", "w3", 0),
            ("down", "w_out_shared_DF", "w2", 1),
        )
    },
}
TOP = {
    "model.embed_tokens.weight": ("tok_embeddings.weight", 0),
    "model.norm.weight": ("norm.weight", None),
    "lm_head.weight": ("output.weight", 0),
    "multi_modal_projector.linear_1.weight": ("vision_projection.weight", 0),
    "vision_model.vision_adapter.mlp.fc1.weight": ("vision_embeddings.vision_adapter.mlp.c_fc.weight", 0),
    "vision_model.vision_adapter.mlp.fc2.weight": ("vision_embeddings.vision_adapter.mlp.c_proj.weight", 1),
}
# Of the vision tower: parts of names, ours and Meta's.
VISION = {
    "vision_model.model.layers.": "transformer.resblocks.", "vision_model.": "", "self_attn.": "attn.w", "_proj.": ".",
    "input_layernorm": "ln_1", "post_attention_layernorm": "ln_2", "layernorm_": "ln_", "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj", "patch_embedding.linear": "conv1._linear",
}  # fmt: skip
EXPERTS = {"gate": ("moe_w_in_eD_F", "w1"), "up": ("moe_w_swiglu_eD_F", "w3"), "down": ("moe_w_out_eF_D", "w2")}
PROJECTIONS = {"experts.gate_up_proj": ("gate", "up"), "experts.down_proj": ("down",)}


class MetaRanks:
    """The files of all ranks, mapped into memory.

    Args:
        folder: Where they are.
    """

    def __init__(self, folder: Path):
        files = sorted(folder.glob("consolidated.*.pth"))
        self.ranks = [_opened(file) for file in files or [folder / "consolidated.pth"]]
        found = [file.name.partition("_")[0] for file in folder.glob("*_scales_*.pt")]
        self.method = found[0] if found else ""
        self.scales = [_opened(folder / f"{self.method}_scales_{rank}.pt") for rank in range(len(found))]

    def formulas(self, name: str, columns: int, expert: int | None) -> list[Formula]:
        """Gives the matrices that are joined along `out` in a tensor of the model, or in an expert's matrix of it."""
        layer, own = re.sub(r"^(language_model\.)?", "", name), ""
        if found := re.match(r"model\.(layers\.\d+\.)(.+)", layer):
            layer, own = found[1], found[2]
        if expert is not None:
            parts = PROJECTIONS[own.removeprefix("feed_forward.")]
            return [self._expert(f"{layer}feed_forward.", part, expert) for part in parts]
        weight = self._of_layer(layer, own) if own else self._other(layer)
        return [plain({"weight": _raw(weight).rows_of(columns)}, columns)]

    def _of_layer(self, layer: str, name: str) -> Tensor:
        held = self.ranks[0]
        if name == "feed_forward.router.weight":
            return held[f"{layer}feed_forward.router_DE"].T
        if f"{layer}attention.wqkv.weight" in held and (
            found := re.fullmatch(r"self_attn\.([qkv])_proj\.weight", name)
        ):
            return torch.cat([self._qkv(rank, layer)["qkv".index(found[1])] for rank in self.ranks])
        stacked = f"{layer}feed_forward.mlp.fc1_weight"
        if stacked in held and name in ("feed_forward.gate_proj.weight", "feed_forward.up_proj.weight"):
            half = int("up" in name)
            return torch.cat([rank[stacked].chunk(2)[half] for rank in self.ranks])
        names, axis = TEXT[name]
        return self._joined(next(layer + each for each in names if layer + each in held), axis)

    def _other(self, name: str) -> Tensor:
        if name in TOP:
            return self._joined(*TOP[name])
        theirs = name
        for part, other in VISION.items():
            theirs = theirs.replace(part, other)
        whole = theirs.endswith(("wo.bias", "c_proj.bias")) or re.search(r"ln_|_embedding", theirs)
        axis = None if whole else int(theirs.endswith(("wo.weight", "c_proj.weight")))
        return self._joined(f"vision_embeddings.vision_encoder.{theirs}", axis)

    def _joined(self, name: str, axis: int | None) -> Tensor:
        return self.ranks[0][name] if axis is None else torch.cat([rank[name] for rank in self.ranks], axis)

    def _qkv(self, rank: dict[str, Any], layer: str) -> tuple[Tensor, ...]:
        whole, queries = rank[f"{layer}attention.wqkv.weight"], rank[f"{layer}attention.wo.weight"].shape[1]
        others = (len(whole) - queries) // 2
        return whole.split([queries, others, others])

    def _expert(self, layer: str, part: str, expert: int) -> Formula:
        count, down = self.ranks[0][f"{layer}router_DE"].shape[1], part == "down"
        names = [f"{layer}experts.{each}" for each in EXPERTS[part]]
        own = [next(rank[name] for name in names if name in rank) for rank in self.ranks]
        cut = [
            each.reshape(count, -1, each.shape[-1])[expert].view(torch.uint8).T for each in own if self._scaled(names)
        ]
        if not cut:
            cut = [each.reshape(count, -1, each.shape[-1])[expert].T for each in own]
            return plain({"weight": _raw(torch.cat(cut, int(down)))}, 0)
        scales = [next(rank[name][expert] for name in names if name in rank) for rank in self.scales]
        stored = torch.cat(cut, int(down)).numpy()
        if self.method == "int4":
            return _int4(stored, torch.cat([scale.T for scale in scales], int(down)).numpy())
        fp8 = RawTensor(stored, "float8_e4m3fn")
        # Each rank rounded its own columns of down by themselves.
        scale = torch.stack(scales, 1).numpy() if down else torch.cat(scales)[:, None].numpy()
        width = stored.shape[1] // scale.shape[1]
        return Formula("float8_e4m3fn by row", lambda row, column: fp8[row, column] * scale[row, column // width])

    def _scaled(self, names: list[str]) -> bool:
        return any(name in rank for rank in self.scales for name in names)


def _int4(stored: np.ndarray, scale: np.ndarray) -> Formula:
    """Two's complement, the low half of a byte first, a scale for each 128 columns."""

    def at(row: Rows, column: Columns) -> Strip:
        value = stored[row, column // 2].astype(int) >> column % 2 * 4 & 15
        return (value - 16 * (value > 7)).astype(np.float32) * scale[row, column // 128].astype(np.float32)

    return Formula("signed int4, groups of 128", at)


def _raw(values: Tensor) -> RawTensor:
    dtype = str(values.dtype).removeprefix("torch.")
    stored = values.contiguous().view(torch.uint16) if values.dtype == torch.bfloat16 else values
    return RawTensor(stored.numpy().view(STORED[dtype]), dtype)


def _opened(file: Path) -> dict[str, Any]:
    # Published files hold notes of the training as byte streams, which are harmless and not looked at.
    with torch.serialization.safe_globals([io.BytesIO]):
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
