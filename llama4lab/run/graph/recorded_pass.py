"""One run of a prompt, kept as the graph sees it: what every sender wrote, and what a later pass can start from."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.model.token_layout import TokenLayout
from llama4lab.prompt.prompt import Prompt
from llama4lab.run.block_change import wide
from llama4lab.run.current_pass import following
from llama4lab.run.graph.contributions import contributions
from llama4lab.run.listening import listening
from llama4lab.run.metrics import BoundMetric, Metric, as_metric

ROUTES = ("indices", "gates")


@dataclass(frozen=True, eq=False)
class RecordedPass:
    """A run.

    Attributes:
        prompt: What was run.
        embedded: What goes into the text layers, images merged in, before any hook point there.
        layout: Where the tokens stand.
        written: Stage -> what its senders wrote, `[row, seq, sender, d_model]`.
        streams: The residual stream before each layer and, last, behind all.
        routes: Hook point of a router -> its tensor.
        metric: The metric, bound to the prompt.
        values: Its value for each row.
    """

    prompt: Prompt
    embedded: Float[Tensor, "row seq d_model"]
    layout: TokenLayout
    written: dict[int, Tensor]
    streams: list[Tensor]
    routes: dict[str, Tensor]
    metric: BoundMetric
    values: Float[Tensor, " row"]


@torch.no_grad()
def recorded_pass(
    model: HookedPreTrainedModel, prompt: Prompt, metric: Metric | Callable[[Tensor], Tensor]
) -> RecordedPass:
    """Runs a prompt."""
    names = [name for name in model.hook_points() if ".router." in name and name.endswith(ROUTES)]
    streams = [f"layers.{layer}.resid_pre" for layer in range(len(model.text.layers))]
    streams.append(f"layers.{len(streams) - 1}.resid_post")
    kept: dict[str, Tensor] = {}
    written: dict[int, Tensor] = {}

    def keeper(name: str):
        def keep(tensor: Tensor) -> None:
            kept[name] = tensor

        return keep

    bound = as_metric(metric).bound(prompt)
    with (
        following(model) as current,
        listening(model, {name: keeper(name) for name in (*names, *streams)}),
        contributions(model.text, written.__setitem__),
    ):
        logits = model(**prompt.to(model.device).inputs(), use_cache=False).logits
    assert current.embedded is not None
    assert current.layout is not None
    return RecordedPass(
        prompt=prompt,
        embedded=current.embedded,
        layout=current.layout,
        written=written,
        streams=[kept[name] for name in streams],
        routes={name: kept[name] for name in names},
        metric=bound,
        values=wide(bound(logits[:, bound.positions], torch.arange(len(prompt)))),
    )


def values_of(
    model: HookedPreTrainedModel,
    recorded: RecordedPass,
    x: Float[Tensor, "n seq d_model"],
    rows: Int[Tensor, " n"],
) -> Float[Tensor, " n"]:
    """The metric of residual streams that leave the last layer.

    Args:
        model: The model.
        recorded: The run whose metric it is.
        x: The streams. Of a metric that looks at all rows at once, these are whole batches, one after the other.
        rows: The row of the prompt that each belongs to.
    """
    head, positions = cast(Any, model).get_output_embeddings(), recorded.metric.positions
    x = model.text.final_norm(model.text.norm(x))
    logits = model.hook_points().module("logits")(head(x[:, positions]))
    return recorded.metric.over_batches(logits, rows, len(recorded.prompt))
