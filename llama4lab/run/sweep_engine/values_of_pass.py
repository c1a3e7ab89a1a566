"""What hook points do during a packed pass: remember the source run's tensors, and patch the units."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from llama4lab.model.hook_points import HookPoints
from llama4lab.model.packed_layout import PackedLayout
from llama4lab.run.hook_names import component_of, is_pattern, router_of
from llama4lab.run.listening import Listener
from llama4lab.run.substitution import Source, Substitution, Values, as_tokens, from_tokens, substituted
from llama4lab.run.sweep_axes import BY_EXPERT
from llama4lab.run.sweep_engine.packing import Packing

# Hook points of a layer that all tokens reach, also those that do not attend any more.
ALL_TOKENS = ("resid_pre", "self_attn.k", "self_attn.v", "self_attn.k_rot")


@dataclass
class Place:
    """Where in the packed pass the model is.

    Attributes:
        packing: Of the layer.
        tokens: The tokens of the layer that this call of it has.
        asked: Those that attend, counted among all that do.
        layout: The layout of the call; None behind the layers.
        has_source: Whether the call has the tokens of the source run.
    """

    packing: Packing
    tokens: slice
    asked: slice
    layout: PackedLayout | None
    has_source: bool


@dataclass
class PassValues:
    """The listeners of a packed pass.

    Attributes:
        points: The hook points of the model.
        substitutions: Hook point -> what is replaced there.
        values: By what; see `substituted`.
        source_at: For the entries of every hook point, the token of the source run.
        source_tokens: Where the tokens of the source run stand in the packed row.
        constants: Hook point -> values of every token of the base run, where `values` is a mapping.
    """

    points: HookPoints
    substitutions: Mapping[str, Substitution]
    values: Values
    source_at: Mapping[str, Tensor]
    source_tokens: slice
    constants: Mapping[str, Tensor]
    place: Place | None = None
    sources: dict[str, Tensor] = field(default_factory=dict)
    routes: dict[str, tuple[Tensor, Tensor | None]] = field(default_factory=dict)

    def listeners(self, names: list[str]) -> dict[str, Listener]:
        """One for each hook point, and for the routes that entries by expert need."""
        routes = {router_of(name) for name in names if name.endswith(BY_EXPERT)}
        routes = {name for name in routes if self.substitutions[_expert_user(name, names)].expert is not None}
        found: dict[str, Listener] = {}
        for name in [*names, *(route for route in routes if route not in names)]:
            found[name] = self._listener(name, keeps_routes=name in routes)
        return found

    def patched(
        self, name: str, tensor: Tensor, start: np.ndarray, first: np.ndarray, end: np.ndarray, offset: int = 0
    ) -> Tensor:
        """The tensor with the entries of the units in it replaced.

        Args:
            name: The hook point.
            tensor: Its tensor.
            start: For every unit of the sweep where its tokens begin in the packed row; -1 if it has none.
            first: For every unit the column of its first token.
            end: For every unit one past its last column.
            offset: The token of the packed row at which the tensor begins.
        """
        entries = self.substitutions[name]
        unit, column = entries.unit.numpy(), entries.place.numpy()
        count = tensor.shape[0] * tensor.shape[2 if is_pattern(name) else 1]
        at = start[unit] + column - first[unit] - offset
        here = (start[unit] >= 0) & (column >= first[unit]) & (column < end[unit]) & (at >= 0) & (at < count)
        if not here.any():
            return tensor
        kept = torch.from_numpy(here)
        tokens, shape = as_tokens(tensor, entries.shape), entries.shape
        routes, source_routes = self.routes.get(router_of(name), (None, None))
        if name in self.constants:
            source = Source(self.constants[name], self.source_at[name][kept])
        else:
            source = Source(self.sources.get(name), self.source_at[name][kept], source_routes)
        places = torch.from_numpy(at[here]).to(tensor.device)
        new = substituted(tokens, places, entries.only(kept), source, self.values, routes)
        return from_tokens(new, shape, tensor)

    def _listener(self, name: str, *, keeps_routes: bool) -> Listener:
        patches, all_tokens = name in self.substitutions, component_of(name) in ALL_TOKENS

        def listen(tensor: Tensor) -> Tensor | None:
            assert self.place is not None
            place, packing = self.place, self.place.packing
            if is_pattern(name):
                return self._listen_to_pattern(name, tensor)
            window = place.tokens if all_tokens else place.asked
            new = tensor
            if place.has_source and self.source_tokens.stop > self.source_tokens.start:
                self.sources[name] = as_tokens(tensor, self.points[name])[self.source_tokens]
            if patches:
                start = packing.start if all_tokens else packing.asked_start
                first = packing.first if all_tokens else packing.asked_first
                new = self.patched(name, tensor, start, first, packing.end, window.start)
            if keeps_routes:
                self.routes[name] = (as_tokens(new, self.points[name]), self.sources.get(name))
            return None if new is tensor else new

        return listen

    def _listen_to_pattern(self, name: str, tensor: Tensor) -> Tensor | None:
        """Patterns come part by part."""
        assert self.place is not None
        assert self.place.layout is not None
        part, packing = self.place.layout.current, self.place.packing
        assert part is not None
        if part.trunk_rows is None:
            if not part.is_trunk:
                self.sources[name] = as_tokens(tensor, self.points[name])
            return None
        offset = self.place.asked.start + part.asked.start
        new = self.patched(name, tensor, packing.asked_start, packing.asked_first, packing.end, offset)
        return None if new is tensor else new


def _expert_user(route: str, names: list[str]) -> str:
    return next(name for name in names if name.endswith(BY_EXPERT) and router_of(name) == route)
