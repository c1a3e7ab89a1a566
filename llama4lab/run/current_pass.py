"""Where the tokens of the pass that is running stand in the whole text, for patches that concern only some tokens."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.model.token_layout import TokenLayout


@dataclass
class CurrentPass:
    """The newest pass of a model: a whole prompt, or the one token of a step of generation.

    Positions are those of the prompt and the tokens generated behind it, padding counted, as in `Prompt` and `Run`.

    Attributes:
        input_ids: Its tokens; None if it was given vectors.
        embedded: What goes into the text layers, images merged in, before any hook point there.
        layout: Where its tokens stand. Both are None until the pass has come to the text layers.
    """

    input_ids: Int[Tensor, "batch seq"] | None = None
    embedded: Float[Tensor, "batch seq d_model"] | None = None
    layout: TokenLayout | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and tokens; (0, 0) before the text layers."""
        return (0, 0) if self.embedded is None else (self.embedded.shape[0], self.embedded.shape[1])

    def is_of(self, tensor: Shaped[Tensor, "..."]) -> bool:
        """Whether a tensor has a place for each token of the pass; a piece of the model run by itself gives others."""
        return tuple(tensor.shape[:2]) == self.shape

    @property
    def first(self) -> int:
        """The position of its first token: how many tokens are cached."""
        assert self.layout is not None
        return self.layout.past

    @property
    def valid(self) -> Bool[Tensor, "batch seq"]:
        """Which of its places hold a token, not padding."""
        assert self.layout is not None
        return self.layout.query_valid.expand(self.shape)


@contextmanager
def following(model: HookedPreTrainedModel) -> Iterator[CurrentPass]:
    """Keeps note of the pass that is running, from before its first hook point of the text layers on.

    Args:
        model: The model.
    """
    current = CurrentPass()

    def note_tokens(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        current.input_ids = args[0] if args else kwargs.get("input_ids")
        current.embedded = current.layout = None

    def note_layout(_module: nn.Module, args: tuple) -> None:
        current.embedded, current.layout = args[0], args[1]

    handles = [
        model.register_forward_pre_hook(note_tokens, with_kwargs=True),
        model.text.register_forward_pre_hook(note_layout),
    ]
    try:
        yield current
    finally:
        for handle in handles:
            handle.remove()
