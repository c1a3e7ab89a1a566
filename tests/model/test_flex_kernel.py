"""Attention by torch's flex kernel, which needs a compiler; in a process of its own without run-time type checks."""

import subprocess
import sys

import pytest

PROGRAM = """
import torch
from transformers import Llama4TextConfig
from llama4lab.model.llama4 import HookedLlama4ForCausalLM

torch.manual_seed(0)
torch.set_num_threads(1)
try:
    torch.compile(lambda x: x.sin() + 1)(torch.ones(8))
except Exception as problem:
    print("no compiler:", type(problem).__name__)
    raise SystemExit
config = Llama4TextConfig(
    vocab_size=64, hidden_size=64, intermediate_size=24, intermediate_size_mlp=40, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_local_experts=4, interleave_moe_layer_step=2,
    no_rope_layer_interval=2, attention_chunk_size=8, floor_scale=8, pad_token_id=0, initializer_range=0.2,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
)
model = HookedLlama4ForCausalLM(config).eval()
ids = torch.randint(1, 64, (2, 21))
ids[1, :5] = 0
mask = (ids != 0).long()
with torch.no_grad():
    expected = model(ids, attention_mask=mask).logits
    model.attn = "flex"
    found = model(ids, attention_mask=mask).logits
assert model.attn == "flex"
assert (found - expected)[mask.bool()].abs().max() < 1e-5
print("equal")
"""


def test_flex_attention_gives_the_logits_of_the_fused_kernel():
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=580)
    assert result.returncode == 0, result.stderr[-3000:]
    if result.stdout.startswith("no compiler"):
        pytest.skip(f"torch.compile does not work on this machine: {result.stdout.strip()}")
    assert result.stdout.strip() == "equal"


def test_where_torch_cannot_compile_the_error_says_what_works(new_text_model, random_ids, monkeypatch):
    def broken(*_args, **_options):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr("llama4lab.model.flex_kernel.compiled_flex", lambda: broken)
    model = new_text_model()
    model.attn = "flex"
    with pytest.raises(RuntimeError, match=r"attn='flex' needs torch.compile on cpu(?s:.*)Use attn='sdpa'"):
        model(random_ids(1, 9))
