"""Steering: a vector is added to tokens while the model reads them or writes them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.run.chosen_tokens import ChosenTokens, Positions
from llama4lab.run.current_pass import following
from llama4lab.run.patching import patched


@contextmanager
def steered(
    model: HookedPreTrainedModel,
    vector: Mapping[str, Tensor],
    scale: float | int = 1.0,
    positions: Positions = None,
) -> Iterator[None]:
    """While the block lasts, `scale * vector` is added to tokens in every pass. Padding stays as it is.

    Positions count over the whole text, padding included, so they mean the same in one pass over the text and in
    generation, which reads one token a step.

    Args:
        model: The model.
        vector: A `SteeringVector`, or hook point name -> tensor of its shape without "batch seq".
        scale: Factor; negative to steer away.
        positions: Which tokens: None for all; a position or several; a slice, for example `slice(12, None)`; "new" for
            the tokens that generation adds (the first of them is chosen by the last one of the prompt, which is not
            steered then); or a boolean tensor `[batch, seq]` of the prompt's places. Negative positions count from the
            end of the prompt.

    Raises:
        KeyError: if there is no such hook point.
        ValueError: if the vector does not fit the hook point, a position has no meaning, or the prompts in a block
            differ in length although positions are counted from their end.
        RuntimeError: if no token was steered when the block ends.
    """
    chosen = ChosenTokens(positions)
    with following(model) as current:

        def adder(name: str, added: Tensor):
            def add(x: Tensor) -> Tensor:
                if added.shape != x.shape[2:] or not current.is_of(x):
                    raise ValueError(
                        f"The vector at {name} has shape {list(added.shape)}; the hook point has {list(x.shape)} in a "
                        f"pass of {list(current.shape)} tokens.\nA vector has the shape of the hook point without "
                        "batch and seq, and is added in passes of the whole model."
                    )
                mask = chosen.mask(current).to(x.device)
                mask = mask.reshape(*mask.shape, *[1] * added.ndim)
                return torch.where(mask, x + scale * added.to(x.device, x.dtype), x)

            return add

        points = model.hook_points()
        for name in vector:
            if name == "embed":
                raise ValueError("A vector was to be added at embed, before images are merged in; take embed_merged.")
            if points[name].split()[:2] != ["batch", "seq"]:
                raise ValueError(f"A vector is added to tokens; {name} is {points[name]}, not batch seq ...")
        with patched(model, {name: adder(name, tensor) for name, tensor in vector.items()}):
            yield
    if not chosen.count:
        raise RuntimeError(
            f"No token was steered: positions={positions!r}, and the last pass had positions {current.first} to "
            f"{current.first + current.shape[1] - 1}."
            + ("\nOnly steps of generation with a cache read new tokens." if isinstance(positions, str) else "")
        )
