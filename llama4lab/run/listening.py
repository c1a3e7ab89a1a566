"""Hooks that live exactly as long as a with block."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from llama4lab.model.pretrained import HookedPreTrainedModel

Listener = Callable[[Tensor], Tensor | None]


@contextmanager
def listening(model: HookedPreTrainedModel, listeners: Mapping[str, Listener]) -> Iterator[set[str]]:
    """Calls a function whenever its hook point fires; what it returns, unless None, replaces the tensor.

    Args:
        model: The model to listen to.
        listeners: Hook point name -> function of the tensor.

    Yields:
        The names that have fired so far.
    """
    points, fired = model.hook_points(), set()
    handles = []
    try:
        for name, listener in listeners.items():
            handles.append(points.module(name).register_forward_hook(_hook(name, listener, fired)))
        yield fired
    finally:
        for handle in handles:
            handle.remove()


def silent(names: Mapping[str, Any] | list[str], fired: set[str], *, images: bool) -> None:
    """Complains about hook points that never fired.

    Args:
        names: Those that should have.
        fired: Those that did.
        images: Whether the pass had images.

    Raises:
        RuntimeError: if there are any.
    """
    missing = [name for name in names if name not in fired]
    if not missing:
        return
    vision = [name for name in missing if name.startswith(("vision_model.", "image_features"))]
    reason = "The prompt has no image." if vision and not images else "The pass ended before, or never came there."
    shown = ", ".join(missing[:4]) + (", ..." if len(missing) > 4 else "")
    raise RuntimeError(f"{len(missing)} hook points never fired: {shown}.\n{reason}")


def is_hooked(model: HookedPreTrainedModel) -> bool:
    """Whether somebody listens to the model or edits it: their functions expect ordinary tensors of whole passes."""
    return any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def _hook(name: str, listener: Listener, fired: set[str]) -> Callable[[nn.Module, Any, Tensor], Tensor | None]:
    def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor | None:
        fired.add(name)
        return listener(output)

    return hook
