"""The keys that each kind of head looks at: the token before, the same token, and what followed the same token."""

import torch
from jaxtyping import Int
from torch import Tensor

from llama4lab.model.token_layout import PADDING
from llama4lab.prompt.prompt import Prompt

KINDS = ("previous_token", "duplicate_token", "induction")
COMPARED = ("text", "special")  # image tokens all have one id, though each is another image patch
NO_TOKEN, NO_QUERY = -1, -2  # two numbers, so that what is not compared is not the same as what is not there


def token_numbers(prompt: Prompt, rows: list[int], length: int) -> Int[Tensor, "batch seq"]:
    """Gives the ids of some rows of a prompt; `NO_TOKEN` where a token is never the same as another.

    Args:
        prompt: The prompt.
        rows: Its rows.
        length: How many of their first positions.
    """
    compared = [[kind in COMPARED for kind in prompt.modality[row][:length]] for row in rows]
    ids = prompt.input_ids.cpu()[rows, :length].long()
    return ids.masked_fill(~torch.tensor(compared, dtype=torch.bool).view(ids.shape), NO_TOKEN)


def numbers_before(numbers: Int[Tensor, "batch seq"], documents: Int[Tensor, "#batch seq"]) -> Int[Tensor, "batch seq"]:
    """Gives for each place the number of the token before it, in the same document and padding left out.

    Args:
        numbers: What `token_numbers` gives.
        documents: The document of each place; `PADDING` for padding.
    """
    documents = documents.expand(numbers.shape)
    places = torch.arange(numbers.shape[1], device=numbers.device)
    last = torch.where(documents != PADDING, places, -1).cummax(1).values
    before = torch.nn.functional.pad(last[:, :-1], (1, 0), value=-1)
    place = before.clamp(min=0)
    there = (before >= 0) & (documents != PADDING) & (documents.gather(1, place) == documents)
    return numbers.gather(1, place).masked_fill(~there, NO_TOKEN)


def looked_for(numbers: Int[Tensor, "*batch seq"]) -> Int[Tensor, "*batch seq"]:
    """Gives what queries look for: their own numbers, and for a token that is not compared one that no key has."""
    return numbers.masked_fill(numbers == NO_TOKEN, NO_QUERY)
