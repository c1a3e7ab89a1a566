import subprocess
import sys
from collections.abc import Callable

import pytest

COMPILER_CHECK = """
import torch
assert torch.compile(lambda x: x.sin() + 1)(torch.ones(8)).isfinite().all()
"""

SMALL_MODEL = """
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
"""


def python(program: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=580)


@pytest.fixture(scope="session")
def compiler() -> None:
    """Skips where torch.compile does not work."""
    check = python(COMPILER_CHECK)
    if check.returncode:
        pytest.skip(f"torch.compile does not work on this machine: {check.stderr.strip().splitlines()[-1]}")


@pytest.fixture
def printed_with_small_model(compiler) -> Callable[[str], str]:
    """Runs a program behind the making of a small `model`, in a process of its own without run-time type checks."""

    def run(program: str) -> str:
        result = python(SMALL_MODEL + program)
        assert result.returncode == 0, result.stderr[-3000:]
        return result.stdout.strip()

    return run
