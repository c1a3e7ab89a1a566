"""Ablations: values without information, for `patched` and for `values=` of `sweep`.

Zero is simple, but a model has never seen it. The mean keeps what all prompts have in common. Values of other prompts'
tokens keep the model on activations that it knows, and take away only which token they belong to.
"""

from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.run.examples import runs_over, token_mask, token_values
from llama4lab.run.recording import as_prompt
from llama4lab.run.selection import Selector, selected
from llama4lab.run.size import shape


def zero(model: HookedPreTrainedModel, *, at: Selector) -> dict[str, Float[Tensor, ""]]:
    """Gives zeros: hook point name -> one number that broadcasts to it.

    Args:
        model: The model.
        at: Names or globs of hook points.

    Raises:
        ValueError: for indices of experts, where 0 is an expert, and for scores, where 0 shows what is hidden.
    """
    names = selected(model.hook_points(), at)
    for name in names:
        _refuse_indices(name, "zero")
        if name.endswith("self_attn.scores"):
            raise ValueError(
                f"zero was asked for at {name}, where 0 would show a query the keys that are hidden from it.\n"
                f"Zero {name.removesuffix('scores')}pattern instead."
            )
    return {name: torch.zeros(()) for name in names}


def mean(
    model: HookedPreTrainedModel, examples: Any, *, at: Selector, by_position: bool = False
) -> dict[str, Float[Tensor, "..."]]:
    """Gives means over examples: hook point name -> a tensor that broadcasts to it.

    Args:
        model: The model.
        examples: A `Prompt`, a `Run`, a list of either, or anything that `model.prompt` takes. Every token counts the
            same; padding is left out.
        at: Names or globs of hook points.
        by_position: Whether each position has a mean of its own, `[seq, ...]`; the examples and the prompt that is
            patched then have equal length, padding counted.

    Raises:
        ValueError: for indices of experts and patterns, which have no mean, or examples of different lengths
            or all with padding at the same position.
    """
    names = selected(model.hook_points(), at)
    for name in names:
        _refuse_indices(name, "mean")
        if by_position and model.hook_points()[name].split()[:2] != ["batch", "seq"]:
            raise ValueError(f"{name} is {model.hook_points()[name]}: it has no positions. Leave out by_position.")
    sums: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    for run in runs_over(model, examples, names):
        for name in names:
            values = run[name].detach() if by_position else token_values(run, name)
            if by_position and name in sums and sums[name].shape != values.shape[1:]:
                few, many = sorted([values.shape[1], len(sums[name])])
                raise ValueError(f"A mean by position needs examples of one length; there are {few} and {many}.")
            one = token_mask(run).to(values.device) if by_position else values.new_ones(len(values), dtype=torch.bool)
            one = one.reshape(*one.shape, *[1] * (values.ndim - one.ndim))
            sums[name] = sums.get(name, 0) + torch.where(one, values.float(), 0).sum(0).cpu()
            counts[name] = counts.get(name, 0) + one.sum(0).cpu()
    unknown = [name for name in names if bool((counts[name] == 0).any())]
    if unknown:
        place = int((counts[unknown[0]].flatten() == 0).nonzero()[0])
        raise ValueError(f"A mean by position needs a token at each; place {place} is padding in all examples.")
    return {name: sums[name] / counts[name] for name in names}


def resample(
    model: HookedPreTrainedModel, prompt: Any, examples: Any, *, at: Selector, seed: int = 0
) -> dict[str, Shaped[Tensor, "..."]]:
    """Gives each token of a prompt the values of a token drawn from examples: hook point name -> tensor of its shape.

    A token takes the values of all hook points from the same drawn token, so they fit together.

    Args:
        model: The model.
        prompt: What will be patched: a `Prompt`, or anything that `model.prompt` takes.
        examples: Where tokens are drawn from, as in `mean`; padding is never drawn.
        at: Names or globs of hook points of the shape "batch seq ..."; or of the vision tower, whose places are drawn
            as tokens are.
        seed: Of the draw.

    Raises:
        ValueError: for hook points that have no value for each token, as patterns have none.
    """
    names, prompt = selected(model.hook_points(), at), as_prompt(model, prompt)
    pool: dict[str, list[Tensor]] = {name: [] for name in names}
    for run in runs_over(model, examples, names):
        for name in names:
            pool[name].append(token_values(run, name).cpu())
    drawn = {}
    for name in names:
        values, target = torch.cat(pool[name]), shape(model, prompt, name)
        # A fresh generator for each hook point: the same draw, where as many tokens give to as many places.
        generator = torch.Generator().manual_seed(seed)
        places = torch.randint(len(values), target[:2], generator=generator)
        drawn[name] = values[places]
    return drawn


def _refuse_indices(name: str, what: str) -> None:
    if name.endswith("router.indices"):
        raise ValueError(
            f"{what} was asked for at {name}, which holds the numbers of experts, not amounts.\n"
            "Ablate router.gates, router.logits or experts.out, draw indices with resample, or force an expert: "
            f"{{{name!r}: 3}}."
        )
