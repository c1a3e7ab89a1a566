"""torch.compile of the plain forward pass, in a process of its own without run-time type checks."""

import subprocess
import sys
import textwrap

import pytest

COMPILER_CHECK = """
import torch
assert torch.compile(lambda x: x.sin() + 1)(torch.ones(8)).isfinite().all()
"""

PROGRAM = """
import torch
from transformers import Llama4TextConfig
from llama4lab.model.llama4 import HookedLlama4ForCausalLM

torch.manual_seed(0)
torch.set_num_threads(1)
config = Llama4TextConfig(
    vocab_size=64, hidden_size=32, intermediate_size=24, intermediate_size_mlp=40, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_local_experts=4, interleave_moe_layer_step=2,
    no_rope_layer_interval=2, attention_chunk_size=8, floor_scale=8, pad_token_id=0, initializer_range=0.2,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
)
model = HookedLlama4ForCausalLM(config).eval()
compiled = torch.compile(model)
with torch.no_grad():
    for length in (20, 20):
        ids = torch.randint(1, 64, (2, length))
        difference = (compiled(ids, use_cache=False).logits - model(ids, use_cache=False).logits).abs().max()
        assert difference < 1e-4, difference
    ids[1, :5] = 0
    mask = (ids != 0).long()
    kept = mask.bool()
    one, other = (m(ids, attention_mask=mask, use_cache=False).logits[kept] for m in (compiled, model))
    assert (one - other).abs().max() < 1e-4, "padded"
print("equal")
"""


def python(program: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=580)


def test_the_compiled_forward_gives_the_logits_of_the_plain_one():
    check = python(COMPILER_CHECK)
    if check.returncode:
        pytest.skip(f"torch.compile does not work on this machine: {check.stderr.strip().splitlines()[-1]}")
    result = python(PROGRAM)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.strip() == "equal"
