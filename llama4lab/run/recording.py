"""Running a prompt while watching hook points."""

from typing import Any

import torch
from torch import Tensor

from llama4lab.model.facts import facts
from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.prompt.prompt import Prompt
from llama4lab.run.listening import listening, silent
from llama4lab.run.run import Run
from llama4lab.run.selection import Selector, selected
from llama4lab.run.size import free_nbytes, recorded_nbytes


def record(
    model: HookedPreTrainedModel,
    prompt: Any,
    at: Selector = (),
    *,
    to: str | torch.device | None = None,
    grad: bool = False,
) -> Run:
    """Runs a prompt once and keeps the tensors of the chosen hook points, and the logits.

    Args:
        model: The model.
        prompt: A `Prompt`, or anything that `model.prompt` takes (text, a chat, token ids).
        at: Names or globs of hook points, for example `["layers.*.feed_forward.router.*", "layers.3.resid_post"]`.
        to: Where to keep the tensors, for example "cpu"; by default each stays on its device.
        grad: Whether the tensors keep their graph and get a `.grad` when something computed from them is
            differentiated.

    Raises:
        ValueError: if a name or glob matches no hook point.
        RuntimeError: if a chosen hook point never fires, as those of the vision tower do without an image.
        MemoryError: if the tensors would not fit into the free memory; the message has both figures.
    """
    prompt = as_prompt(model, prompt)
    names = selected(model.hook_points(), at)
    _check_memory(model, prompt, names, to)
    kept: dict[str, Tensor] = {}

    def keeper(name: str):
        def keep(tensor: Tensor) -> None:
            if grad and tensor.requires_grad:
                tensor.retain_grad()
            kept[name] = tensor if to is None else tensor.to(to)

        return keep

    with torch.set_grad_enabled(grad), listening(model, {name: keeper(name) for name in {*names, "logits"}}) as fired:
        model(**prompt.to(model.device).inputs(), use_cache=False)
    silent(names, fired, images=prompt.pixel_values is not None)
    logits = kept["logits"]
    points = model.hook_points()
    tensors = {name: kept[name] for name in names}
    return Run(tensors, {name: points[name] for name in names}, logits, prompt, facts(model.config, model.text))


def as_prompt(model: HookedPreTrainedModel, prompt: Any) -> Prompt:
    """Lets every call take text, chats and token ids where it takes a prompt."""
    return prompt if isinstance(prompt, Prompt) else model.prompt(prompt)


def _check_memory(model: HookedPreTrainedModel, prompt: Prompt, names: list[str], to: Any) -> None:
    need = recorded_nbytes(model, prompt, names)
    device = torch.device(model.device if to is None else to)
    free = free_nbytes(device)
    if need > free:
        raise MemoryError(
            f"The recording would take {need / 2**30:.1f} GiB on {device}, where {free / 2**30:.1f} GiB are free.\n"
            'Record fewer hook points, a shorter prompt, or keep them elsewhere with to="cpu".'
        )
