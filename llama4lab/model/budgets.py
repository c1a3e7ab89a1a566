"""The memory to plan with: what each device may give, whether it is here or not."""

from collections.abc import Mapping

import psutil
import torch

from llama4lab.model.placement import nbytes_of


def planned_budgets(memory: Mapping[str, str | int] | None) -> dict[str, int]:
    """Gives bytes by the name of the device: GPUs in the order given, RAM ("cpu") last.

    Args:
        memory: From devices to sizes, for example `{"cuda:0": "70GiB", "cpu": "100GiB"}`; a number counts bytes. None
            for what is free here now.

    Raises:
        ValueError: if a device or a size is none, or if there is no device.
    """
    if memory is None:
        return free_memory()
    if not memory:
        raise ValueError('memory is empty; write for example {"cuda:0": "80GiB", "cpu": "100GiB"}, or leave it out.')
    found: dict[str, int] = {}
    for device, size in memory.items():
        name = _name(device)
        if name in found:
            raise ValueError(f"memory names {name} twice.")
        found[name] = nbytes_of(size)
    return dict(sorted(found.items(), key=lambda item: item[0] == "cpu"))


def free_memory() -> dict[str, int]:
    """Gives the bytes that are free now on each GPU and in RAM."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = {f"cuda:{index}": torch.cuda.mem_get_info(index)[0] for index in range(count)}
    return gpus | {"cpu": psutil.virtual_memory().available}


def _name(device: str) -> str:
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f'memory names {device!r}, which is not a device; write "cuda:0" or "cpu".') from error
    if chosen.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f'memory names {device!r}, which cannot hold a model; write "cuda:0", "mps" or "cpu".')
    return f"cuda:{chosen.index or 0}" if chosen.type == "cuda" else chosen.type
