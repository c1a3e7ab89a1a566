"""Changing activations while the model runs.

Activation patching runs the model on one prompt and replaces the tensor at a hook point by another one: that of a
second, *clean* run, a mean, zero, or whatever a function makes of it. What then changes downstream was caused by it.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.run.listening import Listener, listening
from llama4lab.run.selection import selected

Patch = Tensor | float | int | Callable[[Tensor], Tensor]


@contextmanager
def patched(model: HookedPreTrainedModel, patches: Mapping[str, Patch]) -> Iterator[None]:
    """While the block lasts, every pass of the model sees the patches.

    Blocks nest; the inner one sees what the outer one made. However a block ends, no hook is left.

    Args:
        model: The model.
        patches: Name or glob of a hook point -> its new value (a number, or a tensor that broadcasts to the hook
            point's shape), or a function from the old tensor to the new one.

    Raises:
        ValueError: if a name matches no hook point, a value does not fit its place or holds NaN, or two names mean the
            same hook point.
        TypeError: if a function returns something else than a tensor.
        RuntimeError: if, when the block ends, a hook point has not fired in it; or a function edits in place.
    """
    listeners: dict[str, Listener] = {}
    for pattern, patch in patches.items():
        for name in selected(model.hook_points(), pattern):
            if name in listeners:
                raise ValueError(f"{name!r} is patched twice, by {pattern!r} too. Combine both in one function.")
            listeners[name] = _function(name, patch) if callable(patch) else replacement(name, patch)
    passes = 0

    def count(*_: object) -> None:
        nonlocal passes
        passes += 1

    handle = model.register_forward_pre_hook(count)
    try:
        with listening(model, listeners) as fired:
            yield
    finally:
        handle.remove()
    missing = [name for name in listeners if name not in fired]
    if missing:
        why = "no pass of the model ran inside the block" if not passes else f"{passes} passes of the model ran"
        raise RuntimeError(f"{len(missing)} patches were never applied ({why}): {', '.join(missing[:4])}.")


def replacement(name: str, value: Tensor | float | int) -> Callable[[Tensor], Tensor]:
    """Gives a patch that puts a value, broadcast to the hook point's shape, into its place.

    Raises:
        ValueError: if the value holds NaN; the patch raises it if the value does not fit.
    """
    given = torch.as_tensor(value)
    if given.is_floating_point() and bool(given.isnan().any()):
        raise ValueError(f"The patch for {name!r} holds NaN; every later activation would be NaN.")

    def replace(old: Tensor) -> Tensor:
        try:
            fits = torch.broadcast_shapes(given.shape, old.shape) == old.shape
        except RuntimeError:
            fits = False
        if not fits or given.is_floating_point() > old.is_floating_point():
            raise ValueError(
                f"The patch for {name!r} has shape {list(given.shape)} and dtype {given.dtype}; the hook point has "
                f"shape {list(old.shape)} and dtype {old.dtype}.\nPass a tensor that broadcasts to it, or a function."
            )
        return given.to(old.device, old.dtype).expand_as(old)

    return replace


def _function(name: str, function: Callable[[Tensor], Tensor]) -> Listener:
    def replace(old: Tensor) -> Tensor:
        version = old._version
        new = function(old)
        if old._version != version:
            raise RuntimeError(
                f"The function for {name!r} edited its tensor in place, which others have seen already.\n"
                "Edit a copy: `x = x.clone()` first, and return it."
            )
        if not isinstance(new, Tensor):
            raise TypeError(f"The function for {name!r} returned {type(new).__name__}; return the new tensor.")
        if new.shape != old.shape or new.is_floating_point() != old.is_floating_point():
            raise ValueError(
                f"The function for {name!r} returned shape {list(new.shape)}, {new.dtype}; the hook point has shape "
                f"{list(old.shape)}, {old.dtype}."
            )
        return new.to(old.device, old.dtype)

    return replace
