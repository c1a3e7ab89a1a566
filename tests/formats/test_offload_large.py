"""Experts much larger than the memory that they may take: 3 GB of them in 600 MB."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llama4lab.model.llama4 import HookedLlama4ForCausalLM

MB = 10**6
BUDGET, ALLOWED = 600 * MB, 300 * MB
EXPERTS = {"hidden_size": 2048, "intermediate_size": 4096, "num_local_experts": 32, "num_hidden_layers": 2}
EXPERTS |= {"interleave_moe_layer_step": 1, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128}

MEASURE = """
import json, sys
from pathlib import Path
import torch
import llama4lab as lab

def figure(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

torch.set_num_threads(1)
folder, logits, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
lab.load()  # what is imported late is there
start = figure("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
model = lab.load(folder, dtype="bfloat16", **options)
ids = torch.randint(1, 100, (1, 64), generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    torch.save([model(ids).logits, model(ids.flip(1)).logits], logits)
read = 0 if model.store is None else model.store.traffic.bytes_read
print(start, figure("VmHWM"), read)
"""


def write(folder: Path, config, shapes: dict[str, tuple[int, ...]]) -> int:
    """Writes a checkpoint of random bfloat16 weights, one slice after the other; gives the bytes of its experts."""
    header, place = {}, 0
    for name, shape in shapes.items():
        nbytes = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [place, place + nbytes]}
        place += nbytes
    text = json.dumps(header).encode()
    generator = torch.Generator().manual_seed(0)
    config.save_pretrained(folder)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            ones = 1.0 if name.endswith("norm.weight") else 0.0
            for _ in range(shape[0] if len(shape) == 3 else 1):
                values = torch.empty(shape[-2:]).uniform_(-0.04, 0.04, generator=generator) + ones
                file.write(values.bfloat16().view(torch.int16).numpy().tobytes())
    return sum(2 * torch.Size(shape).numel() for name, shape in shapes.items() if ".experts." in name)


@pytest.fixture(scope="module")
def large(tmp_path_factory, text_config):
    config = text_config(**EXPERTS)
    with torch.device("meta"):
        shapes = {name: tuple(own.shape) for name, own in HookedLlama4ForCausalLM(config).named_parameters()}
    folder = tmp_path_factory.mktemp("large")
    config.architectures = ["Llama4ForCausalLM"]
    nbytes = write(folder, config, shapes)
    assert nbytes > 3000 * MB
    return folder


def measured(folder: Path, **options) -> tuple[list[torch.Tensor], int, int]:
    """The logits of two passes, by how much the process grew at most, and what it read from disk, in bytes."""
    logits = folder / "logits.pt"
    command = [sys.executable, "-c", MEASURE, str(folder), str(logits), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    start, peak, read = map(int, done.stdout.split())
    found = torch.load(logits)
    grown = f"{(peak - start) / MB:.0f} MB above the {start / MB:.0f} MB of the imports"
    print(f"{options}: {grown}, {read / MB:.0f} MB read")
    return found, peak - start, read


@pytest.mark.slow
def test_three_gigabytes_of_experts_run_in_six_hundred_megabytes(large):
    wanted, _, _ = measured(large)
    for options in ({"experts": "offload"}, {"device_map": "disk"}, {"device_map": "auto"}):
        found, grown, read = measured(large, memory={"cpu": BUDGET}, **options)
        assert all(one.equal(two) for one, two in zip(found, wanted, strict=True)), options
        assert grown < BUDGET + ALLOWED, options
        assert read > 2 * BUDGET, "or it would have been no test"
