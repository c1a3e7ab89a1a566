"""How long a pass waits for weights, at best: input and output only, from sizes, bandwidths and uniform routing.

Routing is taken to be uniform: each token goes to k of the E experts of a layer, all equally often and independently.
Real routing is more skewed, so that fewer experts are asked for. Experts that were used last are kept (LRU).
"""

import math
from dataclasses import dataclass

from llama4lab.model.planned_model import Case, part_of
from llama4lab.model.planning import Place, Placement


@dataclass(frozen=True)
class PassTime:
    """One pass over a row of new tokens, when passes of that kind have filled what is kept.

    Attributes:
        tokens: How many; 1 is a step of decoding.
        experts: How many different experts a layer is expected to use.
        used: Bytes of what waits on disk and is used, as it is kept: routed experts, and parts that wait too.
        from_device: Those of them that are on the device already.
        from_ram: Those that are in RAM.
        from_disk: Bytes that are read for the others; more than they are kept in, if they are rounded then.
        moved: Bytes that go from RAM to a GPU: what was there, what was read, and modules that RAM lends.
        seconds_disk: For reading.
        seconds_cpu: For moving.
    """

    tokens: int
    experts: float
    used: float
    from_device: float
    from_ram: float
    from_disk: float
    moved: float
    seconds_disk: float
    seconds_cpu: float

    @property
    def seconds(self) -> float:
        """Reading and moving go on at the same time, at best."""
        return max(self.seconds_disk, self.seconds_cpu)


def distinct_experts(experts: int, slots: int, tokens: int) -> float:
    """Gives how many experts of a layer some tokens are expected to use.

    Args:
        experts: Of the layer.
        slots: How many each token goes to.
        tokens: How many there are.
    """
    return experts * (1 - (1 - slots / experts) ** tokens)


def remembered(share: float | int, used: float | int) -> float:
    """Gives the share of the experts of a pass that are still kept from the passes before.

    What was used last is kept, so it goes back a whole number of passes: one that uses every expert finds none of them,
    unless all fit.

    Args:
        share: Of all experts, how many fit.
        used: Of all experts, how many a pass uses.
    """
    if share >= 1 or used <= 0:
        return 1.0
    if used >= 1:
        return 0.0
    passes = math.floor(math.log1p(-share) / math.log1p(-used) + 1e-9)
    return 1 - (1 - used) ** passes


def pass_time(placement: Placement, tokens: int, disk: float, cpu: float, *, first: bool = False) -> PassTime:
    """Gives what a pass reads, and how long that takes at best.

    Args:
        placement: Of the model.
        tokens: How many it has.
        disk: Bytes a second from the files.
        cpu: Bytes a second from RAM to a GPU.
        first: Whether nothing is kept yet.
    """
    config = placement.model.config
    chosen = distinct_experts(config.num_local_experts, config.num_experts_per_tok, tokens)
    share, ram, case = chosen / config.num_local_experts, placement.ram, placement.case
    found = dict.fromkeys(("used", "device", "ram", "disk"), 0.0) | {"moved": _lent(placement)}
    for place in placement.places:
        own = [size for size in case.waiting if part_of(size.name) in place.parts and size.component != "vision"]
        for size in own:
            if first:
                near = far = 0.0
            elif size.experts:
                near, far = remembered(place.share, share), remembered(ram.share if ram else 0.0, share)
            else:
                near, far = _steady(place, case), _steady(ram, case)
            used = share if size.experts else 1.0
            # What comes to a GPU by RAM is kept in both, so RAM adds what it holds beyond that.
            beside = 0.0 if place is ram else max(far - near, 0.0)
            found["used"] += used * size.waiting
            found["device"] += used * size.waiting * near
            found["ram"] += used * size.waiting * beside
            found["disk"] += used * size.stored * (1 - near - beside) if size.waiting else 0.0
            found["moved"] += 0.0 if place is ram else used * size.waiting * (1 - near)
    return PassTime(
        tokens,
        chosen,
        found["used"],
        found["device"],
        found["ram"],
        found["disk"],
        found["moved"],
        _seconds(found["disk"], disk),
        _seconds(found["moved"], cpu),
    )


def _steady(place: Place | None, case: Case) -> float:
    """The share that a device keeps of the weights on disk that every pass uses."""
    if place is None:
        return 0.0
    come = [
        size for size in case.waiting if not size.experts and (place.name == "cpu" or part_of(size.name) in place.parts)
    ]
    total = sum(size.waiting for size in come)
    return place.kept_steady / total if total else 0.0


def _lent(placement: Placement) -> float:
    """Bytes of the modules that RAM lends to a GPU in every pass."""
    return float(placement.ram.weights) if placement.case.lent and placement.ram else 0.0


def _seconds(nbytes: float, bandwidth: float) -> float:
    return nbytes / bandwidth if nbytes else 0.0
