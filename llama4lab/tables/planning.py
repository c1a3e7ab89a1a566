"""What a checkpoint would take: bytes, devices, experts that fit, and the time to wait for the others."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import Llama4Config, Llama4TextConfig

from llama4lab.checkpoint.locating import locate
from llama4lab.checkpoint.opening import settings_of
from llama4lab.checkpoint.shards import FOREIGN_WEIGHTS
from llama4lab.checkpoint.weights import Weights
from llama4lab.model.bandwidths import SOURCES, disk_rate, ram_rate, rates_of
from llama4lab.model.budgets import planned_budgets
from llama4lab.model.config_parts import text_part
from llama4lab.model.loading import HookedModel, check_quantize, dtype_of, named_dtype, opened, without_memory
from llama4lab.model.planned_model import Model
from llama4lab.model.planning import least, placed_for
from llama4lab.model.weight_sizes import weigh
from llama4lab.tables.memory_plan import MemoryPlan
from llama4lab.tables.plan_text import size_text

Name = str | Path | Llama4Config | Llama4TextConfig
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", *FOREIGN_WEIGHTS)


def memory_plan(
    name: Name,
    *,
    memory: Mapping[str, str | int] | None = None,
    dtype: torch.dtype | str | None = None,
    quantize: str | None = None,
    bandwidths: Mapping[str, str | float | int] | None = None,
    context: int = 2048,
) -> MemoryPlan:
    """Says what loading a checkpoint would take, and how to load it into the memory there is. Only headers are read.

    Weights that every token needs go to the first GPU, then to the next, then to RAM, then to disk. If the routed
    experts fit beside them, they are resident; otherwise they wait on disk, and what memory is left keeps those that
    were used last. `lab.load(name, **plan.options)` loads it so.

    Args:
        name: What `lab.load` takes; or a folder with nothing but config.json, or a config, for plain numbers in
            `dtype`.
        memory: How much each device may take, for example `{"cuda:0": "80GiB", "cpu": "100GiB"}`; a device need not
            be here. None for what is free here now.
        dtype: As for `lab.load`; for a config None is bfloat16.
        quantize: As for `lab.load`: what is stored stays plain, what is in memory is quantized.
        bandwidths: Bytes a second from the files ("disk") and from RAM to a GPU ("cpu"), as numbers or texts such as
            "7GB/s". What is not given is measured here: by reading some of the files, and by copying.
        context: How many tokens to set memory aside for.

    Raises:
        FileNotFoundError: if the checkpoint, or a file of it, is not there.
        ValueError: if it is malformed, or if a device, a size, a dtype, a method or a source is none.
        MemoryError: if it does not fit even with its layers on disk.
    """
    budgets, rates = planned_budgets(memory), rates_of(bandwidths or {})
    if context < 1:
        raise ValueError(f"context={context} was asked for; it is a number of tokens, 1 or more.")
    model, weights = _opened(name)
    check_quantize(quantize, weights, advice="Plan it without quantize.")
    chosen = _dtype(dtype, weights, model, on_cpu=set(budgets) == {"cpu"})
    sized = _sized(model, weights, chosen, quantize, context)
    placement = placed_for(sized, budgets)
    if placement is None:
        raise MemoryError(_too_little(sized, model, weights, budgets, quantize))
    title = type(name).__name__ if isinstance(name, Llama4Config | Llama4TextConfig) else str(name)
    files = sorted({weights.shards.file(own) for own in weights.shards}) if weights is not None else []
    measured = {source: _measured(source, budgets, files) for source in SOURCES if source not in rates}
    return MemoryPlan(title, placement, quantize, rates | measured, frozenset(measured))


def holds_weights(path: Path) -> bool:
    """Whether there are weights beside the config of a checkpoint."""
    return path.is_file() or any(any(path.glob(pattern)) for pattern in WEIGHT_FILES)


def _opened(name: Name) -> tuple[HookedModel, Weights | None]:
    """The model without memory, and what is stored of it; None if there is but a config."""
    if isinstance(name, Llama4Config | Llama4TextConfig):
        return without_memory(name), None
    folder = locate(name)
    model = without_memory(settings_of(folder))
    return model, opened(folder, model) if holds_weights(folder) else None


def _sized(
    model: HookedModel, weights: Weights | None, dtype: torch.dtype, quantize: str | None, context: int
) -> Model:
    head = next(name for name, _ in model.named_modules() if name.endswith("lm_head"))
    tied = f"{head}.weight" not in dict(model.named_parameters())  # then it is the embeddings once more
    sizes = weigh(model, weights, dtype, quantize)
    return Model(sizes, text_part(model.config), dtype, context, head if tied else None)


def _too_little(
    sized: Model, model: HookedModel, weights: Weights | None, budgets: Mapping[str, int], quantize: str | None
) -> str:
    """What is needed, what there is, and what would work."""
    always, working = least(sized, next(iter(budgets)))
    given = ", ".join(f"{size_text(nbytes)} on {device}" for device, nbytes in budgets.items())
    narrow = [{"dtype": torch.bfloat16}] if sized.dtype.itemsize > 2 else []
    shorter = [{"context": tokens} for tokens in (512, 64) if tokens < sized.tokens]
    smaller = [{"quantize": "int4"}] if quantize is None and (weights is None or not weights.packed) else []
    both = [first | second for first in [*narrow, *smaller] for second in [*smaller, *shorter] if first != second]
    asked = {"dtype": sized.dtype, "quantize": quantize, "context": sized.tokens}
    works: list[dict[str, Any]] = []
    for choice in [*narrow, *smaller, *shorter, *both]:
        if len(works) < 2 and placed_for(_sized(model, weights, **(asked | choice)), budgets) is not None:
            works.append(choice)
    return (
        f"memory gives {given}. With its experts on disk, {size_text(always + working)} would hold the model: "
        f"{size_text(always)} of weights\nand {size_text(working)} of working memory for {sized.tokens:,} tokens in "
        f"{str(sized.dtype).removeprefix('torch.')}; with all of it on disk it does not fit either.\n"
        + (f"What would work: {' or '.join(map(_choice, works))}." if works else "More memory is needed.")
    )


def _choice(choice: dict[str, Any]) -> str:
    texts = {key: str(value).removeprefix("torch.") if key == "dtype" else value for key, value in choice.items()}
    return ", ".join(f"{key}={value!r}" for key, value in texts.items())


def _dtype(
    dtype: torch.dtype | str | None, weights: Weights | None, model: HookedModel, *, on_cpu: bool
) -> torch.dtype:
    """The dtype that `lab.load` would compute in; for a config, bfloat16."""
    if weights is not None:
        return dtype_of(dtype, weights, model.config, on_cpu=on_cpu)
    return torch.bfloat16 if dtype in (None, "auto") else named_dtype(dtype)


def _measured(source: str, budgets: Mapping[str, int], files: list[Path]) -> float:
    if source == "disk":
        return disk_rate(files)
    gpus = [name for name in budgets if name != "cpu"]
    here = gpus and torch.device(gpus[0]).type == "cuda" and torch.cuda.is_available()
    return ram_rate(torch.device(gpus[0]) if here else torch.device("cpu"))
