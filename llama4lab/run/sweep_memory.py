"""How many cells of a sweep fit into memory at once."""

from dataclasses import dataclass
from math import prod

import numpy as np
from jaxtyping import Int
from torch import nn

from llama4lab.model.config_parts import text_part
from llama4lab.run.hook_names import is_pattern, is_vision, layer_of
from llama4lab.run.size import free_nbytes
from llama4lab.run.size import shape as shape_of
from llama4lab.run.sweep_engine.engine import Batches, Engine
from llama4lab.run.sweep_plan import SweepPlan

MOST_TOKENS, MOST_LOGITS, MOST_TILES = 8192, 4096, 64  # beyond these a call gains no speed
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
        unit: A cell in one row while its attention is computed: the keys and values that it continues, its patterns.
        logit: A position in the head.
        tile: A tile in the vision tower.
    """

    fixed: int
    waiting: int
    working: int
    unit: int
    logit: int
    tile: int


def needs(plan: SweepPlan) -> Needs:
    """Estimates from the config what a sweep takes."""
    config, size = text_part(plan.model.config), plan.model.dtype.itemsize
    d_model, length = config.hidden_size, plan.base.input_ids.shape[1]
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    slots = config.num_experts_per_tok
    d_ff = max(slots * config.intermediate_size, config.intermediate_size, config.intermediate_size_mlp)
    attention = 4 * size * d_model + 4 * (6 * queries + 4 * keys)  # RoPE and norms are computed in float32
    working = max(attention, size * ((6 + 4 * slots) * d_model + 4 * d_ff)) + _patched_nbytes(plan)
    unit = length * (4 * keys * size + 8)
    if any(is_pattern(name) for name in plan.substitutions):
        unit += 16 * config.num_attention_heads * length**2
    waiting, logit = 4 * size * d_model + 64, 16 * config.vocab_size
    entries = sum(entries.unit.numel() for entries in plan.substitutions.values())
    fixed = 2 * plan.base.input_ids.numel() * (working + waiting) + 2 * len(plan.base) * unit
    fixed += 2 * len(plan.base) * len(plan.metrics[0].positions) * logit + 128 * entries
    fixed += sum(tensor.nbytes for tensor in plan.constants.values())
    tile = 0
    if plan.model.vision is not None and plan.base.pixel_values is not None:
        vision = plan.model.vision.config
        patches = plan.model.vision.positional_embedding_vlm.shape[0]
        tile = patches * size * (8 * vision.hidden_size + 2 * vision.intermediate_size)
    return Needs(fixed, waiting, working, unit, logit, tile)


def _patched_nbytes(plan: SweepPlan) -> int:
    """What the tensors of the patched hook points of one text layer add to a token: old, new, and what is put in."""
    layers: dict[int | None, int] = {}
    for name, entries in plan.substitutions.items():
        if not is_vision(name) and not is_pattern(name):
            sizes = shape_of(plan.model, plan.base, name, entries.shape)[2:]
            layers[layer_of(name)] = layers.get(layer_of(name), 0) + 3 * plan.model.dtype.itemsize * prod(sizes)
    return max(layers.values(), default=0)


def batches(plan: SweepPlan, memory: int | None, engine: Engine) -> tuple[Batches, int]:
    """How much to compute at once, and how many tokens may wait between two layers.

    Raises:
        MemoryError: if not even one cell fits.
    """
    need, positions = needs(plan), len(plan.metrics[0].positions)
    budget = free_nbytes(plan.model.device) // 2 if memory is None else memory
    cell = int(max(engine.tokens(np.arange(len(plan.cells))), default=0))
    inside = max(cell * need.working, plan.num_rows * positions * need.logit, need.tile) + need.unit
    least = need.fixed + cell * need.waiting + inside
    if least > budget:
        raise MemoryError(
            f"The sweep takes at least {least / 2**20:.1f} MiB, one cell at a time; the budget is {budget / 2**20:.1f} "
            f"MiB.\nRaise memory=, take fewer rows, or a metric that reads fewer than {positions} positions."
        )
    # Layer, attention and head are never at work together: half is for them, half for the cells that wait.
    # A tenth is left to the allocator.
    half = max(int(0.9 * budget) - need.fixed, 0) // 2
    most = MOST_TOKENS if not offloaded(plan.model) else 2**30
    tokens = max(min(int(0.7 * half / need.working), most), cell, 1)
    units = max(int(0.3 * half / need.unit), 1)
    rows = max(min(half // need.logit, MOST_LOGITS), plan.num_rows * positions)
    tiles = max(min(half // need.tile, MOST_TILES), 1) if need.tile else 1
    return Batches(tokens, units, rows, tiles), max(half // need.waiting, cell)


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
    """Whether weights of the model wait elsewhere until they are used: in a store, or where accelerate keeps them."""
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    return getattr(model, "store", None) is not None or any(getattr(hook, "offload", False) for hook in hooks)
