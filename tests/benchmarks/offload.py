"""One token through a model on disk: llama4lab's store against accelerate's disk map over transformers' own model.

    python tests/benchmarks/offload.py                 about five minutes, and 1.3 GB of files in the folder for those
    python tests/benchmarks/offload.py --rounds 9

Both read the same safetensors files, where they lie, in the same process and in turn, each round with another token,
and compute in bfloat16 on the CPU; their logits have to agree. Three maps: the experts alone on disk; whole layers on
disk and nothing kept between passes, as accelerate keeps nothing; whole layers on disk with RAM for what every pass
uses, where the first pass is not counted. Two shapes, both of width 512: 16 experts in each of 8 layers, as in Scout,
and 128 experts in 2 of 4 layers, as in Maverick.

Asked is what the library asks of its files: `store.traffic.bytes_read`, and the bytes of the tensors that accelerate's
loader hands out. Disk is what the kernel read for it, `read_bytes` of /proc/self/io, after the files were dropped from
the page cache (posix_fadvise): it counts mapped pages and read-ahead too. Seconds are wall time, as a token on a cold
disk takes; the machine may be busy, so read the ratios. All are given as median (lowest - highest) of the rounds.
"""

import argparse
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from logging import getLogger
from pathlib import Path

import torch
from accelerate.utils import OffloadedWeightsLoader
from torch import Tensor
from transformers import Llama4ForCausalLM, Llama4TextConfig
from transformers.utils import logging

import llama4lab as lab
from llama4lab.model.llama4 import HookedLlama4ForCausalLM

SHAPES = {"16 experts": (16, 8, 1), "128 experts": (128, 4, 2)}
PARTS = ["self_attn", "input_layernorm", "post_attention_layernorm"]
PARTS += ["feed_forward.router", "feed_forward.shared_expert"]
MB = 10**6


@dataclass
class Rounds:
    """What each round of one library took."""

    asked: list[float] = field(default_factory=list)
    disk: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


class Asked:
    """Counts the bytes that accelerate's loader hands out."""

    def __init__(self):
        self.nbytes, get = 0, OffloadedWeightsLoader.__getitem__

        def counted(loader: OffloadedWeightsLoader, key: str) -> Tensor:
            tensor = get(loader, key)
            self.nbytes += tensor.nbytes
            return tensor

        OffloadedWeightsLoader.__getitem__ = counted  # pyright: ignore[reportAttributeAccessIssue]


def write(folder: Path, num_experts: int, layers: int, every: int) -> None:
    """Random weights in bfloat16."""
    config = Llama4TextConfig(
        vocab_size=1024,
        hidden_size=512,
        intermediate_size=1024,
        intermediate_size_mlp=2048,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        num_local_experts=num_experts,
        interleave_moe_layer_step=every,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    torch.manual_seed(0)
    HookedLlama4ForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def device_maps(layers: int, every: int) -> dict[str, tuple[dict[str, str], bool]]:
    """Maps that both libraries read, and whether there is RAM for what every pass uses."""
    rest = {name: "cpu" for name in ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")}
    whole = rest | {f"model.layers.{layer}": "disk" for layer in range(layers)}
    experts = dict(rest)
    for layer in range(layers):
        path = f"model.layers.{layer}"
        if layer % every == every - 1:
            experts |= {f"{path}.{part}": "cpu" for part in PARTS} | {f"{path}.feed_forward.experts": "disk"}
        else:
            experts[path] = "cpu"
    return {"experts": (experts, False), "layers": (whole, False), "layers, RAM": (whole, True)}


def always_nbytes(folder: Path) -> int:
    """The bytes of what every pass uses."""
    model = lab.load(folder, dtype="bfloat16")
    return sum(own.nbytes for name, own in model.named_parameters() if ".experts." not in name)


def dropped(folder: Path) -> None:
    """Takes the files out of the page cache; pages that are mapped stay, so nobody may map what is compared."""
    gc.collect()
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_nbytes() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def spread(values: list[float], digits: int = 2) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} - {max(values):.{digits}f})"


@torch.no_grad()
def compared(folder: Path, places: dict[str, str], kept: int, rounds: int, asked: Asked) -> tuple[Rounds, Rounds]:
    own_map = {name: place for name, place in places.items() if name != "model.rotary_emb"}
    ours = lab.load(folder, dtype="bfloat16", device_map=own_map, memory={"cpu": kept})
    theirs = Llama4ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map=places).eval()
    store = ours.store
    assert store is not None
    calls: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[], int], Rounds]] = {
        "ours": (lambda ids: ours(ids, use_cache=False).logits, lambda: store.traffic.bytes_read, Rounds()),
        "theirs": (lambda ids: theirs(ids, use_cache=False).logits, lambda: asked.nbytes, Rounds()),
    }
    for number in range(rounds + 1):
        ids, found = torch.tensor([[11 + 37 * number]]), []
        for call, nbytes, seen in calls.values():
            dropped(folder)
            before, disk, start = nbytes(), disk_nbytes(), time.perf_counter()
            found.append(call(ids))
            seconds = time.perf_counter() - start
            if number:  # the first one fills what is kept
                seen.asked.append((nbytes() - before) / MB)
                seen.disk.append((disk_nbytes() - disk) / MB)
                seen.seconds.append(seconds)
        torch.testing.assert_close(*found, rtol=0.05, atol=0.05)
    return calls["ours"][2], calls["theirs"][2]


def show(rounds: int) -> None:
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    getLogger("accelerate").setLevel("ERROR")
    asked = Asked()
    heads = [f"{head:>24}" for head in ("ours", "accelerate", "accelerate / ours")]
    print(f"{'':<13} {'on disk':<12} {'':<9} {' '.join(heads)}")
    for shape, sizes in SHAPES.items():
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write(folder, *sizes)
            for label, (places, keeps) in device_maps(*sizes[1:]).items():
                kept = always_nbytes(folder) if keeps else 0
                pair = compared(folder, places, kept, rounds, asked)
                for what in ("asked", "disk", "seconds"):
                    own, other = (getattr(each, what) for each in pair)
                    ratios = [b / a for a, b in zip(own, other, strict=True) if a]
                    digits = 3 if what == "seconds" else 1
                    cells = f"{spread(own, digits):>24} {spread(other, digits):>24}"
                    unit = "s" if what == "seconds" else f"{what}, MB"
                    ratio = spread(ratios, 1) if ratios else "-"
                    print(f"{shape:<13} {label:<12} {unit:<9} {cells} {ratio:>24}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    show(parser.parse_args().rounds)
