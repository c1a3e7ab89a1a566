"""Weights that wait on disk: what is used is read, and what was used lately is kept, within a budget.

Three tiers: the device that computes, the RAM beside it, the files. A reader thread is a matrix or two ahead of the
products, so that the disk works while the processor does. Of experts only those that tokens were routed to are read.
"""

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llama4lab.checkpoint.matrices import Matrix
from llama4lab.checkpoint.tensor_files import TensorFiles
from llama4lab.model.packed_matrix import PackedMatrix
from llama4lab.model.tier import Key, Tier
from llama4lab.model.traffic import Traffic
from llama4lab.model.wanted import Reading, Wanted

AHEAD = 2  # matrices that are being read before they are asked for
CPU = torch.device("cpu")


class ExpertStore:
    """All weights of a model that wait on disk. Threads may use it together.

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
        self._reading: dict[Key, Reading] = {}
        self._reader: ThreadPoolExecutor | None = None

    def reset(self) -> None:
        """Sets all counts to 0; what is held stays."""
        with self._lock:
            self.traffic.reset()

    def clear(self) -> None:
        """Drops what is held."""
        with self._lock:
            for device, tier in self.tiers.items():
                self.tiers[device] = Tier(tier.budget)

    def leave_room(self, taken: Mapping[torch.device, int]) -> None:
        """Lowers the budget of each device by what other things take there."""
        with self._lock:
            for device, tier in self.tiers.items():
                self.tiers[device] = Tier(max(tier.budget - taken.get(device, 0), 0))

    def matrix(self, wanted: Wanted, device: torch.device, coming: Sequence[Wanted] = ()) -> PackedMatrix:
        """Gives a matrix on the device that computes, from where it is nearest.

        Args:
            wanted: The matrix.
            device: Where to.
            coming: What this thread asks for next: reading it begins now. What else was begun for it, before a pass
                was interrupted for example, is forgotten.

        Raises:
            OSError: if its file cannot be read any more.
            ValueError: if its numbers are damaged.
        """
        found = None
        with self._lock:
            self.traffic.asked += 1
            reading = self._reading.get(wanted.key)
            if reading is None:
                found = self._held(wanted.key, device)
            if found is None:
                reading = self._begun(wanted)
            else:
                self.traffic.on_device += found.device == device
                self.traffic.in_ram += found.device != device
            for each in coming:
                if self._held(each.key, device) is None:
                    self._begun(each)
            self._forget(keep={wanted.key, *(each.key for each in coming)})
        if reading is not None:
            found = self._awaited(wanted.key, reading)
        assert found is not None
        moved = found if found.device == device else found.to(device)
        if device != CPU and device in self.tiers:
            with self._lock:
                self.tiers[device].put(wanted.key, moved, steady=wanted.steady)
        return moved

    def rows(self, name: str, ids: Int[Tensor, " row"]) -> Float[Tensor, "row d_model"]:
        """Reads rows of a table that is stored as numbers, in the dtype it is stored in; no others are read.

        Args:
            name: Of the tensor on disk.
            ids: Which, each once.

        Raises:
            ValueError: if a number among them is NaN or infinite.
        """
        started = time.perf_counter()
        found = torch.stack([self.shards.read(name, index) for index in ids.tolist()])
        if not bool(found.isfinite().all()):
            raise ValueError(
                f"{self.shards.file(name)}: {name} holds values that are NaN or infinite; the file is damaged."
            )
        with self._lock:
            self.traffic.rows += len(found)
            self.traffic.bytes_read += found.nbytes
            self.traffic.seconds_reading += time.perf_counter() - started
        return found

    def _held(self, key: Key, device: torch.device) -> PackedMatrix | None:
        tiers = [self.tiers[place] for place in (device, CPU) if place in self.tiers]
        return next((found for tier in tiers if (found := tier.get(key)) is not None), None)

    def _begun(self, wanted: Wanted) -> Reading:
        """Begins to read a matrix, or joins those that wait for it already. RAM is given free before it is filled."""
        reading = self._reading.get(wanted.key)
        if reading is None:
            nbytes = wanted.nbytes(self.shards)
            if CPU in self.tiers:
                coming = sum(other.nbytes for other in self._reading.values() if not other.result.done())
                self.tiers[CPU].make_room(nbytes + coming)
            self._reader = self._reader or ThreadPoolExecutor(1, thread_name_prefix="llama4lab-store")
            reading = self._reading[wanted.key] = Reading(self._reader.submit(self._read, wanted, nbytes), nbytes)
        reading.threads.add(threading.get_ident())
        return reading

    def _read(self, wanted: Wanted, nbytes: int) -> PackedMatrix:
        """What the reader thread does. When it is done the matrix is in RAM and counted, whoever still wants it."""
        started = time.perf_counter()
        made = wanted.read(self.shards)
        with self._lock:
            self.traffic.read += 1
            self.traffic.bytes_read += nbytes
            self.traffic.seconds_reading += time.perf_counter() - started
            if CPU in self.tiers:
                self.tiers[CPU].put(wanted.key, made, steady=wanted.steady)
        return made

    def _awaited(self, key: Key, reading: Reading) -> PackedMatrix:
        started = time.perf_counter()
        try:
            return reading.result.result()
        finally:
            with self._lock:
                self.traffic.seconds_waiting += time.perf_counter() - started
                self._leave(key, reading)

    def _forget(self, keep: set[Key]) -> None:
        for key, reading in list(self._reading.items()):
            if key not in keep:
                self._leave(key, reading)

    def _leave(self, key: Key, reading: Reading) -> None:
        """This thread wants it no more."""
        reading.threads.discard(threading.get_ident())
        if not reading.threads and self._reading.get(key) is reading:
            del self._reading[key]
            reading.result.cancel()

    def __deepcopy__(self, memo: dict[int, Any]) -> "ExpertStore":
        return self  # what is on disk is the same for a copy of the model, and so is what is held of it

    def __repr__(self) -> str:
        held = ", ".join(f"{tier.nbytes:,} of {tier.budget:,} bytes on {device}" for device, tier in self.tiers.items())
        return f"ExpertStore({held}; {self.traffic.hit_rate:.0%} of {self.traffic.asked} found there)"


class Stored:
    """The matrices of one linear map, or of one projection of a layer's experts, fetched from a store.

    Args:
        store: The store.
        name: Of the tensor in the model.
        wanted: Each expert's matrix, or the one that there is.
        device: To compute on.

    Attributes:
        then: What the model uses after it, if that waits on disk too.
    """

    def __init__(self, store: ExpertStore, name: str, wanted: Sequence[Wanted], device: torch.device):
        self.store, self.name, self.wanted, self.device = store, name, list(wanted), device
        self.then: Stored | None = None
        self._expected = threading.local()

    @property
    def matrices(self) -> list[list[Matrix]]:
        """How each is stored."""
        return [list(wanted.matrices) for wanted in self.wanted]

    @property
    def quantize(self) -> str | None:
        """How each is rounded when it is read; None if it is not."""
        return self.wanted[0].quantize

    @property
    def shape(self) -> tuple[int, int]:
        """Out and in, of one matrix."""
        matrices = self.wanted[0].matrices
        return sum(matrix.shape[0] for matrix in matrices), matrices[0].shape[1]

    @property
    def scheme(self) -> str:
        """How it is stored, in words."""
        rounded = f", read as {self.quantize}" if self.quantize else ""
        return f"{self.wanted[0].matrices[0].scheme.name}{rounded}, on disk"

    def fresh(self, expert: int) -> PackedMatrix:
        """Reads a matrix past the store, which stays as it is."""
        return self.wanted[expert].read(self.store.shards)

    def expect(self, experts: Sequence[int]) -> None:
        """Is told which will be asked for next, in that order, so that the one after can be read meanwhile."""
        self._expected.experts = list(experts)

    def matrix(self, expert: int) -> PackedMatrix:
        """Gives a matrix. If it was expected, reading the next ones begins."""
        expected: list[int] = getattr(self._expected, "experts", [])
        coming: list[Wanted] = []
        if expert in expected:
            place = expected.index(expert) + 1
            coming = list(islice(self._coming(expected[place:], expected), AHEAD))
            if place == len(expected):
                self._expected.experts = []
        return self.store.matrix(self.wanted[expert], self.device, coming)

    def to(self, device: torch.device) -> "Stored":
        """Gives the same for another device."""
        made = Stored(self.store, self.name, self.wanted, device)
        made.then = self.then  # says what to read, wherever to
        return made

    def _coming(self, left: list[int], experts: list[int]) -> Iterator[Wanted]:
        """What is asked for next. The experts of another layer are not known before its router has run."""
        yield from (self.wanted[expert] for expert in left)
        source, layer = self.then, self.name.rpartition(".")[0]
        while source is not None:
            if source.wanted[0].steady:
                yield source.wanted[0]
            elif source.name.rpartition(".")[0] == layer:
                yield from (source.wanted[expert] for expert in experts)
            else:
                return
            source = source.then

    def __deepcopy__(self, memo: dict[int, Any]) -> "Stored":
        return self.to(self.device)
