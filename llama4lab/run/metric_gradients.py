"""One pass with its gradients: values of hook points, and how a metric changes with each of them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.prompt.prompt import Prompt
from llama4lab.run.listening import listening, silent
from llama4lab.run.metrics import Metric, as_metric


@dataclass(frozen=True, eq=False)
class DifferentiatedPass:
    """What one forward, and perhaps one backward, gave.

    Attributes:
        values: Hook point -> its tensor, without a graph.
        gradients: Hook point -> derivative of the metric, summed over the rows; 0 where it does not depend on it.
            Rows are independent, so each row has the derivative of its own metric.
        metric: The value of the metric for each row.
    """

    values: dict[str, Tensor]
    gradients: dict[str, Tensor]
    metric: Float[Tensor, " row"]


def differentiated(
    model: HookedPreTrainedModel,
    prompt: Prompt,
    metric: Metric | Callable[[Tensor], Tensor],
    names: Sequence[str],
    *,
    by: Sequence[str] = (),
    inputs: Mapping[str, Tensor] | None = None,
) -> DifferentiatedPass:
    """Runs a prompt once, and back from the metric to the hook points that are asked for.

    No graph is kept below the first of them, and none for the weights.

    Args:
        model: The model. Whether its parameters require gradients plays no part, and is afterwards as it was.
        prompt: What to run.
        metric: The metric; of a function that gives one number for the batch, each row has the same value.
        names: Hook points whose values to keep.
        by: Hook points whose gradients to give.
        inputs: Hook point -> the tensor to put there instead of its own.

    Raises:
        ValueError: if the metric has no derivative, as a rank has none.
    """
    inputs, by = inputs or {}, list(by)
    seen: dict[str, Tensor] = {}

    def keeper(name: str):
        def keep(tensor: Tensor) -> Tensor:
            given = inputs.get(name)
            tensor = tensor if given is None else given.to(tensor.device, tensor.dtype)
            if name in by and not tensor.requires_grad:
                tensor = tensor.detach().requires_grad_()
            seen[name] = tensor
            return tensor

        return keep

    listeners = {name: keeper(name) for name in {*names, *by, *inputs}}
    bound = as_metric(metric).bound(prompt)
    with torch.set_grad_enabled(bool(by)), without_weights(model), listening(model, listeners) as fired:
        logits = model(**prompt.to(model.device).inputs(), use_cache=False).logits
        silent(list(listeners), fired, images=prompt.pixel_values is not None)
        values = bound(logits[:, bound.positions], torch.arange(len(prompt)))
        if by and not values.requires_grad:
            raise ValueError(
                f"The metric {bound.name} has no derivative, so no effect can be estimated from it.\n"
                "Take a smooth one, such as lab.metrics.logit_diff or lab.metrics.log_prob."
            )
        found = torch.autograd.grad(values.sum(), [seen[name] for name in by], allow_unused=True) if by else ()
    gradients = {
        name: torch.zeros_like(seen[name]) if gradient is None else gradient
        for name, gradient in zip(by, found, strict=True)
    }
    return DifferentiatedPass({name: seen[name].detach() for name in names}, gradients, values.detach())


@contextmanager
def without_weights(model: nn.Module) -> Iterator[None]:
    """While the block lasts, no parameter requires a gradient, so that no pass keeps what only they would need."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
