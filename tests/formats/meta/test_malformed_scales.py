"""Scales that do not belong to the experts."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import llama4lab as lab

RANKS = ("consolidated.00.pth", "consolidated.01.pth")
NORM, EXPERTS = "layers.0.attention.wqkv.layer_norm_weight", "layers.1.feed_forward.experts."


def changed(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    held = torch.load(file, weights_only=False)
    change(held)
    torch.save(held, file)


def both(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    for rank in RANKS:
        changed(folder / rank, change)


def tensor_of(rows: int, columns: int) -> torch.Tensor:
    return torch.zeros(rows, columns)


SCALES: dict[str, tuple[str, Callable[[Path], Any], type[Exception], str]] = {
    "no scales": (
        "fp8",
        lambda f: [(f / f"fp8_scales_{rank}.pt").unlink() for rank in (0, 1)],
        ValueError,
        "weight_scale",
    ),
    "no scales of one rank": (
        "fp8",
        lambda f: (f / "fp8_scales_1.pt").unlink(),
        FileNotFoundError,
        r"fp8_scales_1\.pt",
    ),
    "scales of a rank too many": (
        "fp8",
        lambda f: (f / "fp8_scales_2.pt").write_bytes((f / "fp8_scales_1.pt").read_bytes()),
        ValueError,
        r"fp8_scales_2\.pt belongs to rank 2; there are 2 files",
    ),
    "scales of two methods": (
        "fp8",
        lambda f: (f / "int4_scales_0.pt").write_bytes((f / "fp8_scales_0.pt").read_bytes()),
        ValueError,
        "holds scales of fp8 and of int4",
    ),
    "scales of the other method": (
        "fp8",
        lambda f: [(f / f"fp8_scales_{rank}.pt").rename(f / f"int4_scales_{rank}.pt") for rank in (0, 1)],
        ValueError,
        r"moe_w_.+ has shape",
    ),
    "scales that lack an expert": (
        "int4",
        lambda f: [
            changed(f / f"int4_scales_{r}.pt", lambda held: held.update({EXPERTS + "w2": torch.ones(3, 1, 128)}))
            for r in (0, 1)
        ],
        ValueError,
        r"int4_scales_0\.pt: .*moe_w_out_eF_D has shape \[3, 1, 128\]; the scales of int4 have \[4, 1, 128\]",
    ),
    "scales of other groups": (
        "int4",
        lambda f: [
            changed(f / f"int4_scales_{r}.pt", lambda held: held.update({EXPERTS + "w1": torch.ones(4, 2, 128)}))
            for r in (0, 1)
        ],
        ValueError,
        r"the scales of int4 have \[4, 1, 128\]",
    ),
    "scales for plain numbers": (
        "fp8",
        lambda f: both(f, lambda held: held.update({EXPERTS + "moe_w_in_eD_F": tensor_of(512, 128)})),
        ValueError,
        r"moe_w_in_eD_F is stored as torch\.float32, yet fp8_scales_0\.pt has scales",
    ),
    "scales for nothing": (
        "fp8",
        lambda f: [
            changed(
                f / f"fp8_scales_{r}.pt",
                lambda held: held.update({"layers.0.feed_forward.experts.w1": torch.ones(4, 128)}),
            )
            for r in (0, 1)
        ],
        ValueError,
        r"fp8_scales_0\.pt: layer 0 has scales for gate, and no experts",
    ),
    "scales of something else": (
        "fp8",
        lambda f: [
            changed(
                f / f"fp8_scales_{r}.pt",
                lambda held: held.update({"layers.1.feed_forward.shared_expert.w1": torch.ones(4)}),
            )
            for r in (0, 1)
        ],
        ValueError,
        r"shared_expert\.w1 is no tensor of a Llama 4",
    ),
    "scales that are no numbers": (
        "fp8",
        lambda f: changed(f / "fp8_scales_1.pt", lambda held: held[EXPERTS + "w1"].fill_(torch.nan)),
        ValueError,
        r"experts\.0\.gate_proj\.weight_scale holds",
    ),
}


@pytest.mark.parametrize("kind", SCALES)
def test_scales_that_do_not_belong_to_the_experts_are_refused(write, wide_model, kind):
    method, damage, error, expected = SCALES[kind]
    folder = write(wide_model(num_hidden_layers=2), 2, method)
    damage(folder)
    with pytest.raises(error, match=rf"(?s){re.escape(str(folder))}.*{expected}"):
        lab.load(folder)
