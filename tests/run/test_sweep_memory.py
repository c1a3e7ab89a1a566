"""A sweep stays within the memory that it is given, measured from outside by what the process holds."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llama4lab.run.sweep_memory import nbytes, waves

SCRIPT = """
import gc, sys
from pathlib import Path
import torch
from transformers import Llama4TextConfig
import llama4lab as lab
from llama4lab.model.llama4 import HookedLlama4ForCausalLM

torch.set_num_threads(1)
torch.manual_seed(0)
config = Llama4TextConfig(
    vocab_size=20000, hidden_size=128, intermediate_size=256, intermediate_size_mlp=512, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_local_experts=4, attention_chunk_size=8192,
    rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, pad_token_id=None, bos_token_id=None,
)
model = HookedLlama4ForCausalLM(config).eval()
clean, corrupted = (model.prompt([torch.randint(20000, (96,)).tolist()]) for _ in range(2))
options = {"metric": lab.metrics.logit_diff(3, 4), "progress": False, "over": ["layer", "position"]}

def held(figure):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(figure)) * 1024

lab.sweep(model, clean, corrupted, at="layers.3.resid_pre", memory=2**25, **options)
gc.collect()
for memory in map(int, sys.argv[1:]):
    Path("/proc/self/clear_refs").write_text("5")
    before = held("VmRSS")
    result = lab.sweep(model, clean, corrupted, at="layers.*.resid_pre", memory=memory, **options)
    print(held("VmHWM") - before, float(result.patched.sum()))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are measured on Linux only")
def test_the_peak_stays_inside_the_memory_given():
    budgets = [16 * 2**20, 32 * 2**20, 64 * 2**20]
    command = [sys.executable, "-c", SCRIPT, *map(str, budgets)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\n")
    peaks, sums = zip(*((int(line.split()[0]), float(line.split()[1])) for line in lines if line), strict=True)
    for peak, budget in zip(peaks, budgets, strict=True):
        assert peak <= budget, f"{peak / 2**20:.1f} MiB of {budget / 2**20:.0f}"
    assert max(sums) - min(sums) < 1e-3


def test_cells_are_cut_into_waves_of_bounded_size():
    cut = waves(np.array([3, 3, 3, 9, 1, 1, 1, 1]), most_tokens=6, most_cells=3)
    assert [(s.start, s.stop) for s in cut] == [(0, 2), (2, 3), (3, 4), (4, 7), (7, 8)]
    assert waves(np.zeros(0, dtype=int), 6, 3) == []


@pytest.mark.parametrize(
    ("text", "expected"), [("512", 512), ("2GiB", 2**31), ("1.5 MiB", 1572864), ("3kb", 3000), (77, 77)]
)
def test_sizes_are_read(text, expected):
    assert nbytes(text) == expected
