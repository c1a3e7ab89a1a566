"""How fast weights come: bytes a second from the files of a checkpoint, and from RAM to a device."""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from llama4lab.checkpoint.spelling import near_misses
from llama4lab.model.placement import nbytes_of

SOURCES = ("disk", "cpu")
BLOCK = 4 * 2**20
LONGEST = 1.0  # seconds that a measurement may take


def rates_of(bandwidths: Mapping[str, str | float | int]) -> dict[str, float]:
    """Gives bytes a second, from numbers or texts such as "7GB/s".

    Raises:
        ValueError: if a source or a rate is none.
    """
    found: dict[str, float] = {}
    for source, rate in bandwidths.items():
        if source not in SOURCES:
            near = near_misses(source, SOURCES)
            raise ValueError(
                f"bandwidths names {source!r}" + (f"; near: {near}" if near else "") + ".\n"
                'Sources are "disk", from the files, and "cpu", from RAM to a GPU.'
            )
        found[source] = _rate(source, rate)
    return found


def disk_rate(files: Sequence[Path]) -> float:
    """Measures how fast files are read, in bytes a second, past the cache of the system where it can be told so.

    Blocks that lie evenly over all files are read for at most a second, with as many bytes as there are.
    """
    blocks = [(file, start) for file in files for start in range(0, file.stat().st_size, BLOCK)]
    blocks = blocks[:: max(len(blocks) // 256, 1)]
    memory, nbytes, seconds = memoryview(bytearray(BLOCK)), 0, 0.0
    for file, start in blocks:
        with file.open("rb", buffering=0) as opened:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(opened.fileno(), start, BLOCK, os.POSIX_FADV_DONTNEED)
            began = time.perf_counter()
            opened.seek(start)
            nbytes += opened.readinto(memory) or 0
            seconds += time.perf_counter() - began
        if seconds > LONGEST:
            break
    return nbytes / seconds if nbytes else float("nan")


def ram_rate(device: torch.device) -> float:
    """Measures how fast numbers are copied from RAM to a device, or within RAM for the CPU, in bytes a second."""
    source = torch.ones(16 * BLOCK, dtype=torch.uint8)
    target = torch.empty_like(source, device=device)
    target.copy_(source)
    best = float("inf")
    for _ in range(5):
        _wait(device)
        began = time.perf_counter()
        target.copy_(source)
        _wait(device)
        best = min(best, time.perf_counter() - began)
    return source.nbytes / best


def _rate(source: str, rate: str | float | int) -> float:
    if isinstance(rate, str):
        try:
            found = float(nbytes_of(rate.strip().removesuffix("/s")))
        except ValueError:
            found = 0.0
    else:
        found = float(rate)
    if not 0 < found < float("inf"):
        raise ValueError(
            f'bandwidths[{source!r}] is {rate!r}; write for example "7GB/s" or a number of bytes a second.'
        )
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
