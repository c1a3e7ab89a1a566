"""Planning: which weights go to which device, what is set aside there, and how many experts can be kept.

Weights that every token needs come first: on the first device in the order of the model, then on the next, at last in
RAM. If all experts fit beside them, they do the same; otherwise they wait on disk, and what memory is left keeps those
that were used last, as `ExpertStore` does. If even that is too much, other parts wait on disk too: the embeddings, of
which only rows are read, the vision tower, which only images need, and then layers, the last ones first.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from llama4lab.model.planned_model import Case, Model, layer_of, part_of
from llama4lab.model.weight_sizes import Weight
from llama4lab.model.working_memory import (
    ON_THE_WAY,
    Room,
    activation_room,
    cache_room,
    lent_room,
    logits_room,
    making_room,
    passing_room,
    rounding_room,
)


@dataclass
class Place:
    """A device.

    Attributes:
        name: Of it, such as "cuda:0"; "cpu" is RAM.
        budget: Bytes that it may give.
        parts: The parts of the model that are computed there, or, in RAM beside GPUs, that wait there.
        weights: Bytes of weights that are there all the time.
        rooms: What is set aside.
        kept: Bytes for what was read from disk.
        kept_steady: Those of them for weights that every pass uses; they stay.
        slots: How many experts the others hold.
        experts: How many experts may come here.
    """

    name: str
    budget: int
    parts: list[str] = field(default_factory=list)
    weights: int = 0
    rooms: list[Room] = field(default_factory=list)
    kept: int = 0
    kept_steady: int = 0
    slots: int = 0
    experts: int = 0

    @property
    def working(self) -> int:
        """Bytes that are set aside."""
        return sum(room.nbytes for room in self.rooms)

    @property
    def left(self) -> int:
        """Bytes that nothing is planned for."""
        return self.budget - self.weights - self.working - self.kept

    @property
    def store(self) -> int:
        """The budget of what was read from disk, as `ExpertStore` takes it: in RAM, with what is being read."""
        coming = sum(room.nbytes for room in self.rooms if room.what == ON_THE_WAY and self.name == "cpu")
        return self.kept + coming

    @property
    def share(self) -> float:
        """The share of the experts that may come here which it can keep."""
        return self.slots / self.experts if self.experts else 0.0


@dataclass(frozen=True)
class Placement:
    """Where everything is.

    Attributes:
        case: The model, and what of it waits on disk.
        places: The devices, in the order in which they are filled.
    """

    case: Case
    places: Sequence[Place]

    @property
    def model(self) -> Model:
        """What was placed."""
        return self.case.model

    @property
    def device_map(self) -> dict[str, str]:
        """The device of each part, or "disk"."""
        found = {part: place.name for place in self.places for part in place.parts}
        found |= dict.fromkeys(self.case.disk, "disk")
        if self.model.tied_head is not None:
            found[self.model.tied_head] = next(name for part, name in found.items() if part.endswith("embed_tokens"))
        return found

    @property
    def ram(self) -> Place | None:
        """RAM, if it is planned with."""
        return next((place for place in self.places if place.name == "cpu"), None)


def placed_for(model: Model, budgets: Mapping[str, int]) -> Placement | None:
    """Gives the best placement of a model; None if nothing helps.

    Args:
        model: What is to be placed.
        budgets: Bytes of each device; GPUs are filled in this order, RAM ("cpu") comes last.
    """
    gpus = {name: nbytes for name, nbytes in budgets.items() if name != "cpu"}
    for case in _cases(model, lends=bool(gpus) and "cpu" in budgets):
        places = _filled(case, budgets if case.lent or not gpus else gpus)
        if places is not None and gpus and not case.lent and "cpu" in budgets:
            places = _with_ram(case, places, budgets["cpu"])
        if places is not None:
            _keep(case, places)
            return Placement(case, places)
    return None


def least(model: Model, device: str) -> tuple[int, int]:
    """Gives the bytes of weights and of working memory that one device needs if only experts wait on disk."""
    case = Case(model, offload=any(size.experts for size in model.sizes))
    return sum(case.needs.values()), sum(room.nbytes for room in _rooms(case, device, list(case.needs)))


def _cases(model: Model, *, lends: bool) -> Iterator[Case]:
    """What may wait on disk, from nothing to nearly all."""
    yield Case(model)
    yield Case(model, offload=True)
    if lends:
        yield Case(model, offload=True, lent=True)
    layers = [part for part in model.parts if layer_of(part) is not None]
    first = [part for part in model.parts if part.endswith("embed_tokens") and model.tied_head is None]
    order = [*first, *(part for part in model.parts if part == "vision_model"), *reversed(layers)]
    for count in range(1, len(order) + 1):
        yield Case(model, offload=True, lent=lends, disk=frozenset(order[:count]))


def _filled(case: Case, budgets: Mapping[str, int]) -> list[Place] | None:
    """The devices with the parts that they hold, filled one after the other; None if a part is left over."""
    places = [Place(name, nbytes) for name, nbytes in budgets.items()]
    for part in case.disk:  # computed on the first device
        places[0].parts.append(part)
        places[0].weights += case.needs[part]
    number = 0
    for part in case.needs:
        if part in case.disk:
            continue
        while number < len(places) and not _fits(case, places[number], part, first=number == 0):
            number += 1
        if number == len(places):
            return None
        places[number].parts.append(part)
        places[number].weights += case.needs[part]
    for place in places:
        place.rooms = _rooms(case, place.name, _computed(case, place.parts, first=place is places[0]))
    return places if all(place.left >= 0 for place in places) else None


def _fits(case: Case, place: Place, part: str, *, first: bool) -> bool:
    rooms = _rooms(case, place.name, _computed(case, [*place.parts, part], first=first))
    return place.weights + case.needs[part] + sum(room.nbytes for room in rooms) <= place.budget


def _computed(case: Case, parts: list[str], *, first: bool) -> list[str]:
    """The parts that a device computes. What RAM lends is computed on the first GPU, so room is made there for all."""
    return list(case.needs) if case.lent and first else parts


def _with_ram(case: Case, places: list[Place], budget: int) -> list[Place] | None:
    """The same with RAM beside, which what is read comes through."""
    ram = Place("cpu", budget, rooms=_rooms(case, "cpu", []))
    return [*places, ram] if ram.left >= 0 else None


def _rooms(case: Case, device: str, parts: Sequence[str]) -> list[Room]:
    """What is set aside on a device for the parts that it holds. RAM that lends its weights computes nothing."""
    model, computes, rooms = case.model, bool(parts) and not (case.lent and device == "cpu"), []
    if computes:
        layers = [layer for part in parts if (layer := layer_of(part)) is not None]
        rooms.append(cache_room(model.config, layers, model.tokens, model.dtype))
        rooms.append(activation_room(model.config, model.tokens, model.dtype, device))
        head = "lm_head" if model.tied_head is None else "embed_tokens"
        if any(part.endswith(head) for part in parts):
            rooms.append(logits_room(model.config, model.tokens, model.dtype))
        rooms.append(making_room(case.making, model.largest_expert, device, model.dtype))
        if case.lent:
            rooms.append(lent_room(case.largest))
    if case.waiting and (computes or device == "cpu"):
        rooms.append(passing_room(case.passing, device))
    if case.waiting and device == "cpu":
        rooms.append(rounding_room(case.rounding))
    return [room for room in rooms if room.nbytes]


def _keep(case: Case, places: Sequence[Place]) -> None:
    """Gives what memory is left to what is read: on a GPU to that of its parts, in RAM to any; steady weights first."""
    for place in places:
        come = [size for size in case.waiting if place.name == "cpu" or part_of(size.name) in place.parts]
        experts, steady = _kept_nbytes(come, routed=True), _kept_nbytes(come, routed=False)
        place.kept = min(place.left, experts + steady)
        place.kept_steady = min(place.kept, steady)
        place.experts = sum(size.experts for size in come) // 2  # an expert is two matrices
        place.slots = (place.kept - place.kept_steady) * place.experts // experts if experts else 0


def _kept_nbytes(sizes: Sequence[Weight], *, routed: bool) -> int:
    return sum(size.waiting for size in sizes if (size.experts > 0) == routed)
