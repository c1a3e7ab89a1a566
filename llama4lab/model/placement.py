"""Where the weights of a model go: devices of its parts, or the disk, and how much memory each device may give."""

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import psutil
import torch
from accelerate import infer_auto_device_map
from torch import nn

from llama4lab.checkpoint.spelling import near_misses
from llama4lab.model.experts import Experts

Device = torch.device | str | int
DISK, CPU = "disk", torch.device("cpu")
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def devices_of(device_map: Device | Mapping[str, Device] | None) -> dict[str, torch.device]:
    """Gives the device that computes each named part of the model; the name "" is the whole.

    What waits on "disk" is computed on the first GPU that is named, or else on the CPU. "auto" is the first GPU for
    now.

    Raises:
        ValueError: if a device is none, or is not there.
    """
    if isinstance(device_map, Mapping):
        named = {module: device_of(device) for module, device in device_map.items() if device != DISK}
        first = next((device for device in named.values() if device.type != "cpu"), CPU)
        return {module: named.get(module, first) for module in device_map}
    if device_map is None or device_map == DISK:
        return {"": CPU}
    if device_map == "auto":
        return {"": torch.device("cuda", 0) if torch.cuda.is_available() else CPU}
    return {"": device_of(device_map)}


def on_disk(device_map: Device | Mapping[str, Device] | None) -> set[str]:
    """Gives the named parts of the model that wait on disk."""
    parts = device_map if isinstance(device_map, Mapping) else {"": device_map}
    return {module for module, device in parts.items() if device == DISK}


def device_of(device: Device) -> torch.device:
    """Gives the device that a name means.

    Raises:
        ValueError: if it is none, or is not there.
    """
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


def spread(
    model: nn.Module, dtype: torch.dtype, limits: Mapping[torch.device, int] | None, *, offload: bool = False
) -> tuple[dict[str, Device], bool]:
    """Gives a place to every module by the memory there is: GPUs first, then the CPU, and the disk where limits are
    given. Routed experts go to disk before anything else does: of them only those that are used are read.

    Args:
        model: Without memory behind its parameters.
        dtype: To compute in.
        limits: The bytes that each device may give; None for what is free.
        offload: Whether routed experts wait on disk in any case.

    Returns:
        The places, and whether routed experts wait on disk.

    Raises:
        MemoryError: if there is too little, and no limits that say what it is to be.
    """
    places = {} if offload else _inferred(model, dtype, limits)
    if not offload and DISK not in places.values():
        return places, False
    if limits is None and not offload:
        size = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize / 2**30
        raise MemoryError(
            f"The model takes {size:,.1f} GiB in {dtype}, more than GPUs and RAM have free together.\n"
            'With experts="offload", or with memory= for each device, what has no room is left on disk.'
        )
    with _without_experts(model):
        return _inferred(model, dtype, limits), True


def _inferred(model: nn.Module, dtype: torch.dtype, limits: Mapping[torch.device, int] | None) -> dict[str, Device]:
    most = None if limits is None else {_key(device): nbytes for device, nbytes in limits.items()}
    whole = list(getattr(model, "_no_split_modules", None) or [])
    found = infer_auto_device_map(model, most, no_split_module_classes=whole, dtype=dtype)  # pyright: ignore
    held = {part_of(name, found) for name, _ in model.named_parameters()}
    return {str(module): place for module, place in found.items() if module in held}  # others hold nothing


@contextmanager
def _without_experts(model: nn.Module) -> Iterator[None]:
    """Takes the routed experts' parameters out of a model for a while, so that they take no room."""
    taken = {module: dict(module._parameters) for module in model.modules() if isinstance(module, Experts)}
    try:
        for module in taken:
            module._parameters.clear()
        yield
    finally:
        for module, parameters in taken.items():
            module._parameters.update(parameters)


def placed(devices: Mapping[str, torch.device], parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.device]:
    """Gives the device of each parameter: that of the longest named part of its path.

    Raises:
        ValueError: if a parameter has no device, or a named part has no parameter.
    """
    found: dict[str, torch.device] = {}
    used: set[str] = set()
    for name in parameters:
        module = part_of(name, devices)
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


def part_of(name: str, parts: Collection[str]) -> str | None:
    """Gives the longest of some named parts that a parameter is in; None if it is in none."""
    words = name.split(".")
    paths = (".".join(words[:length]) for length in range(len(words), -1, -1))
    return next((path for path in paths if path in parts), None)


def _key(device: torch.device) -> int | str:
    """A device as accelerate names it."""
    return device.index or 0 if device.type == "cuda" else device.type
