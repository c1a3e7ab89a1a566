"""A hook point: a named place in the forward pass where a researcher can look or act."""

from jaxtyping import Shaped
from torch import Tensor, nn


class HookPoint(nn.Module):
    """An identity module. Whatever listens to it sees, and may replace, the tensor that passes.

    It is an ordinary module without parameters or state, so torch's forward hooks, nnsight and llama4lab's own calls
    all address the same thing. With nothing attached a call returns its argument at once. (Hooks that torch registers
    for all modules of the process do not see hook points; they see the modules around them.)

    Args:
        shape: The shape in words, for example `"batch seq d_model"`.
        lazy: Whether the tensor is computed only when somebody is listening.
    """

    def __init__(self, shape: str, *, lazy: bool = False):
        super().__init__()
        self.shape = shape
        self.lazy = lazy

    def __call__(self, x: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        # nnsight and accelerate replace `forward` on the instance instead of setting hooks.
        if self.hooked or "forward" in self.__dict__:
            return super().__call__(x)
        return x

    def forward(self, x: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        return x

    @property
    def hooked(self) -> bool:
        """Whether a torch hook of any kind is attached."""
        return bool(self._forward_hooks or self._forward_pre_hooks or self._backward_hooks or self._backward_pre_hooks)

    @property
    def watched(self) -> bool:
        """Whether anybody will see this tensor in the current pass: a hook, or an nnsight trace that waits here."""
        return self.hooked or ("forward" in self.__dict__ and self._awaited_by_nnsight())

    def _awaited_by_nnsight(self) -> bool:
        # nnsight keeps its state under this key of the instance; a trace that runs has an interleaver, which knows the
        # locations where a block is parked and those that a cache observes.
        state = self.__dict__.get("__nnsight__")
        if state is None:
            return False
        interleaver, _, locations = state.active()
        if interleaver is None:
            return False
        return any(place in interleaver.parked or place in interleaver.observers for place in locations)

    def extra_repr(self) -> str:
        return self.shape + (", lazy" if self.lazy else "")
