"""Where the weights of a model go: devices of its parts, and how much memory each device may give."""

import re
from collections.abc import Mapping

import psutil
import torch
from accelerate import infer_auto_device_map
from torch import nn

from llama4lab.checkpoint.spelling import near_misses

Device = torch.device | str | int
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def devices_of(device_map: Device | Mapping[str, Device] | None) -> dict[str, torch.device]:
    """Gives the device of each named part of the model; the name "" is the whole. "auto" is the first GPU for now.

    Raises:
        ValueError: if a device is none, or is not there.
    """
    if device_map is None:
        return {"": torch.device("cpu")}
    if isinstance(device_map, Mapping):
        return {module: device_of(device) for module, device in device_map.items()}
    if device_map == "auto":
        return {"": torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")}
    return {"": device_of(device_map)}


def device_of(device: Device) -> torch.device:
    """Gives the device that a name means.

    Raises:
        ValueError: if it is none, or is not there.
    """
    if device == "disk":
        raise ValueError('A device_map with "disk" is not supported; experts="offload" leaves experts on disk.')
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f'{device!r} is not a device; write "cpu", "cuda", "cuda:1" or "auto".') from error
    if chosen.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        chosen = torch.device("cuda", chosen.index or 0)
        if chosen.index >= count:
            raise ValueError(f'{str(device)!r} was asked for; torch finds {count} CUDA devices here. "cpu" works.')
    elif chosen.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError('"mps" was asked for, which torch does not find here; "cpu" works.')
    elif chosen.type not in ("cpu", "mps"):
        raise ValueError(f'{str(device)!r} cannot hold a model; write "cpu", "cuda", "cuda:1" or "auto".')
    return chosen


def budgets_of(memory: Mapping[str, str | int] | None) -> dict[torch.device, int]:
    """Gives the bytes that each device may give; by default half of the RAM that is free now.

    Args:
        memory: From devices to sizes, for example `{"cuda:0": "70GiB", "cpu": "100GiB"}`; a number counts bytes.

    Raises:
        ValueError: if a device or a size is none.
    """
    if memory is None:
        return {torch.device("cpu"): psutil.virtual_memory().available // 2}
    return {device_of(device): nbytes_of(size) for device, size in memory.items()}


def nbytes_of(size: str | int) -> int:
    """Gives a size in bytes, from a number or a text such as "20GiB" or "1.5 GB".

    Raises:
        ValueError: if it is none.
    """
    if isinstance(size, int) and size >= 0:
        return size
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", size) if isinstance(size, str) else None
    if found is None or found[2].upper() not in UNITS:
        raise ValueError(f'{size!r} is not a size in memory; write for example "20GiB", "500MB" or a number of bytes.')
    return int(float(found[1]) * UNITS[found[2].upper()])


def spread(model: nn.Module, dtype: torch.dtype, limits: Mapping[torch.device, int] | None) -> dict[str, torch.device]:
    """Gives a device for every module by the memory there is: GPUs first, then the CPU.

    Raises:
        MemoryError: if that is too little.
    """
    most = None if limits is None else {_key(device): nbytes for device, nbytes in limits.items()}
    whole = list(getattr(model, "_no_split_modules", None) or [])
    places = infer_auto_device_map(model, most, no_split_module_classes=whole, dtype=dtype)  # pyright: ignore
    if "disk" in places.values():
        size = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize / 2**30
        raise MemoryError(f"The model takes {size:,.1f} GiB in {dtype}, more than GPUs and RAM have free together.")
    return {module: torch.device(place) for module, place in places.items()}


def placed(devices: Mapping[str, torch.device], parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.device]:
    """Gives the device of each parameter: that of the longest named part of its path.

    Raises:
        ValueError: if a parameter has no device, or a named part has no parameter.
    """
    found: dict[str, torch.device] = {}
    used: set[str] = set()
    for name in parameters:
        parts = name.split(".")
        paths = (".".join(parts[:length]) for length in range(len(parts), -1, -1))
        module = next((path for path in paths if path in devices), None)
        if module is None:
            raise ValueError(f'device_map places no part of the model that holds {name}; add it, or "" for the rest.')
        found[name] = devices[module]
        used.add(module)
    for module in devices:
        if module not in used:
            modules = {name.rpartition(".")[0] for name in parameters}
            near = near_misses(module, modules | {path.rpartition(".")[0] for path in modules})
            raise ValueError(
                f"device_map names {module!r}, which holds no weight" + (f"; near: {near}." if near else ".")
            )
    return found


def _key(device: torch.device) -> int | str:
    """A device as accelerate names it."""
    return device.index or 0 if device.type == "cuda" else device.type
