"""A set of examples (texts, prompts or runs) as runs of a few rows each, and the values that their tokens have."""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.prompt.joining import joined
from llama4lab.prompt.prompt import Prompt
from llama4lab.run.recording import as_prompt, record
from llama4lab.run.run import Run

ROWS = 16  # of one pass


def runs_over(model: HookedPreTrainedModel, examples: Any, names: list[str]) -> Iterator[Run]:
    """Runs examples, a few rows at a time; what was recorded before is not run again.

    Args:
        model: The model.
        examples: A `Prompt`, a `Run`, a list of either, or anything that `model.prompt` takes.
        names: The hook points to record.

    Raises:
        ValueError: if there are no examples, or a given run does not have a hook point.
    """
    several = isinstance(examples, list | tuple) and all(isinstance(example, Prompt | Run) for example in examples)
    if several and not examples:
        raise ValueError("Examples were to be run, but there are none.")
    for example in examples if several else [examples]:
        if isinstance(example, Run):
            missing = [name for name in names if name not in example]
            if missing:
                has = ", ".join(example.names[:4]) + ", ..." * (len(example) > 4) or "nothing"
                raise ValueError(
                    f"{missing[0]} is asked for; the run of the examples has {has}.\n"
                    f"Record it with at={missing[0]!r}, or give the prompt."
                )
            yield example
        else:
            prompt = as_prompt(model, example)
            for first in range(0, len(prompt), ROWS):
                some = [prompt.row(row) for row in range(first, min(first + ROWS, len(prompt)))]
                yield record(model, prompt if len(prompt) <= ROWS else joined(some), at=names)


def token_mask(run: Run) -> Bool[Tensor, "batch seq"]:
    """Which places of a run's tensors are tokens, not padding."""
    return run.prompt.attention_mask.cpu().bool()[run.rows][:, run.positions]


def token_values(run: Run, name: str) -> Shaped[Tensor, "token ..."]:
    """The values of a hook point, one for each token of the run, padding left out; or for each place of the tiles.

    Raises:
        ValueError: if the hook point has no axis of tokens or of places in a tile, as a pattern has none.
    """
    tensor, words = run[name].detach(), run.shapes[name].split()
    if words[:2] == ["batch", "seq"]:
        return tensor[token_mask(run).to(tensor.device)]
    if words[0] == "tile" and words[1] in ("patch", "image_token"):
        return tensor.flatten(0, 1)
    raise ValueError(
        f"{name} is {run.shapes[name]}: it has no value for each token, which other prompts could lend.\n"
        "Take the output of the heads instead, self_attn.z or self_attn.head_out."
    )


def row_means(run: Run, name: str) -> Shaped[Tensor, "batch ..."]:
    """The mean of a hook point over the tokens of each row, padding left out."""
    tensor = run[name].detach().float()
    weight = token_mask(run).to(tensor.device, tensor.dtype)
    weight = weight / weight.sum(1, keepdim=True)
    return torch.einsum("bs,bs...->b...", weight, tensor)
