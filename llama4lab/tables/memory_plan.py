"""The plan for loading a checkpoint: tables, the options that carry it out, and a text to read."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd

from llama4lab.checkpoint.summary import COMPONENTS
from llama4lab.model.pass_times import PassTime, pass_time
from llama4lab.model.planned_model import part_of
from llama4lab.model.planning import Placement
from llama4lab.tables.plan_text import (
    Block,
    as_html,
    as_text,
    component_block,
    device_block,
    rate_text,
    size_text,
    time_block,
    working_block,
)

PREFILLS = (20, 100, 500)


@dataclass(frozen=True, eq=False)
class MemoryPlan:
    """What `lab.memory_plan` found. Shows itself as text, in a notebook as tables.

    Args:
        name: Of the checkpoint.
        placement: Where everything is.
        quantize: How the MLPs are quantized.
        bandwidths: Bytes a second from "disk" and from "cpu"; NaN if there was nothing to measure.
        measured: Which of them were measured here.
    """

    name: str
    placement: Placement
    quantize: str | None
    bandwidths: dict[str, float]
    measured: frozenset[str]

    @property
    def experts(self) -> str:
        """Where routed experts are: "resident" in memory, or "offload" on disk."""
        return "offload" if self.placement.case.offload else "resident"

    @property
    def expert_nbytes(self) -> int:
        """Bytes of one expert, as it is kept; the mean, if they differ."""
        sizes = [size for size in self.placement.model.sizes if size.experts]
        total = sum(size.waiting if self.placement.case.offload else size.resident for size in sizes)
        return 2 * total // max(sum(size.experts for size in sizes), 1)

    @property
    def options(self) -> dict[str, Any]:
        """What to give to `lab.load` for it to be so."""
        places = self.placement.device_map
        single = len(set(places.values())) == 1
        dtype = str(self.placement.model.dtype).removeprefix("torch.")
        found: dict[str, Any] = {"device_map": next(iter(places.values())) if single else places, "dtype": dtype}
        found["experts"] = self.experts
        if self.placement.case.waiting:
            found["memory"] = {place.name: place.store for place in self.placement.places}
        return found | ({"quantize": self.quantize} if self.quantize else {})

    @cached_property
    def table(self) -> pd.DataFrame:
        """The parts of the model.

        Columns:
            component: as in the summary of a checkpoint.
            parameters: how many numbers.
            bytes_stored: on disk.
            bytes_in_memory: in memory; of experts that wait on disk, those that can be kept.
            device: where it is, or "disk".
        """
        rows, case, places = [], self.placement.case, self.placement.device_map
        for part in COMPONENTS:
            sizes = [size for size in self.placement.model.sizes if size.component == part]
            if not sizes:
                continue
            nbytes = sum(size.resident for size in sizes if not case.waits(size))
            if part == "routed experts" and case.offload:
                nbytes = sum(place.kept - place.kept_steady for place in self.placement.places)
            devices = dict.fromkeys("disk" if case.waits(size) else places[part_of(size.name)] for size in sizes)
            parameters, stored = sum(size.parameters for size in sizes), sum(size.stored for size in sizes)
            rows.append((part, parameters, stored, nbytes, ", ".join(devices)))
        return pd.DataFrame(rows, columns=["component", "parameters", "bytes_stored", "bytes_in_memory", "device"])

    @cached_property
    def devices(self) -> pd.DataFrame:
        """The devices.

        Columns:
            device: its name; "cpu" is RAM.
            budget: bytes that it may give.
            weights: bytes of weights that are always there.
            working_memory: bytes that are set aside; see `working`.
            kept: bytes for what was read from disk, experts above all.
            left: bytes that nothing is planned for.
            expert_slots: how many experts can be kept.
            share: of the experts that may come there.
        """
        rows = [
            (place.name, place.budget, place.weights, place.working, place.kept, place.left, place.slots, place.share)
            for place in self.placement.places
        ]
        columns = ["device", "budget", "weights", "working_memory", "kept", "left", "expert_slots", "share"]
        return pd.DataFrame(rows, columns=columns)

    @cached_property
    def working(self) -> pd.DataFrame:
        """What is set aside.

        Columns:
            device: where.
            what: it is for.
            nbytes: how much.
            note: how it was reckoned.
        """
        rows = [(place.name, room.what, room.nbytes, room.note) for place in self.placement.places
                for room in place.rooms]  # fmt: skip
        return pd.DataFrame(rows, columns=["device", "what", "nbytes", "note"])

    @cached_property
    def times(self) -> pd.DataFrame:
        """How long passes wait for weights, at best; see `time`.

        Columns:
            tokens: how many; 1 is a step of decoding, more a prefill.
            experts_per_layer: different ones that are expected to be used.
            bytes_used: of the routed experts among them, and of other weights that wait on disk.
            bytes_from_device, bytes_from_ram: those of them that are there.
            bytes_from_disk: that are read.
            seconds_disk, seconds_cpu: to read, and to move from RAM to a GPU.
            seconds: both at once.
            seconds_first: the same for the first pass, which finds nothing kept.
        """
        counts = sorted({1, *(count for count in PREFILLS if count < self.tokens), self.tokens})
        rows = [self._row(self.time(count)) for count in counts]
        return pd.DataFrame(rows)

    @property
    def tokens(self) -> int:
        """How many tokens memory is set aside for."""
        return self.placement.model.tokens

    def time(self, tokens: int, *, first: bool = False) -> PassTime:
        """Gives how long a pass waits for weights, at best.

        It is input and output only, without arithmetic. Routing is taken to be uniform over the experts; real routing
        is more skewed, so that fewer are used.

        Args:
            tokens: How many new ones the pass has, in one row.
            first: Whether nothing is kept yet; otherwise passes of that kind have gone before.
        """
        return pass_time(self.placement, tokens, self.bandwidths["disk"], self.bandwidths["cpu"], first=first)

    def _row(self, found: PassTime) -> dict[str, Any]:
        return {
            "tokens": found.tokens,
            "experts_per_layer": found.experts,
            "bytes_used": found.used,
            "bytes_from_device": found.from_device,
            "bytes_from_ram": found.from_ram,
            "bytes_from_disk": found.from_disk,
            "seconds_disk": found.seconds_disk,
            "seconds_cpu": found.seconds_cpu,
            "seconds": found.seconds,
            "seconds_first": self.time(found.tokens, first=True).seconds,
        }

    def __str__(self) -> str:
        return as_text(self._report())

    def _repr_html_(self) -> str:
        return as_html(self._report())

    def _report(self) -> list[str | Block]:
        """Sentences and tables, in the order to read them in."""
        options = ", ".join(f"{key}={value!r}" for key, value in self.options.items() if key != "device_map")
        placed = self.options["device_map"]
        placed = repr(placed) if isinstance(placed, str) else "plan.options['device_map']"
        return [
            self._heading(),
            component_block(self.table),
            device_block(self.devices),
            "Set aside:",
            working_block(self.working),
            *self._waiting(),
            f"lab.load(name, device_map={placed}, {options})",
        ]

    def _heading(self) -> str:
        dtype = str(self.placement.model.dtype).removeprefix("torch.")
        how = "" if self.quantize is None else f", the MLPs quantized to {self.quantize}"
        fits = "all experts fit and are resident"
        if self.placement.case.offload:
            fits = f"experts wait on disk, {size_text(self.expert_nbytes)} each when they are kept"
        return f"{self.name}, computed in {dtype}{how}: {fits}."

    def _waiting(self) -> list[str | Block]:
        if not self.placement.case.waiting and not self.placement.case.lent:
            return ["A pass reads nothing."]
        rates = [
            f"{rate_text(self.bandwidths[source])} {what}" + (" (measured here)" if source in self.measured else "")
            for source, what in (("disk", "from disk"), ("cpu", "from RAM to a GPU"))
            if source == "disk" or any(place.name != "cpu" for place in self.placement.places)
        ]
        return [
            f"Waiting for weights, at {' and '.join(rates)}:",
            time_block(self.times),
            *self._assumptions(),
        ]

    def _assumptions(self) -> list[str]:
        found = [
            "Input and output only, at best: no arithmetic, reading and moving at the same time.",
            "Routing is taken to be uniform; real routing is more skewed and uses fewer experts.",
            "What was used last is kept: a pass that uses more experts than fit finds few of them again.",
        ]
        if self.quantize is not None:
            found.append("Experts are read as they are stored, then rounded: save the model once to read fewer bytes.")
        return ["\n".join(found)]
