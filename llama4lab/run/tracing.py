"""nnsight traces over the same modules and hook points."""

from typing import Any, cast

import torch
from nnsight import NNsight
from nnsight.intervention.batching import Batcher
from nnsight.intervention.envoy import Envoy
from torch import Tensor

from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.prompt.joining import joined
from llama4lab.prompt.prompt import Prompt
from llama4lab.run.recording import as_prompt


class PromptBatcher(Batcher):
    """Gives each invoke its own rows, and of the vision tower's tensors its own tiles.

    nnsight tells batched tensors by their leading axis, which in llama4lab is the row of the batch everywhere but in
    the vision tower, where it is the tile.
    """

    def __init__(self, envoy: Any, kwargs: dict | None = None):
        super().__init__(envoy, kwargs)
        self.tiles: dict[int, tuple[int, int]] = {}  # first row of a group -> its first tile and number of tiles
        self.num_tiles = 0

    def add(self, *inputs: Any, **kwargs: Any) -> list | None:
        """Records the prompt of one invoke."""
        if inputs:
            inputs = (as_prompt(cast(HookedPreTrainedModel, self.envoy._module), inputs[0]), *inputs[1:])
        group = super().add(*inputs, **kwargs)
        if group is not None:
            pixels = inputs[0].pixel_values
            count = 0 if pixels is None else pixels.shape[0]
            self.tiles[group[0]] = (self.num_tiles, count)
            self.num_tiles += count
        return group

    def _by_tile(self, tensor: Tensor, group: list) -> list | None:
        """The tiles of a group if the tensor runs over tiles, else None."""
        tiles = list(self.tiles[group[0]])
        if tensor.shape[0] != self.num_tiles or tiles == list(group):
            return None
        if self.num_tiles == self.total:
            raise ValueError(
                f"The trace has {self.total} rows and as many image tiles, but not one tile a row, so rows and tiles "
                "cannot be told apart.\nPut prompts with and without images into traces of their own."
            )
        return tiles

    def _narrow_tensor(self, tensor: Tensor, group: list) -> Tensor:
        tiles = self._by_tile(tensor, group)
        return super()._narrow_tensor(tensor, group) if tiles is None else tensor.narrow(0, *tiles)

    def _widen_tensor(self, full: Tensor, group: list, edited: Tensor) -> Tensor:
        tiles = self._by_tile(full, group)
        if tiles is None:
            return super()._widen_tensor(full, group, edited)
        start, size = tiles
        return torch.cat([full[:start], edited, full[start + size :]])


class TracedLlama4(NNsight):
    """An nnsight model whose invokes take prompts, texts, chats or token ids."""

    _batcher_class = PromptBatcher

    @property
    def _llama(self) -> HookedPreTrainedModel:
        return cast(HookedPreTrainedModel, self._module)

    def hook(self, name: str) -> Envoy:
        """The nnsight module of a hook point by its short name, for example `"layers.3.self_attn.pattern"`."""
        return self.interleaver.envoys[id(self._llama.hook_points().module(name))]

    def _batch_size(self, *inputs: Any, **_: Any) -> int:
        return len(as_prompt(self._llama, inputs[0])) if inputs else 0

    def _batch(self, invokes: list[tuple], fn: Any) -> tuple[tuple, dict]:
        prompts = [as_prompt(self._llama, inputs[0]) for inputs, _ in invokes]
        options = {key: value for _, kwargs in invokes for key, value in kwargs.items()}
        if not prompts:
            return (), options
        whole: Prompt = prompts[0] if len(prompts) == 1 else joined(prompts)
        return (), {**whole.to(self._llama.device).inputs(), **options}


def nnsight(model: HookedPreTrainedModel) -> TracedLlama4:
    """Gives an nnsight model over the same modules.

    Hook points are read and set through `.output`; invokes of one trace are padded on the left to one batch and see
    only their own rows:

        traced = lab.nnsight(model)
        with traced.trace() as tracer:
            with tracer.invoke("The capital of France is"):
                traced.hook("layers.3.feed_forward.router.logits").output[..., 2] += 10.0
                logits = traced.hook("logits").output.save()
            with tracer.invoke("The capital of Spain is"):
                pattern = traced.hook("layers.3.self_attn.pattern").output.save()
    """
    return TracedLlama4(model)
