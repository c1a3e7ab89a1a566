"""The vision tower over the tiles of the pair, and again for every unit that is patched in it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from llama4lab.model.hook_points import HookPoints
from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.prompt.prompt import Prompt
from llama4lab.run.hook_names import is_vision, layer_of
from llama4lab.run.listening import Listener, listening
from llama4lab.run.substitution import Source, Substitution, Values, as_tokens, from_tokens, place_axis, substituted

START = -1  # the entry of what comes before the first layer


def vision_entry(name: str, num_layers: int) -> int:
    """The layer of the vision tower from which a patch at a hook point has to be computed."""
    if name in ("vision_model.patch_embed", "vision_model.embed"):
        return START
    layer = layer_of(name)
    return num_layers if layer is None else layer


@dataclass(eq=False)
class VisionPass:
    """What the vision tower gives for the base run, the source run and patched tiles.

    Attributes:
        model: The model.
        pixels: The tiles of the base prompt.
        substitutions: Hook point of the vision tower -> what is replaced there.
        values: By what.
        constants: Hook point -> values of every image patch of the base run, where `values` is a mapping.
        entry: For every unit of the sweep the layer at which it begins.
    """

    model: HookedPreTrainedModel
    pixels: Float[Tensor, "tile channel height width"]
    substitutions: Mapping[str, Substitution]
    values: Values
    constants: Mapping[str, Tensor]
    entry: Int[np.ndarray, " unit"]
    residuals: dict[int, Tensor] = field(default_factory=dict)
    sources: dict[str, Tensor] = field(default_factory=dict)
    _slots: np.ndarray | None = None

    def encoded(self, prompt: Prompt, *, is_source: bool) -> Float[Tensor, "row seq d_model"]:
        """What enters the text layers for a prompt with images; remembers what patched tiles need."""
        model, points = cast(Any, self.model), self.model.hook_points()
        keep: dict[str, Listener] = {}
        if is_source:
            keep = {name: self._keeper(self.sources, name, as_tokens, points[name]) for name in self.substitutions}
        else:
            count = len(model.vision.model.layers)
            for layer in sorted({entry for entry in self.entry.tolist() if START < entry <= count}):
                name = f"vision_model.layers.{min(layer, count - 1)}.{'resid_pre' if layer < count else 'resid_post'}"
                keep[name] = self._keeper(self.residuals, layer)
        assert prompt.pixel_values is not None
        with torch.no_grad(), listening(self.model, keep):
            encoded = model.vision(prompt.pixel_values.to(self.model.device))
            return model.merged(prompt.input_ids.to(self.model.device), encoded)

    def features(
        self, units: Int[np.ndarray, " pair"], tiles: Int[np.ndarray, " pair"], most: int
    ) -> Float[Tensor, "pair image_token d_model"]:
        """The projected image vectors of patched tiles.

        Args:
            units: Whose patches.
            tiles: In which tile.
            most: How many tiles at once.
        """
        model, found = cast(Any, self.model), {}
        names = list(self.substitutions)
        with torch.no_grad(), listening(self.model, {name: self._patcher(name) for name in names}):
            for entry in np.unique(self.entry[units]):
                own = np.flatnonzero(self.entry[units] == entry)
                for some in np.split(own, range(most, len(own), most)):
                    self._slots = np.full((len(self.entry), len(self.pixels)), -1)
                    self._slots[units[some], tiles[some]] = np.arange(len(some))
                    tile = torch.from_numpy(tiles[some])
                    if entry == START:
                        encoded = model.vision(self.pixels[tile].to(self.model.device))
                    else:
                        x = self.residuals[int(entry)]
                        encoded = model.vision.continued(x[tile.to(x.device)], int(entry))
                    vectors = model.image_features(model.multi_modal_projector(encoded))
                    found |= dict(zip(some.tolist(), vectors, strict=True))
        return torch.stack([found[i] for i in range(len(units))])

    def _keeper(self, store: dict, key: Any, view: Any = None, shape: str = "") -> Listener:
        def keep(tensor: Tensor) -> None:
            store[key] = tensor if view is None else view(tensor, shape)

        return keep

    def _patcher(self, name: str) -> Listener:
        entries = self.substitutions[name]
        unit, tile, patch = entries.unit.numpy(), entries.lead.numpy(), entries.place.numpy()

        def patch_tiles(tensor: Tensor) -> Tensor | None:
            assert self._slots is not None
            slot, places = self._slots[unit, tile], tensor.shape[place_axis(entries.shape.split())]
            here = slot >= 0
            if not here.any():
                return None
            kept = torch.from_numpy(here)
            theirs = torch.from_numpy(tile[here] * places + patch[here])
            tokens = self.constants.get(name, self.sources.get(name))
            at = torch.from_numpy(slot[here] * places + patch[here]).to(tensor.device)
            new = substituted(
                as_tokens(tensor, entries.shape), at, entries.only(kept), Source(tokens, theirs), self.values
            )
            return from_tokens(new, entries.shape, tensor)

        return patch_tiles


def image_places(model: HookedPreTrainedModel, prompt: Prompt) -> Int[np.ndarray, "tile image_token 2"] | None:
    """The row and column of every image token, tile by tile; None without images."""
    if prompt.pixel_values is None:
        return None
    token = cast(Any, model.config).image_token_id
    places = (prompt.input_ids == token).nonzero().numpy()
    return places.reshape(len(prompt.pixel_values), -1, 2)


def check_names(points: HookPoints, names: list[str], prompt: Prompt) -> None:
    """Refuses hook points of the vision tower for a prompt without images."""
    vision = [name for name in names if is_vision(name)]
    if vision and prompt.pixel_values is None:
        raise ValueError(
            f"{vision[0]!r} is in the vision tower, but the prompt has no image.\n"
            f"Choose among the other {sum(not is_vision(name) for name in points)} hook points."
        )
