"""Speed and memory of the bare model against transformers: same weights, same process, calls in turn.

    python tests/benchmarks/speed.py            all tables, about ten minutes
    python tests/benchmarks/speed.py prefill    one of: prefill decode memory chunks hooks

Times are CPU seconds of one thread, as median (lowest - highest) of the rounds; the machine may be busy, so read the
ratios. Weights are random normal, hidden size 512, 8 layers, float32.
"""

import copy
import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers import Llama4ForCausalLM, Llama4TextConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_chunked_causal_mask

from llama4lab.model import attention_kernels
from llama4lab.model.hook_point import HookPoint
from llama4lab.model.llama4 import HookedLlama4ForCausalLM
from llama4lab.model.output import CACHE
from llama4lab.model.token_layout import plain_layout

PREFILL, DECODE = (128, 512), 32


def config(num_experts: int, chunk: int = 8192) -> Llama4TextConfig:
    return Llama4TextConfig(
        vocab_size=1024,
        hidden_size=512,
        intermediate_size=1024,
        intermediate_size_mlp=2048,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        num_local_experts=num_experts,
        interleave_moe_layer_step=1 if num_experts <= 16 else 2,
        attention_chunk_size=chunk,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )


def pair(num_experts: int, chunk: int = 8192) -> tuple[HookedLlama4ForCausalLM, Llama4ForCausalLM]:
    """Both models on the very same tensors."""
    torch.manual_seed(0)
    theirs = Llama4ForCausalLM(config(num_experts, chunk)).eval()
    with torch.device("meta"):
        ours = HookedLlama4ForCausalLM(copy.deepcopy(theirs.config)).eval()
    ours.load_state_dict(theirs.state_dict(), assign=True)
    return ours, theirs


def interleaved(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each call, round by round, after one call of each that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for name in list(calls) * (rounds + 1):
        start = time.process_time()
        calls[name]()
        seconds[name].append(time.process_time() - start)
    return {name: times[1:] for name, times in seconds.items()}


def spread(seconds: list[float]) -> str:
    low, middle, high = (1000 * value for value in (min(seconds), statistics.median(seconds), max(seconds)))
    return f"{middle:8.1f} ({low:.1f} - {high:.1f}) ms"


def show(label: str, seconds: dict[str, list[float]]) -> None:
    ours, theirs = seconds.values()
    ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
    print(f"{label:<44} {spread(ours):>34} {spread(theirs):>36}   {ratio:5.1f}x", flush=True)


@torch.no_grad()
def prefill() -> None:
    for num_experts in (16, 128):
        ours, theirs = pair(num_experts)
        for length in PREFILL:
            ids = torch.randint(1024, (1, length))
            assert (ours(ids).logits - theirs(ids).logits).abs().max() < 2e-5
            calls = {"ours": partial(ours, ids), "theirs": partial(theirs, ids)}
            show(f"prefill, {num_experts} experts, {length} tokens", interleaved(calls, 5 if num_experts < 99 else 3))


@torch.no_grad()
def decode() -> None:
    for num_experts in (16, 128):
        prompt = torch.randint(1024, (1, DECODE))
        calls = {}
        for name, model in zip(("ours", "theirs"), pair(num_experts), strict=True):
            cache = getattr(model(prompt, use_cache=True), CACHE)
            calls[name] = partial(model, prompt[:, -1:], **{CACHE: cache}, use_cache=True)
        show(f"decode, {num_experts} experts, a token", interleaved(calls, 20 if num_experts < 99 else 8))


@torch.no_grad()
def chunks() -> None:
    ours, theirs = pair(16, chunk=1024)
    q, k, v = torch.randn(1, 8, 4096, 64), torch.randn(1, 2, 4096, 64), torch.randn(1, 2, 4096, 64)
    calls: dict[str, Callable[[], object]] = {
        "ours": partial(kernel, ours, q, k, v),
        "theirs": partial(kernel, theirs, q, k, v),
    }
    show("chunked attention, 4 chunks of 1,024", interleaved(calls, 5))


def kernel(model, q, k, v):
    """The attention kernel of a chunked layer as each model calls it, the mask made anew."""
    if isinstance(model, HookedLlama4ForCausalLM):
        return attention_kernels.fused(q, k, v, plain_layout(1, 4096, 0, 0, q.device), 1024, 0.0)
    # By position: releases of transformers call the cache by two names. There is no mask and no cache.
    mask = create_chunked_causal_mask(model.config, torch.empty(1, 4096, 0), None, None, torch.arange(4096)[None])
    return sdpa_attention_forward(model.model.layers[0].self_attn, q, k, v, mask)


def memory() -> None:
    for num_experts in (16, 128):
        peaks = {}
        for name in ("ours", "theirs"):
            command = [sys.executable, __file__, "peak", name, str(num_experts)]
            peaks[name] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        label = f"peak memory, {num_experts} experts, 2,048 tokens"
        ours, theirs = peaks.values()
        print(f"{label:<44} {ours:>31.0f} MiB {theirs:>32.0f} MiB   {theirs / ours:5.1f}x", flush=True)


@torch.no_grad()
def peak(name: str, num_experts: int) -> None:
    """Prints by how many MiB one pass lifts the process above what it held (Linux)."""
    torch.set_num_threads(1)
    kind = HookedLlama4ForCausalLM if name == "ours" else Llama4ForCausalLM
    model = kind(config(num_experts)).eval()
    model(torch.randint(1024, (1, 8)), use_cache=False)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    model(torch.randint(1024, (1, 2048)), use_cache=False, logits_to_keep=1)
    print((resident("VmHWM") - before) / 1024)


def resident(figure: str) -> int:
    """VmRSS, what the process holds, or VmHWM, the most it held, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(figure))


@torch.no_grad()
def hooks() -> None:
    """What unused hook points cost: their calls, timed alone, against a decoding step of which they are part."""
    ours = HookedLlama4ForCausalLM(config(16)).eval()
    points = [module for module in ours.modules() if isinstance(module, HookPoint) and not module.lazy]
    ids, x = torch.randint(1024, (1, 1)), torch.zeros(1)
    layer = ours.model.layers[0].self_attn

    def calls() -> None:
        for _ in range(100 * len(points)):
            layer.q(x)  # looked up and called, as in the forward pass

    def steps() -> None:
        for _ in range(10):
            ours(ids)

    times = interleaved({"calls": calls, "steps": steps}, 9)
    share = [(a / 100) / (b / 10) for a, b in zip(times["calls"], times["steps"], strict=True)]
    print(f"{len(points)} unused hook points take {100 * statistics.median(share):.2f} % of a one-token pass")


if __name__ == "__main__":
    if sys.argv[1:2] == ["peak"]:
        peak(sys.argv[2], int(sys.argv[3]))
    else:
        torch.set_num_threads(1)
        print(f"{'':<44} {'llama4lab':>34} {'transformers':>36}   ratio")
        for name in sys.argv[1:] or ["prefill", "decode", "chunks", "memory", "hooks"]:
            {"prefill": prefill, "decode": decode, "chunks": chunks, "memory": memory, "hooks": hooks}[name]()
