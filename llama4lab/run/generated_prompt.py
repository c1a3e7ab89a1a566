"""A prompt with generated tokens behind it, in which rows may have ended before others."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from llama4lab.model.pretrained import HookedPreTrainedModel
from llama4lab.prompt.prompt import Prompt


@dataclass(frozen=True)
class Ending:
    """What ends a row of a generation.

    Attributes:
        tokens: Tokens after which a row has ended.
        filling: The token that fills up a row which something else ends, such as a text to stop at; None if nothing
            else does.
    """

    tokens: tuple[int, ...] = ()
    filling: int | None = None

    def after(self, new: Int[Tensor, "batch new"]) -> Bool[Tensor, "batch new"]:
        """Which of the new tokens only fill up a row that has ended."""
        ending = torch.isin(new, torch.tensor(self.tokens, dtype=new.dtype)).long()
        ended = ending.cumsum(1) - ending > 0
        if self.filling is None:
            return ended
        other = (new != self.filling).long()
        return ended | (other.flip(1).cumsum(1).flip(1) == 0)


def extended(model: HookedPreTrainedModel, prompt: Prompt, new: Int[Tensor, "batch new"], ending: Ending) -> Prompt:
    """Gives the prompt with generated tokens behind it; what fills up a row that has ended is padding.

    Args:
        model: The model, which knows the text of tokens.
        prompt: The prompt.
        new: The generated tokens.
        ending: What ended rows.
    """
    ended = ending.after(new)
    tokens, modality = [], []
    for ids, over in zip(new.tolist(), ended.tolist(), strict=True):
        texts, kinds = model.prompter.describe(ids)
        tokens.append(["" if done else text for text, done in zip(texts, over, strict=True)])
        modality.append(["pad" if done else kind for kind, done in zip(kinds, over, strict=True)])
    return replace(
        prompt,
        input_ids=torch.cat([prompt.input_ids.cpu(), new], dim=1),
        attention_mask=torch.cat([prompt.attention_mask.cpu(), (~ended).to(prompt.attention_mask.dtype)], dim=1),
        tokens=[old + more for old, more in zip(prompt.tokens, tokens, strict=True)],
        modality=[old + more for old, more in zip(prompt.modality, modality, strict=True)],
    )
