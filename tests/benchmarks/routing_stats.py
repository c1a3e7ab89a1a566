"""What counting costs: `routing_stats` against the bare forward pass on the very same batches, in one process, in turn.

    python tests/benchmarks/routing_stats.py            speed and memory, about five minutes
    python tests/benchmarks/routing_stats.py speed      one of: speed memory

Speed is the time of the bare passes divided by that of `routing_stats`, as median (lowest - highest) of the rounds;
1.00 would be counting for nothing. Times are CPU seconds of one thread; the machine may be busy, so read the ratios.
The bare pass computes the logits of the last position only. The counts of a vocabulary need predictions: there the bare
pass computes the logits of all positions. Prompts are made before the clock starts; the last line says what making them
would add. Memory is how far the process rises above what it held before, and the most that Python held (tracemalloc).
"""

import gc
import random
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import Llama4TextConfig

import llama4lab as lab
from llama4lab.model.llama4 import HookedLlama4ForCausalLM
from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.run.corpus.batches import batch_of, bucketed, windows
from llama4lab.run.corpus.items import rows_of
from llama4lab.tiny.domains.catalogue import DRAWS, examples

TOKENS = 4096  # of a batch


def large(num_experts: int) -> HookedPreTrainedModel:
    """Random weights, hidden size 512, 8 layers."""
    config = Llama4TextConfig(
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
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    torch.manual_seed(0)
    return HookedLlama4ForCausalLM._from_config(config, dtype=torch.float32).eval()


def random_prompts(count: int, vocab: int = 1024) -> Iterator[list[int]]:
    """Rows of 32 to 256 tokens, about `count` tokens in all."""
    rng = random.Random(0)
    while count > 0:
        length = min(rng.randint(32, 256), count)
        count -= length
        yield [rng.randrange(5, vocab) for _ in range(length)]


def batches(model: HookedPreTrainedModel, prompts: list[lab.Prompt]) -> list[dict[str, Tensor]]:
    """The batches that `routing_stats` runs."""
    rows = (rows_of(model, prompt, "all", number) for number, prompt in enumerate(prompts))
    cut = [batch for window in windows(rows, TOKENS) for batch in bucketed(window, TOKENS)]
    filler = model.prompter.vocabulary.filler
    return [batch_of(batch, filler).inputs(model.device) for batch in cut]


def bare(model: HookedPreTrainedModel, inputs: list[dict[str, Tensor]], keep: int = 1) -> None:
    for batch in inputs:
        model(**batch, use_cache=False, logits_to_keep=keep)


def interleaved(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each call, round by round, after one call of each that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for name in list(calls) * (rounds + 1):
        start = time.process_time()
        calls[name]()
        seconds[name].append(time.process_time() - start)
    return {name: times[1:] for name, times in seconds.items()}


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} - {max(values):.2f})"


def show(label: str, model: HookedPreTrainedModel, prompts: list[lab.Prompt], rounds: int) -> None:
    inputs = batches(model, prompts)
    count = partial(lab.routing_stats, model, prompts, tokens=TOKENS, progress=False)
    calls: dict[str, Callable[[], object]] = {
        "bare": partial(bare, model, inputs),
        "stats": count,
        "bare, all logits": partial(bare, model, inputs, 0),
        "stats with vocabulary": partial(count, vocabulary=True),
    }
    seconds = interleaved(calls, rounds)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in inputs)
    for plain, counted in (("bare", "stats"), ("bare, all logits", "stats with vocabulary")):
        ratios = [a / b for a, b in zip(seconds[plain], seconds[counted], strict=True)]
        row = f"{label:<28} {counted:<22} {tokens:>7,} {len(inputs):>8}"
        print(f"{row} {spread(seconds[plain]):>22} {spread(seconds[counted]):>22} {spread(ratios):>22}", flush=True)


@torch.no_grad()
def speed() -> None:
    heads = f"{'bare, CPU seconds':>22} {'routing_stats':>22} {'speed':>22}"
    print(f"{'':<28} {'':<22} {'tokens':>7} {'batches':>8} {heads}")
    tiny = lab.load()
    texts = [example for domain in DRAWS for example in examples(domain, 40)]
    start = time.process_time()
    prompts = [tiny.prompt(example.text, images=example.image) for example in texts]
    making = time.process_time() - start
    show("tiny checkpoint", tiny, prompts, 9)
    for num_experts in (16, 128):
        model = large(num_experts)
        prompts = [model.prompt(ids) for ids in random_prompts(4000)]
        show(f"width 512, {num_experts} experts", model, prompts, 5)
    print(f"making the {len(texts)} prompts of the first line took {making:.2f} s")


def memory() -> None:
    for count in (20_000, 200_000):
        command = [sys.executable, __file__, "peak", str(count)]
        rise, python = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        print(f"tiny checkpoint, {count:>7,} tokens: process {rise:>6} MiB, Python {python:>6} MiB", flush=True)


def peak(count: int) -> None:
    """Prints by how many MiB counting lifts the process above what it held (Linux), and Python's own peak."""
    torch.set_num_threads(1)
    tiny = lab.load()
    lab.routing_stats(tiny, random_prompts(1000), tokens=TOKENS, progress=False)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    tracemalloc.start()
    lab.routing_stats(tiny, random_prompts(count), tokens=TOKENS, vocabulary=True, progress=False)
    print(f"{(resident('VmHWM') - before) / 1024:.1f} {tracemalloc.get_traced_memory()[1] / 2**20:.2f}")


def resident(figure: str) -> int:
    """VmRSS, what the process holds, or VmHWM, the most it held, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(figure))


if __name__ == "__main__":
    if sys.argv[1:2] == ["peak"]:
        peak(int(sys.argv[2]))
    else:
        torch.set_num_threads(1)
        for name in sys.argv[1:] or ["speed", "memory"]:
            {"speed": speed, "memory": memory}[name]()
