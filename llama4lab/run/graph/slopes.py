"""How the metric changes with what each receiver reads: one backward pass for all of them."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llama4lab.model.moe import MixtureOfExperts
from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.run.block_change import wide
from llama4lab.run.graph.branches import Change, Reading, branched
from llama4lab.run.graph.recorded_pass import RecordedPass, values_of
from llama4lab.run.listening import listening
from llama4lab.run.metric_gradients import without_weights


@dataclass(frozen=True, eq=False)
class Slope:
    """Derivatives of the metric with respect to the residual stream as some receivers read it, before their norm.

    Attributes:
        stage: As in `Node`.
        part: As in `Node`.
        gradient: For each head, KV head or slot; rows are independent, so each has that of its own metric.
        indices: The experts of the slots, for the part "expert".
    """

    stage: int
    part: str
    gradient: Float[Tensor, "row seq branch d_model"]
    indices: Int[Tensor, "row seq slot"] | None


@dataclass(frozen=True, eq=False)
class Slopes:
    """The slopes of one pass.

    Attributes:
        of: One for each part of each stage.
        routed: Layer -> the derivative with respect to what its routed experts write.
        streams: Layer with experts -> the residual stream that router and experts read.
    """

    of: list[Slope]
    routed: dict[int, Tensor]
    streams: dict[int, Tensor]


def slopes(model: HookedPreTrainedModel, run: RecordedPass, embedded: Float[Tensor, "row seq d_model"]) -> Slopes:
    """Runs the text layers on given input vectors, and back.

    Args:
        model: The model.
        run: Whose tokens and metric they have.
        embedded: What goes into the first layer.

    Raises:
        ValueError: if the metric has no derivative.
    """
    text, config = model.text, model.text.config
    leaves = _Leaves({"q": config.num_attention_heads} | dict.fromkeys("kv", config.num_key_value_heads))
    written: dict[int, Tensor] = {}
    layers = [number for number, layer in enumerate(text.layers) if isinstance(layer.feed_forward, MixtureOfExperts)]
    listeners = {f"layers.{layer}.feed_forward.out": _keeper(written, layer) for layer in layers}
    rows = torch.arange(len(run.prompt), device=embedded.device)
    rotation = text.rotary_emb(run.layout.positions)
    with torch.enable_grad(), without_weights(model), branched(text, leaves.change), listening(model, listeners):
        x = embedded.detach()
        for layer in text.layers:
            x = layer(x, rotation, run.layout)
        values = values_of(model, run, x, rows)
        if not values.requires_grad:
            raise ValueError(
                f"The metric {run.metric.name} has no derivative, so no edge can be estimated from it.\n"
                "Take a smooth one, such as lab.metrics.logit_diff or lab.metrics.log_prob."
            )
        tensors = [*leaves.tensors, *written.values()]
        found = torch.autograd.grad(values.sum(), tensors, allow_unused=True)
    gradients = [
        torch.zeros_like(t) if gradient is None else wide(gradient) for t, gradient in zip(tensors, found, strict=True)
    ]
    of = [
        Slope(reading.stage, reading.part, gradient, reading.indices)
        for reading, gradient in zip(leaves.readings, gradients, strict=False)
    ]
    routed = dict(zip(written, gradients[len(of) :], strict=True))
    streams = {r.stage // 2: r.stream.detach() for r in leaves.readings if r.part == "router"}
    return Slopes(of, routed, streams)


def _keeper(kept: dict[int, Tensor], layer: int) -> Callable[[Tensor], None]:
    def keep(tensor: Tensor) -> None:
        kept[layer] = tensor

    return keep


@dataclass(eq=False)
class _Leaves:
    """Zeros that are added to what every receiver reads, so that a gradient can be asked for each."""

    counts: dict[str, int]
    tensors: list[Tensor] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)

    def change(self, reading: Reading) -> Change:
        stream = wide(reading.stream)
        branches = self.counts.get(reading.part, 1) if reading.indices is None else reading.indices.shape[-1]
        leaf = torch.zeros(
            *stream.shape[:2], branches, stream.shape[-1], dtype=stream.dtype, device=stream.device, requires_grad=True
        )
        self.tensors.append(leaf)
        self.readings.append(reading)
        return Change(list(range(branches)), leaf)
