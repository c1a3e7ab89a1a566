"""Experts that wait on disk: what is routed to is read, and what was used lately is kept, within a budget.

Three tiers: the device that computes, the RAM beside it, the files. A reader thread is one expert ahead of the
products, so that the disk works while the processor does.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any

import torch

from llama4lab.checkpoint.matrices import Matrix
from llama4lab.checkpoint.tensor_files import TensorFiles
from llama4lab.model.packed_matrix import PackedMatrix

AHEAD = 2  # experts that are being read before they are asked for

Key = tuple[str, int]


@dataclass
class Traffic:
    """What a store did.

    Attributes:
        asked: How often an expert's matrix was asked for.
        on_device: How often it was on the device.
        in_ram: How often it was in RAM.
        read: How often it was read from its file.
        bytes_read: How many bytes that were.
        seconds_reading: How long the reader thread read.
        seconds_waiting: How long products waited for it.
    """

    asked: int = 0
    on_device: int = 0
    in_ram: int = 0
    read: int = 0
    bytes_read: int = 0
    seconds_reading: float = 0.0
    seconds_waiting: float = 0.0

    @property
    def hit_rate(self) -> float:
        """The share of what was asked for that did not have to be read."""
        return (self.on_device + self.in_ram) / self.asked if self.asked else 0.0


class Tier:
    """Matrices up to a budget in bytes; the one that was not used for longest goes first."""

    def __init__(self, budget: int):
        self.budget, self.nbytes = budget, 0
        self.held: OrderedDict[Key, PackedMatrix] = OrderedDict()

    def get(self, key: Key) -> PackedMatrix | None:
        """Gives what is held under a key, and counts that as a use."""
        if key in self.held:
            self.held.move_to_end(key)
        return self.held.get(key)

    def put(self, key: Key, matrix: PackedMatrix) -> None:
        """Holds a matrix, if it is not larger than the budget."""
        if key in self.held or matrix.nbytes > self.budget:
            return
        while self.nbytes + matrix.nbytes > self.budget:
            self.nbytes -= self.held.popitem(last=False)[1].nbytes
        self.held[key] = matrix
        self.nbytes += matrix.nbytes


class ExpertStore:
    """All offloaded experts of a model. Threads may use it together.

    Args:
        shards: The files.
        budgets: How many bytes to hold on each device; "cpu" is RAM.

    Attributes:
        traffic: What it did since it was made, or since `reset`.
    """

    def __init__(self, shards: TensorFiles, budgets: Mapping[torch.device, int]):
        self.shards = shards
        self.tiers = {device: Tier(budget) for device, budget in budgets.items()}
        self.traffic = Traffic()
        self._lock = threading.RLock()
        self._reading: dict[Key, Future[PackedMatrix]] = {}
        self._reader: ThreadPoolExecutor | None = None

    def reset(self) -> None:
        """Sets all counts to 0; what is held stays."""
        with self._lock:
            for field in fields(Traffic):
                setattr(self.traffic, field.name, field.default)

    def clear(self) -> None:
        """Drops what is held."""
        with self._lock:
            for device, tier in self.tiers.items():
                self.tiers[device] = Tier(tier.budget)

    def begin(self, key: Key, matrices: Sequence[Matrix], device: torch.device) -> None:
        """Starts to read a matrix, unless it is held or being read."""
        with self._lock:
            if key not in self._reading and self._held(key, device) is None:
                self._reader = self._reader or ThreadPoolExecutor(1, thread_name_prefix="llama4lab-experts")
                self._reading[key] = self._reader.submit(self._read, matrices)

    def matrix(self, key: Key, matrices: Sequence[Matrix], device: torch.device) -> PackedMatrix:
        """Gives a matrix on the device that computes, from where it is nearest.

        Raises:
            OSError: if its file cannot be read any more.
            ValueError: if its numbers are damaged.
        """
        with self._lock:
            self.traffic.asked += 1
            found = self._held(key, device)
            if found is not None:
                on_device = found.device == device
                self.traffic.on_device += on_device
                self.traffic.in_ram += not on_device
            else:
                self.begin(key, matrices, device)
            pending = self._reading.get(key)
        if found is None and pending is not None:
            started = time.perf_counter()
            try:
                found = pending.result()
            finally:
                with self._lock:
                    first = self._reading.pop(key, None) is not None
                    self.traffic.seconds_waiting += time.perf_counter() - started
            with self._lock:
                if first:
                    self.traffic.read += 1
                    self.traffic.bytes_read += found.nbytes
        assert found is not None
        return self._placed(key, found, device)

    def _held(self, key: Key, device: torch.device) -> PackedMatrix | None:
        tiers = [self.tiers[place] for place in (device, torch.device("cpu")) if place in self.tiers]
        return next((found for tier in tiers if (found := tier.get(key)) is not None), None)

    def _read(self, matrices: Sequence[Matrix]) -> PackedMatrix:
        started = time.perf_counter()
        made = PackedMatrix(matrices, [matrix.read(self.shards) for matrix in matrices])
        with self._lock:
            self.traffic.seconds_reading += time.perf_counter() - started
        return made

    def _placed(self, key: Key, found: PackedMatrix, device: torch.device) -> PackedMatrix:
        """Puts a matrix into the tiers that it came by."""
        with self._lock:
            if found.device.type == "cpu" and torch.device("cpu") in self.tiers:
                self.tiers[torch.device("cpu")].put(key, found)
        moved = found if found.device == device else found.to(device)
        with self._lock:
            if device in self.tiers and device.type != "cpu":
                self.tiers[device].put(key, moved)
        return moved

    def __deepcopy__(self, memo: dict[int, Any]) -> "ExpertStore":
        return self  # what is on disk is the same for a copy of the model, and so is what is held of it

    def __repr__(self) -> str:
        held = ", ".join(f"{tier.nbytes:,} of {tier.budget:,} bytes on {device}" for device, tier in self.tiers.items())
        return f"ExpertStore({held}; {self.traffic.hit_rate:.0%} of {self.traffic.asked} found there)"


class Stored:
    """The matrices of one projection of a layer's experts, fetched from a store.

    Args:
        store: The store.
        name: Of the tensor in the model.
        matrices: What each expert's matrix is made of.
        device: To compute on.
    """

    def __init__(self, store: ExpertStore, name: str, matrices: Sequence[Sequence[Matrix]], device: torch.device):
        self.store, self.name, self.matrices, self.device = store, name, matrices, device
        self._next = threading.local()

    def expect(self, experts: Sequence[int]) -> None:
        """Begins to read the first of the experts, and remembers the others."""
        self._next.experts = list(experts)
        for expert in self._next.experts[:AHEAD]:
            self._begin(expert)

    def matrix(self, expert: int) -> PackedMatrix:
        """Gives an expert's matrix, while the next one is being read."""
        found = self.store.matrix((self.name, expert), self.matrices[expert], self.device)
        coming: list[int] = getattr(self._next, "experts", [])
        if expert in coming:
            self._next.experts = coming = coming[coming.index(expert) + 1 :]
            for after in coming[:AHEAD]:
                self._begin(after)
        return found

    def to(self, device: torch.device) -> "Stored":
        """Gives the same for another device."""
        return Stored(self.store, self.name, self.matrices, device)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Stored":
        return self.to(self.device)

    def _begin(self, expert: int) -> None:
        self.store.begin((self.name, expert), self.matrices[expert], self.device)
