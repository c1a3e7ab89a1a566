"""Ranks that do not make up a model, each file of them readable: refused, naming file and tensor."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import llama4lab as lab
from llama4lab.checkpoint.meta.files import MetaFiles

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


def without_size(folder: Path) -> None:
    settings = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps(settings | {"vocab_size": -1}))


CONTENTS: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "no first rank": (
        lambda f: (f / RANKS[0]).unlink(),
        FileNotFoundError,
        r"lacks 1 of 2 files: consolidated\.00\.pth",
    ),
    "no last rank": (lambda f: (f / RANKS[1]).unlink(), ValueError, r"64 rows in 1 files; params\.json says 128"),
    "no last rank, and no size to tell it": (
        lambda f: (f / RANKS[1]).unlink() or without_size(f),
        ValueError,
        r"q_proj\.weight has 32 rows in 1 files; params\.json says 64",
    ),
    "a gap": (
        lambda f: (f / RANKS[1]).rename(f / "consolidated.03.pth"),
        FileNotFoundError,
        r"lacks 2 of 4 files: consolidated\.01\.pth, consolidated\.02\.pth",
    ),
    "a tensor that one rank has": (
        lambda f: changed(f / RANKS[1], lambda held: held.pop("norm.weight")),
        ValueError,
        r"consolidated\.01\.pth lacks norm\.weight",
    ),
    "another dtype": (
        lambda f: changed(f / RANKS[1], lambda held: held.update({NORM: held[NORM].bfloat16()})),
        ValueError,
        rf"consolidated\.01\.pth: {NORM} is torch\.bfloat16 \[64\]; in consolidated\.00\.pth it is torch\.float32",
    ),
    "another shape": (
        lambda f: changed(f / RANKS[1], lambda held: held.update({"output.weight": tensor_of(60, 64)})),
        ValueError,
        r"consolidated\.01\.pth: output\.weight is torch\.float32 \[60, 64\]",
    ),
    "another norm": (
        lambda f: changed(f / RANKS[1], lambda held: held[NORM].add_(1)),
        ValueError,
        r"consolidated\.00\.pth and consolidated\.01\.pth have different values of model\.layers\.0\.input_layernorm",
    ),
    "another router": (
        lambda f: changed(f / RANKS[1], lambda held: held["layers.1.feed_forward.router_DE"].add_(1)),
        ValueError,
        r"different values of model\.layers\.1\.feed_forward\.router",
    ),
    "a tensor of another model": (
        lambda f: both(f, lambda held: held.update({"layers.0.attention.wqkw.weight": held[NORM]})),
        ValueError,
        r"attention\.wqkw\.weight is no tensor of a Llama 4; near misses: layers\.N\.attention\.wqkv\.weight",
    ),
    "two spellings of one": (
        lambda f: both(f, lambda held: held.update({"layers.0.attention_norm.weight": held[NORM]})),
        ValueError,
        r"are both model\.layers\.0\.input_layernorm\.weight",
    ),
    "columns first": (
        lambda f: both(f, lambda held: held.update({"output.weight": held["output.weight"].T.contiguous().T})),
        ValueError,
        r"output\.weight has shape \[64, 64\] with strides \[1, 64\]",
    ),
    "a dict in the dict": (
        lambda f: both(f, lambda held: held.update({"model": {"a": held[NORM]}})),
        ValueError,
        "it holds a dict under 'model'",
    ),
    "a number": (lambda f: both(f, lambda held: held.update({"step": 3})), ValueError, "it holds a int under 'step'"),
    "no end of the numbers": (
        lambda f: changed(f / RANKS[1], lambda held: held[EXPERTS + "moe_w_out_eF_D"].fill_(torch.inf)),
        ValueError,
        r"layers\.1\.feed_forward\.experts\.0\.down_proj\.weight holds .*NaN or infinite",
    ),
    "experts without a router": (
        lambda f: both(f, lambda held: held.pop("layers.1.feed_forward.router_DE")),
        ValueError,
        r"is stored without the router of its layer, a matrix router_DE",
    ),
    "experts of another width": (
        lambda f: both(f, lambda held: held.update({EXPERTS + "moe_w_in_eD_F": tensor_of(4 * 60, 44)})),
        ValueError,
        r"moe_w_in_eD_F has shape \[240, 44\]; by the router of its layer it has 64 rows an expert",
    ),
    "experts narrower inside than others": (
        lambda f: both(f, lambda held: held.update({EXPERTS + "moe_w_out_eF_D": tensor_of(4 * 40, 64)})),
        ValueError,
        r"down_proj\.weight has a width of 80 inside",
    ),
    "a number of rows that experts do not divide": (
        lambda f: both(f, lambda held: held.update({EXPERTS + "moe_w_out_eF_D": tensor_of(177, 64)})),
        ValueError,
        r"moe_w_out_eF_D has shape \[177, 64\]; for 4 experts",
    ),
    "queries, keys and values without their output": (
        lambda f: both(f, lambda held: held.pop("layers.0.attention.wo.weight")),
        ValueError,
        r"wqkv\.weight is stored without layers\.0\.attention\.wo\.weight",
    ),
    "too few rows for queries, keys and values": (
        lambda f: both(f, lambda held: held.update({"layers.0.attention.wqkv.weight": tensor_of(32, 64)})),
        ValueError,
        r"wqkv\.weight has 32 rows",
    ),
    "gate and up of an odd number of rows": (
        lambda f: both(f, lambda held: held.update({"layers.0.feed_forward.mlp.fc1_weight": tensor_of(175, 64)})),
        ValueError,
        r"fc1_weight has 175 rows; gate and up have the same",
    ),
    "no layer": (
        lambda f: both(f, lambda held: [held.pop(name) for name in list(held) if name.startswith("layers.0.")]),
        ValueError,
        r"lacks .* tensors of the model",
    ),
}


@pytest.mark.parametrize("kind", CONTENTS)
def test_ranks_that_do_not_make_up_a_model_are_refused(folder, kind):
    damage, error, expected = CONTENTS[kind]
    damage(folder)
    with pytest.raises(error, match=rf"(?s){re.escape(str(folder))}.*{expected}"):
        lab.load(folder)


def test_tensors_that_share_their_storage_are_read(folder, whole):
    def shared(held):
        both = torch.cat([held["output.weight"], held["tok_embeddings.weight"]])
        held["output.weight"], held["tok_embeddings.weight"] = both[:64], both[64:]

    both(folder, shared)
    assert torch.equal(lab.load(folder).lm_head.weight, whole.lm_head.weight)


def test_a_file_that_became_shorter_is_an_error_that_names_it(folder):
    files = MetaFiles(folder)
    with (folder / RANKS[1]).open("r+b") as opened:
        opened.truncate(1000)
    with pytest.raises(OSError, match=r"consolidated\.01\.pth ends before model\.layers\.1\.self_attn\.o_proj\.weight"):
        files.read("model.layers.1.self_attn.o_proj.weight")
