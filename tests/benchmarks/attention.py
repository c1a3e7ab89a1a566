"""How prefill grows with the length of the text in chunked layers: time and peak memory, beside transformers.

    python tests/benchmarks/attention.py            both tables, about ten minutes
    python tests/benchmarks/attention.py time       one of: time memory
    python tests/benchmarks/attention.py map 131072 the map of chunks of a text of that length, all heads of two layers

Both models have the same weights: two chunked layers of hidden size 128 with 4 heads, chunks of 1,024 tokens, no
experts, float32. Times are CPU seconds of one thread, calls in turn, as median (lowest - highest) of the rounds.
"growth" is the factor over the line above: 2 is linear in the length, 4 is quadratic. Memory is by how much one pass
lifts the process above what it held (Linux).
"""

import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import Llama4ForCausalLM, Llama4TextConfig

from llama4lab.model.llama4 import HookedLlama4ForCausalLM
from llama4lab.run.attention.streaming import attention_stream
from llama4lab.tables.attention.chunk_maps import chunk_map
from llama4lab.tables.heads import scores

LENGTHS = (2048, 4096, 8192, 16384)
ROUNDS = 3
NAMES = ("ours", "theirs")


def config(**changes) -> Llama4TextConfig:
    settings = {
        "vocab_size": 128,
        "hidden_size": 128,
        "intermediate_size": 128,
        "intermediate_size_mlp": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_local_experts": 4,
        "moe_layers": [],
        "no_rope_layers": [1, 1],
        "layer_types": ["chunked_attention"] * 2,
        "attention_chunk_size": 1024,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    }
    return Llama4TextConfig(**settings | changes)


def models() -> dict[str, torch.nn.Module]:
    """Both models with the same weights."""
    torch.manual_seed(0)
    theirs = Llama4ForCausalLM(config()).eval()
    ours = HookedLlama4ForCausalLM(config()).eval()
    ours.load_state_dict(theirs.state_dict())
    return dict(zip(NAMES, (ours, theirs), strict=True))


def ids(length: int) -> torch.Tensor:
    return torch.randint(2, 128, (1, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def in_turn(calls: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """CPU seconds of each call, round by round."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for name in list(calls) * ROUNDS:
        start = time.process_time()
        calls[name]()
        seconds[name].append(time.process_time() - start)
    return seconds


def show(length: int, found: dict[str, str], growth: dict[str, float]) -> None:
    cells = [f"{found[name]:>34} {f'{growth[name]:.1f}x' if growth else '':>7}" for name in NAMES]
    print(f"{length:>8} {' '.join(cells)}", flush=True)


@torch.no_grad()
def times() -> None:
    both, before = models(), {}
    first = ids(2048)
    assert (both["ours"](first).logits - both["theirs"](first).logits).abs().max() < 2e-5
    for length in LENGTHS:
        tokens = ids(length)
        found = in_turn({name: partial(both[name], tokens, use_cache=False, logits_to_keep=1) for name in NAMES})
        middle = {name: statistics.median(values) for name, values in found.items()}
        cells = {n: f"{middle[n]:.2f} ({min(v):.2f} - {max(v):.2f}) s" for n, v in found.items()}
        show(length, cells, {name: middle[name] / before[name] for name in NAMES} if before else {})
        before = middle


def memory() -> None:
    before: dict[str, float] = {}
    for length in LENGTHS:
        peaks = {}
        for name in NAMES:
            command = [sys.executable, __file__, "peak", name, str(length)]
            peaks[name] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        growth = {name: peaks[name] / before[name] for name in NAMES} if before else {}
        show(length, {name: f"{peak:.0f} MiB" for name, peak in peaks.items()}, growth)
        before = peaks


def lifted(call: Callable[[], object]) -> float:
    """By how many MiB a call lifts the process above what it held."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    call()
    return (resident("VmHWM") - before) / 1024


def resident(figure: str) -> int:
    """VmRSS, what the process holds, or VmHWM, the most it held, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(figure))


@torch.no_grad()
def peak(name: str, length: int) -> None:
    model, tokens = models()[name], ids(length)
    model(tokens[:, :8], use_cache=False)
    print(lifted(partial(model, tokens, use_cache=False, logits_to_keep=1)))


def long_map(length: int) -> None:
    """One chunked layer and one NoPE layer of 8 heads, chunks of 8,192 tokens, experts in both."""
    changes = {
        "hidden_size": 64,
        "intermediate_size": 48,
        "num_attention_heads": 8,
        "head_dim": 16,
        "moe_layers": [0, 1],
    }
    changes |= {"attention_chunk_size": 8192, "no_rope_layers": [1, 0]}
    changes |= {"layer_types": ["chunked_attention", "full_attention"]}
    torch.manual_seed(0)
    model, stream = HookedLlama4ForCausalLM(config(**changes)).eval(), []
    prompt = model.prompt(ids(length).tolist())
    wall, cpu = time.perf_counter(), time.process_time()
    extra = lifted(lambda: stream.append(attention_stream(model, prompt)))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    table = chunk_map(stream[0])
    sums = table.groupby(["layer", "head", "query_chunk"])["mass"].sum()
    print(f"{length} tokens: {wall:.0f} s, {cpu:.0f} s of CPU, {extra:.0f} MiB; {len(table)} lines")
    print(f"masses sum to 1 within {np.abs(np.asarray(sums) - 1).max():.1e}; scores of {len(scores(stream[0]))} heads")


if __name__ == "__main__":
    torch.set_num_threads(1)
    wanted = sys.argv[1:] or ["time", "memory"]
    if wanted[0] == "peak":
        peak(wanted[1], int(wanted[2]))
    elif wanted[0] == "map":
        long_map(int(wanted[1]))
    else:
        for name in wanted:
            print(f"{'':>8} {f'llama4lab, {name}':>34} {'growth':>7} {f'transformers, {name}':>34} {'growth':>7}")
            {"time": times, "memory": memory}[name]()
