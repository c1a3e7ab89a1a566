"""How many cells of a sweep fit into memory at once."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int
from torch import nn

from llama4lab.model.config_parts import text_part
from llama4lab.run.size import free_nbytes
from llama4lab.run.sweep_engine.engine import Batches, Engine
from llama4lab.run.sweep_plan import SweepPlan

MOST_TOKENS = 8192  # beyond this a call of a layer gains no speed
UNITS = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def nbytes(memory: str | int) -> int:
    """Reads a size such as `"2GiB"` or a number of bytes.

    Raises:
        ValueError: if it is no size.
    """
    if isinstance(memory, int):
        return memory
    digits = memory.strip().upper().rstrip("GKMIB").strip()
    unit = memory.strip().upper().removeprefix(digits).strip()
    try:
        return int(float(digits) * UNITS[unit])
    except (ValueError, KeyError):
        raise ValueError(f'memory={memory!r} is no size. Pass bytes, or for example "512MiB" or "4GiB".') from None


@dataclass(frozen=True)
class Needs:
    """What a sweep takes, in bytes.

    Attributes:
        fixed: The two runs themselves, their logits at the positions of the metric, and values that are put in.
        waiting: A token between two layers.
        working: A token inside a layer, on top.
        logit: A position in the head.
        tile: A tile in the vision tower.
    """

    fixed: int
    waiting: int
    working: int
    logit: int
    tile: int


def needs(plan: SweepPlan) -> Needs:
    """Estimates from the config what a sweep takes."""
    config, size = text_part(plan.model.config), plan.model.dtype.itemsize
    d_model, length = config.hidden_size, plan.base.input_ids.shape[1]
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    d_ff = max(config.intermediate_size, config.intermediate_size_mlp)
    # Inputs, norms and outputs of both halves; queries before and after RoPE (in float32) and their sums; neurons.
    working = size * (8 * d_model + 4 * queries + 6 * d_ff) + 4 * 2 * queries
    working += length * (4 * keys * size + 1)  # the keys and values that each continues, and a mask
    if any(name.endswith((".scores", ".pattern")) for name in plan.substitutions):
        working += 12 * config.num_attention_heads * length
    per_entry = max((entries.unit.numel() for entries in plan.substitutions.values()), default=0) * 64
    pair = 2 * plan.base.input_ids.numel()
    logit = 12 * config.vocab_size
    fixed = pair * (working + 4 * size * d_model) + 2 * len(plan.base) * len(plan.metrics[0].positions) * logit
    fixed += per_entry + sum(tensor.nbytes for tensor in plan.constants.values() if tensor.is_contiguous())
    tile = 0
    if plan.model.vision is not None and plan.base.pixel_values is not None:
        vision = plan.model.vision.config
        patches = plan.model.vision.positional_embedding_vlm.shape[0]
        tile = patches * size * (8 * vision.hidden_size + 2 * vision.intermediate_size)
    return Needs(fixed, 4 * size * d_model, working, logit, tile)


def batches(plan: SweepPlan, memory: int | None, engine: Engine) -> tuple[Batches, int]:
    """How much to compute at once, and how many tokens may wait between two layers.

    Raises:
        MemoryError: if not even one cell fits.
    """
    need, positions = needs(plan), len(plan.metrics[0].positions)
    budget = free_nbytes(plan.model.device) // 2 if memory is None else memory
    cell = int(max(engine.tokens(np.arange(len(plan.cells))), default=0))
    least = need.fixed + cell * (need.waiting + need.working) + plan.num_rows * positions * need.logit + need.tile
    if least > budget:
        raise MemoryError(
            f"The sweep takes at least {least / 2**20:.0f} MiB, one cell at a time; the budget is {budget / 2**20:.0f} "
            f"MiB.\nRaise memory=, take fewer rows, or a metric that reads fewer than {positions} positions."
        )
    free = budget - need.fixed
    most = MOST_TOKENS if not offloaded(plan.model) else 2**30
    tokens = max(min(int(0.4 * free / need.working), most), cell, 1)
    rows = max(int(0.2 * free / need.logit), plan.num_rows * positions)
    tiles = max(int(0.2 * free / need.tile), 1) if need.tile else 1
    return Batches(tokens, min(rows, 4096), min(tiles, 64)), max(int(0.4 * free / need.waiting), cell)


def waves(tokens: Int[np.ndarray, " cell"], most_tokens: int, most_cells: int) -> list[slice]:
    """Cells in their order, cut into pieces of bounded size, each of at least one cell."""
    found, start, total = [], 0, 0
    for index, size in enumerate(tokens.tolist()):
        if index > start and (total + size > most_tokens or index - start >= most_cells):
            found.append(slice(start, index))
            start, total = index, 0
        total += size
    return [*found, slice(start, len(tokens))] if len(tokens) else []


def offloaded(model: nn.Module) -> bool:
    """Whether accelerate keeps weights of the model elsewhere until they are used."""
    return any(getattr(getattr(module, "_hf_hook", None), "offload", False) for module in model.modules())
