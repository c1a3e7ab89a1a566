"""Loading against transformers: the same files, in turn, each time in a process of its own.

    python tests/benchmarks/loading.py                       all tables, about ten minutes on one core
    python tests/benchmarks/loading.py bf16 --rounds 3       some of: bf16 float32 int4

Table `bf16` loads a checkpoint in bfloat16 as it is stored, `float32` the same with a conversion, `int4` one whose MLPs
compressed-tensors packed (that table needs `pip install compressed-tensors`). The checkpoints are written to a
temporary folder first: multimodal, 0.5 billion normal numbers, 16 experts, in files of 300 MB.

Times are of one thread with the files in the page cache: wall and CPU seconds of loading alone, and CPU seconds of
loading with a first pass of 8 tokens, since a weight that is mapped is read only when it is used. llama4lab looks at
every number while it loads. Memory is what the process has more than after its imports: after loading its `own` (pages
that no file stands behind) and those `of files` (of the checkpoint, which the system takes back when it needs them),
and the `peak` of both while loading and until the end of the first pass. All are medians (lowest - highest) of the
rounds; the machine may be busy, so read the ratios.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import Llama4Config, Llama4ForConditionalGeneration

import llama4lab as lab
from llama4lab.checkpoint.schemes.encoding import encoded

TABLES = {"bf16": torch.bfloat16, "float32": torch.float32, "int4": torch.bfloat16}
TOOLS = ("llama4lab", "transformers")
TEXT = {"vocab_size": 16_384, "hidden_size": 1024, "intermediate_size": 2048, "intermediate_size_mlp": 4096}
TEXT |= {"num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128}
TEXT |= {"num_local_experts": 16, "interleave_moe_layer_step": 2, "pad_token_id": 0}
VISION = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION |= {"image_size": 112, "patch_size": 14, "vision_output_dim": 512}
VISION |= {"projector_input_dim": 512, "projector_output_dim": 512}
MLPS = re.compile(r"layers\.\d+\.feed_forward\.((shared_expert|experts\.\d+)\.)?(gate|up|down)_proj\.weight$")
PACKED = {"num_bits": 4, "type": "int", "symmetric": True, "group_size": 128, "strategy": "group", "dynamic": False}
SHARD = "300MB"


def write(folder: Path, packed: bool) -> None:
    """Writes a checkpoint of normal numbers."""
    config = Llama4Config(text_config=dict(TEXT), vision_config=dict(VISION), image_token_index=16_000)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Llama4ForConditionalGeneration(config).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    state = {name: (0.03 * torch.randn(shape, generator=generator)).bfloat16() for name, shape in shapes.items()}
    state |= {name: torch.ones_like(tensor) for name, tensor in state.items() if "norm" in name and tensor.ndim == 1}
    document = config.to_dict() | {"dtype": "bfloat16", "architectures": ["Llama4ForConditionalGeneration"]}
    if packed:
        state = dict(packed_mlps(state))
        ignored = sorted({name.removesuffix(".weight") for name in state if name.endswith(".weight")})
        weights = {"targets": ["Linear"], "weights": PACKED}
        document["quantization_config"] = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
        document["quantization_config"] |= {"config_groups": {"group_0": weights}, "ignore": ignored}
        document["quantization_config"] |= {"quantization_status": "compressed"}
    plan = split_torch_state_dict_into_shards(state, max_shard_size=SHARD)
    for file, names in plan.filename_to_tensors.items():
        save_file({name: state[name] for name in names}, folder / file, metadata={"format": "pt"})
    index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
    if plan.is_sharded:
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(document))


def packed_mlps(state: dict[str, Tensor]) -> Any:
    """The same tensors, experts one by one, with all MLPs in 4 bits."""
    for name, tensor in state.items():
        parts = {name: tensor}
        if tensor.ndim == 3 and ".experts." in name:
            experts, _, kind = name.rpartition(".")
            names = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
            parts = {
                f"{experts}.{number}.{part}.weight": half.T.contiguous()
                for number, own in enumerate(tensor)
                for part, half in zip(names, own.chunk(len(names), dim=1), strict=True)
            }
        for each, values in parts.items():
            if MLPS.search(each):
                base = each.removesuffix(".weight")
                yield from ((f"{base}.{part}", made) for part, made in encoded(values, "int4")[0].items())
            else:
                yield each, values


def memory() -> dict[str, int]:
    """Bytes of this process: resident, those of its own among them, and the highest resident so far."""
    rollup = dict(re.findall(r"(\w+): +(\d+) kB", Path("/proc/self/smaps_rollup").read_text()))
    peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    assert peak is not None
    return {"resident": int(rollup["Rss"]) * 1024, "own": int(rollup["Anonymous"]) * 1024, "peak": int(peak[1]) * 1024}


@torch.no_grad()
def load_here(tool: str, folder: Path, dtype: torch.dtype) -> dict[str, float]:
    """Loads in this process, and says what that took."""
    torch.set_num_threads(1)
    ids = torch.arange(8)[None] + 1
    before, wall, cpu = memory(), time.perf_counter(), time.process_time()
    if tool == "llama4lab":
        model: Any = lab.load(folder, dtype=dtype)
    else:
        model = Llama4ForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    wall, loaded, after = time.perf_counter() - wall, time.process_time() - cpu, memory()
    logits = model(input_ids=ids).logits
    passed, last = time.process_time() - cpu, memory()
    return {
        "wall s": wall,
        "CPU s": loaded,
        "CPU s with a pass": passed,
        "own MB": (after["own"] - before["own"]) / 1e6,
        "MB of files": (after["resident"] - after["own"] - before["resident"] + before["own"]) / 1e6,
        "peak MB": (after["peak"] - before["resident"]) / 1e6,
        "peak MB with a pass": (last["peak"] - before["resident"]) / 1e6,
        "logits": float(logits.float().norm()),
    }


def load_apart(tool: str, folder: Path, table: str) -> dict[str, float]:
    """Loads in a process of its own."""
    command = [sys.executable, __file__, "--here", tool, str(folder), table]
    settings = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(command, env=settings, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{tool} could not load {table}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def show(table: str, found: dict[str, list[dict[str, float]]]) -> None:
    """Prints a table; ratios are transformers' number over ours, round by round."""
    print(f"\n{table}\n{'':<22}{'llama4lab':>26}{'transformers':>26}{'theirs / ours':>24}")
    for row in found["llama4lab"][0]:
        ours, theirs = ([each[row] for each in found[tool]] for tool in TOOLS)
        ratios = [
            b / a if abs(a) > 1 or row.startswith(("wall", "CPU")) else float("nan")
            for a, b in zip(ours, theirs, strict=True)
        ]
        print(f"{row:<22}{spread(ours):>26}{spread(theirs):>26}{spread(ratios):>24}", flush=True)


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):,.2f} ({min(values):,.2f} - {max(values):,.2f})"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("tables", nargs="*", help=f"of {' '.join(TABLES)}; all by default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the checkpoints are or will be kept")
    parser.add_argument("--here", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.here:
        tool, folder, table = asked.here
        print(json.dumps(load_here(tool, Path(folder), TABLES[table])))
        return
    with tempfile.TemporaryDirectory() as temporary:
        root = asked.folder or Path(temporary)
        for table in asked.tables or TABLES:
            if table == "int4" and find_spec("compressed_tensors") is None:
                print("int4: left out, compressed-tensors is not installed")
                continue
            folder = root / ("int4" if table == "int4" else "bf16")
            if not (folder / "config.json").is_file():
                folder.mkdir(parents=True, exist_ok=True)
                write(folder, packed=table == "int4")
            found: dict[str, list[dict[str, float]]] = {tool: [] for tool in TOOLS}
            for _ in range(asked.rounds):
                for tool in TOOLS:
                    found[tool].append(load_apart(tool, folder, table))
            show(table, found)


if __name__ == "__main__":
    main()
